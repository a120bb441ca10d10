"""The best chain of every task of a study, made again by the pipeline so that it is registered with all its files."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from statistics import fmean

from cola_core.study.design import Design
from cola_core.study.results import Result

__all__ = ["overrides_of", "winners"]


def winners(design: Design, results: Sequence[Result]) -> Iterator[Result]:
    """Of every model and task, the first seed's cell of the recipe with the lowest mean validation loss.

    Among recipes that have all their seeds; test scores choose nothing, and no seed is picked for its validation rows.
    """
    for model in design.models:
        for task in design.tasks:
            cells: dict[str, list[Result]] = {}
            for result in results:
                group = result.cell.group
                if group.panel == (model, task) and result.metrics:
                    cells.setdefault(group.recipe, []).append(result)
            whole = [found for found in cells.values() if len(found) == len(design.seeds)]
            if whole:
                best = min(whole, key=lambda found: fmean(r.validation_loss for r in found))
                yield next(r for r in best if r.cell.seed == design.seeds[0])


def overrides_of(result: Result) -> list[str]:
    """What composes a cell's parameters, from the command that its result tells."""
    return [word for word in shlex.split(result.content["command"])[3:] if word != "-S"]
