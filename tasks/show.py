"""Print the scores of artifacts/evaluate/metrics.json as a table: majority, base, every prefix of the chain."""

from __future__ import annotations

import sys
from typing import Any

from cola_core.errors import UserError
from cola_core.files import read_json
from tasks.places import ARTIFACTS

__all__ = ["rows", "show"]


def rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(model, accuracy, macro-F1) as text, in percent with their intervals; the whole chain comes last."""
    models = {"majority class": metrics.get("majority", {}), "base": metrics.get("base", {})}
    models |= {f"links 1..{k}" if k != "1" else "link 1": scores for k, scores in metrics.get("prefixes", {}).items()}
    models["chain"] = metrics
    return [(name, _percent(scores, "accuracy"), _percent(scores, "macro_f1")) for name, scores in models.items()]


def show() -> None:
    """Print the table.

    Raises:
        UserError: `evaluate` has not run.
    """
    from rich.console import Console
    from rich.table import Table

    metrics = read_json(ARTIFACTS / "evaluate" / "metrics.json")
    table = Table("model", "accuracy", "macro-F1", title=f"test rows: {metrics['n']}")
    for row in rows(metrics):
        table.add_row(*row)
    Console().print(table)


def _percent(scores: dict[str, Any], name: str) -> str:
    if name not in scores:
        return "-"
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    interval = "" if low is None or high is None else f"  [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * scores[name]:.1f}{interval}"


if __name__ == "__main__":
    try:
        show()
    except UserError as error:
        print(f"show: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
