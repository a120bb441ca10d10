"""A study as far as it has run, and what follows from its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from cola_core.study.compare import Comparison, compare, estimate, scores
from cola_core.study.design import Cell, Design, Group, Panel
from cola_core.study.results import Result
from cola_core.study.sweep import curves
from cola_core.study.traits import Spending, Usable, spending, usable

__all__ = ["IDLE", "Findings"]

IDLE = {"base": "base model, fitted head", "majority": "majority class"}  # what answers without training


@dataclass(frozen=True)
class Findings:
    """A study as far as it has run; links: cell -> address of its MLflow run, where one is known."""

    design: Design
    results: Sequence[Result]
    links: Mapping[Cell, str]

    @cached_property
    def panels(self) -> dict[Panel, str]:
        """What every model and task is called where they stand side by side: the task, after its model if several."""
        several = len(self.design.models) > 1
        return {(m, t): f"{m} {t}" if several else t for m in self.design.models for t in self.design.tasks}

    def scored(self, panel: Panel, recipe: str) -> list[Result]:
        """A recipe's test cells on a model and task, by seed."""
        mine = [r for r in self.tests if r.cell.group == Group(*panel, recipe)]
        return sorted(mine, key=lambda result: result.cell)

    def whole(self, recipe: str) -> bool:
        """Whether a recipe was scored on every task in the mean, so that its mean may stand beside others."""
        counted = {panel for panel in self.panels if self.design.tasks[panel[1]].headline}
        return counted <= {r.cell.group.panel for r in self.ended if r.cell.group.recipe == recipe}

    @cached_property
    def ended(self) -> list[Result]:
        """Test cells, whether they trained or failed."""
        return [result for result in self.results if result.cell.phase == "test"]

    @cached_property
    def tests(self) -> list[Result]:
        """Cells that were scored on test rows."""
        return [result for result in self.results if result.metrics]

    @cached_property
    def failed(self) -> Counter[str]:
        """By recipe, test cells whose training failed."""
        return Counter(result.cell.group.recipe for result in self.ended if result.failed)

    @cached_property
    def compared(self) -> list[str]:
        """The recipes whose difference from the baseline is tested."""
        baseline = self.design.tests.baseline
        return [name for name, arm in self.design.recipes.items() if not arm.control and name != baseline]

    @cached_property
    def same_rows(self) -> bool:
        """Whether the cells of every panel were scored on the same rows, whatever their seed."""
        rows = {(r.cell.group.panel, str(r.content.get("rows"))) for r in self.tests}
        return len(rows) == len({panel for panel, _ in rows})

    @cached_property
    def learnt(self) -> list[Panel]:
        """Panels in the mean where training is of use: more right answers than the base's and the majority class's.

        By the mean over all recipes, seed by seed, with its t interval. Elsewhere recipes differ by noise alone.
        """
        return [p for p in self.panels if self.design.tasks[p[1]].headline and self._learnt(p)]

    def _learnt(self, panel: Panel) -> bool:
        gains: dict[int, list[float]] = {}
        for result in self.tests:
            if result.cell.group.panel == panel:
                idle = max(result.content[name]["accuracy"] for name in IDLE if name in result.content)
                gains.setdefault(result.cell.seed, []).append(result.metrics["accuracy"] - idle)
        means = [fmean(each) for each in gains.values()]
        return bool(means) and estimate(means, self.design.tests.level).low > 0

    def comparisons(self, metric: str, panels: Sequence[Panel] | None = None) -> list[Comparison]:
        """Every recipe against the baseline over headline tasks: the tested ones under Holm, controls by themselves.

        Args:
            panels: over these alone.
        """
        mine = [r for r in self.results if panels is None or r.cell.group.panel in panels]
        found, tests = scores(self.design, mine, metric), self.design.tests
        controls = [name for name, arm in self.design.recipes.items() if arm.control and name != tests.baseline]
        return compare(tests, found, self.compared) + compare(tests, found, controls)

    @cached_property
    def swept(self) -> dict[Group, dict[float, float]]:
        """Validation losses by learning rate."""
        return curves(self.design, self.results)

    @cached_property
    def usable(self) -> dict[Group, Usable]:
        """What the sweep of every group tells, where it has ended."""
        told = {group: usable(self.design, group, curve) for group, curve in self.swept.items()}
        return {group: each for group, each in told.items() if each}

    @cached_property
    def spent(self) -> dict[str, Spending]:
        """What every recipe has spent."""
        return spending(self.design, self.tests)
