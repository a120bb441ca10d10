"""How far a study is: a live table on a terminal, one line per finished cell in a log."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING

from cola_core.study.design import Cell, Design, Group
from cola_core.study.results import Result
from cola_core.study.sweep import choose, curves

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Board", "board"]


class Board:
    """What has ended, what runs, and about how long the rest takes on `size` processes."""

    def __init__(self, design: Design, results: list[Result], size: int) -> None:
        self.design, self.results, self.size = design, results, size
        self.running: dict[Cell, float] = {}

    def started(self, cell: Cell) -> None:
        """Count a cell as running."""
        self.running[cell] = time.monotonic()

    def ended(self, result: Result) -> str:
        """Take a finished cell in; returns its line."""
        took = time.monotonic() - self.running.pop(result.cell)
        self.results.append(result)
        if result.failed:
            told = f"failed: {result.content['failed']}"
        else:
            accuracy = result.metrics.get("accuracy")
            told = f"validation {result.validation_loss:.4f}" + (f"  accuracy {accuracy:.4f}" if accuracy else "")
        done, total = self.count()
        return f"{done}/{total}  {result.cell.name}  {told}  {took:.0f} s{self._left()}"

    def count(self) -> tuple[int, int]:
        """Cells that have ended, and all there will be as far as is known now."""
        return len(self.results), len(self.results) + self._missing().total()

    def _missing(self) -> Counter[Group]:
        """Cells of every group that have no result, as far as is known now."""
        design = self.design
        swept = Counter(r.cell.group for r in self.results if r.cell.phase == "sweep")
        tested = Counter((r.cell.group, r.cell.learning_rate) for r in self.results if r.cell.phase == "test")
        missing: Counter[Group] = Counter()
        for group, curve in curves(design, self.results).items():
            choice = choose(design.sweep, design.rates(group.recipe), curve)
            sweep = (len(curve) + len(choice.missing)) * len(design.sweep.seeds)
            missing[group] = sweep - swept[group] + len(design.seeds) - tested[group, choice.rate]
        return missing

    def _left(self) -> str:
        """Each missing cell as long as those of its model and task so far, or as any cell where there is none."""
        took: dict[tuple[str, str], list[float]] = {}
        for result in self.results:
            took.setdefault(result.cell.group.panel, []).append(result.seconds)
        if not took:
            return ""
        usual = fmean(seconds for each in took.values() for seconds in each)
        ahead = sum(count * fmean(took.get(group.panel, [usual])) for group, count in self._missing().items())
        return f"  about {ahead / self.size / 3600:.1f} h left"

    def table(self) -> Table:
        """Recipes by tasks: mean accuracy of test cells so far, or how far the sweep is."""
        from rich.table import Table

        tasks = [(model, task) for model in self.design.models for task in self.design.tasks]
        done, total = self.count()
        table = Table(
            "recipe", *(f"{task}" for _, task in tasks), title=f"{self.design.name}: {done}/{total}{self._left()}"
        )
        for recipe in self.design.recipes:
            table.add_row(recipe, *(self._entry(model, task, recipe) for model, task in tasks))
        table.caption = "  ".join(f"{c.name} {time.monotonic() - t:.0f} s" for c, t in self.running.items())
        return table

    def _entry(self, model: str, task: str, recipe: str) -> str:
        mine = [r for r in self.results if vars(r.cell.group) == {"model": model, "task": task, "recipe": recipe}]
        scores = [r.metrics["accuracy"] for r in mine if r.metrics]
        swept = sum(r.cell.phase == "sweep" for r in mine)
        return f"{fmean(scores):.3f} ({len(scores)})" if scores else f"sweep {swept}" if swept else ""


@contextmanager
def board(shown: Board) -> Iterator[None]:
    """Show it while the block runs, where somebody looks."""
    if not sys.stdout.isatty():
        yield
        return
    from rich.live import Live

    with Live(get_renderable=shown.table, refresh_per_second=1):
        yield
