"""A study as far as it has run, and what follows from its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from cola_core.study.compare import Comparison, compare, scores
from cola_core.study.design import Cell, Design, Group
from cola_core.study.results import Result
from cola_core.study.sweep import curves
from cola_core.study.traits import Spending, Usable, spending, usable

__all__ = ["Findings"]


@dataclass(frozen=True)
class Findings:
    """A study as far as it has run; links: cell -> address of its MLflow run, where one is known."""

    design: Design
    results: Sequence[Result]
    links: Mapping[Cell, str]

    @cached_property
    def tests(self) -> list[Result]:
        """Cells that were scored on test rows."""
        return [result for result in self.results if result.metrics]

    @cached_property
    def failed(self) -> Counter[str]:
        """By recipe, test cells whose training failed."""
        return Counter(r.cell.group.recipe for r in self.results if r.cell.phase == "test" and r.failed)

    @cached_property
    def compared(self) -> list[str]:
        """The recipes whose difference from the baseline is tested."""
        return [name for name, arm in self.design.recipes.items() if not arm.control]

    def comparisons(self, metric: str) -> list[Comparison]:
        """Every recipe against the baseline over headline tasks: the tested ones under Holm, controls by themselves."""
        found, tests = scores(self.design, self.results, metric), self.design.tests
        controls = [name for name in self.design.recipes if name not in self.compared]
        return compare(tests, found, self.compared) + compare(tests, found, controls)

    @cached_property
    def usable(self) -> dict[Group, Usable]:
        """What the sweep of every group tells, where it has ended."""
        found = curves(self.design, self.results)
        told = {group: usable(self.design, group, curve) for group, curve in found.items()}
        return {group: each for group, each in told.items() if each}

    @cached_property
    def spent(self) -> dict[str, Spending]:
        """What every recipe has spent."""
        return spending(self.design, self.tests)
