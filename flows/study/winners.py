"""The best chain of every task of a study, made again by the pipeline so that it is registered with all its files."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from statistics import fmean

from cola_core.study.design import Design
from cola_core.study.results import Result

__all__ = ["overrides_of", "winners"]


def winners(design: Design, results: Sequence[Result]) -> Iterator[Result]:
    """Of every model and task, the best cell of the best recipe, by validation loss: test scores choose nothing."""
    for model in design.models:
        for task in design.tasks:
            cells: dict[str, list[Result]] = {}
            for result in results:
                group = result.cell.group
                if (group.model, group.task) == (model, task) and result.metrics:
                    cells.setdefault(group.recipe, []).append(result)
            if cells:
                best = min(cells.values(), key=lambda found: fmean(r.validation_loss for r in found))
                yield min(best, key=lambda r: r.validation_loss)


def overrides_of(result: Result) -> list[str]:
    """What composes a cell's parameters, from the command that its result tells."""
    return [word for word in shlex.split(result.content["command"])[3:] if word != "-S"]
