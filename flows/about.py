"""What a stage says of itself in tasks/<stage>.py, read without importing it: its sentence and how often to retry."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from cola_core.errors import UserError

__all__ = ["About", "about"]


@dataclass(frozen=True)
class About:
    """description: the module's docstring; retries: its RETRIES, how often the flow tries again after exit code 75."""

    description: str
    retries: int


def about(root: Path, task: str) -> About:
    """Read tasks/<task>.py below `root`.

    Raises:
        UserError: the file is missing, is no Python, or RETRIES is not a plain number.
    """
    path = root / "tasks" / f"{task}.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [value for node in tree.body if (value := _value(node, "RETRIES"))]
        return About(ast.get_docstring(tree) or task, int(ast.literal_eval(found[-1])) if found else 0)
    except FileNotFoundError:
        raise UserError(f"tasks/{task}.py: no such file, though dvc.yaml has the stage {task}") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"tasks/{task}.py: {error}") from None


def _value(node: ast.stmt, name: str) -> ast.expr | None:
    """What the statement assigns to `name`."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return None
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return node.value if any(isinstance(target, ast.Name) and target.id == name for target in targets) else None
