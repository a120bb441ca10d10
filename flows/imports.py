"""Which files of the project a stage's code is: `python -m flows.imports --write` puts them among dvc.yaml's deps."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["code_deps", "stage_deps"]

PACKAGES = ("cola_core", "tasks")


def code_deps() -> dict[str, list[str]]:
    """tasks/<name> -> the project's files that it imports, transitively, with itself and every package's __init__.

    Imports inside functions count; those for type checkers alone do not run and do not count.
    """
    import grimp

    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    found = {}
    for module in graph.find_children("tasks"):
        modules = {module, *graph.find_upstream_modules(module)}
        parents = {name.rsplit(".", depth)[0] for name in modules for depth in range(1, name.count(".") + 1)}
        found[module.removeprefix("tasks.")] = sorted(_file(name) for name in modules | parents)
    return found


def stage_deps(definition: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """A stage of dvc.yaml -> (its other deps, its code deps), as they are written there."""
    deps = definition.get("do", definition).get("deps", [])
    return [dep for dep in deps if not dep.endswith(".py")], [dep for dep in deps if dep.endswith(".py")]


def _file(module: str) -> str:
    path = Path(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).as_posix()


def _main() -> None:
    from dvc.utils.serialize import modify_yaml

    code = code_deps()
    if "--write" not in sys.argv:
        for task, files in sorted(code.items()):
            print(task, *files, sep="\n  ")
        return
    with modify_yaml("dvc.yaml") as content:
        for name, definition in content["stages"].items():
            definition.get("do", definition)["deps"] = [*stage_deps(definition)[0], *code[name]]


if __name__ == "__main__":
    _main()
