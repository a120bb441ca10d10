"""Which cells a study still needs: the sweep of every group, then fresh seeds at the learning rate that it chose."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cola_core.errors import UserError
from cola_core.study.design import Cell, Design, Group, Sweep
from cola_core.study.results import Result

__all__ = ["Choice", "choose", "counted", "current", "curves", "wanted"]

Curve = Mapping[float, float]  # learning rate -> validation loss, mean over the sweep's seeds
ALONE = math.sqrt(10.0)  # the factor of a grid of one rate


@dataclass(frozen=True)
class Choice:
    """A group's learning rate.

    missing: rates that have to be tried before it is known; edge: the best stands at an end of all that was tried.
    """

    rate: float
    missing: tuple[float, ...] = ()
    edge: bool = False


def wanted(design: Design, results: Iterable[Result]) -> Iterator[Cell]:
    """Every cell that can run now and has no result: sweeps first, then test cells seed by seed.

    Seed by seed, so that a study stopped early has whole blocks.
    """
    known = {result.cell for result in results}
    found = curves(design, results := list(results))
    choices = {group: choose(design.sweep, design.rates(group.recipe), found[group]) for group in design.groups()}
    for seed in design.sweep.seeds:
        for group, choice in choices.items():
            cells = (Cell("sweep", group, rate, seed) for rate in choice.missing)
            yield from (cell for cell in cells if cell not in known)
    for seed in design.seeds:
        for group, choice in choices.items():
            cell = Cell("test", group, choice.rate, seed)
            if not choice.missing and cell not in known:
                yield cell


def current(design: Design, results: Iterable[Result]) -> list[Result]:
    """The results of the study's groups and seeds as they are now, tests at rates that are no longer chosen too.

    A further sweep seed or rate leaves the choice open for a while, after which they may count again.
    """
    groups, seeds = set(design.groups()), {"sweep": set(design.sweep.seeds), "test": set(design.seeds)}
    return [r for r in results if r.cell.group in groups and r.cell.seed in seeds[r.cell.phase]]


def counted(design: Design, results: Iterable[Result]) -> list[Result]:
    """The results that the study as it is now would make: its groups, its seeds, and tests at chosen rates alone."""
    mine = current(design, results)
    rates = {g: choose(design.sweep, design.rates(g.recipe), c).rate for g, c in curves(design, mine).items()}
    return [r for r in mine if r.cell.phase == "sweep" or r.cell.learning_rate == rates[r.cell.group]]


def curves(design: Design, results: Iterable[Result]) -> dict[Group, dict[float, float]]:
    """Of every group, the rates that all seeds of the sweep have tried, in rising order."""
    losses: dict[Group, dict[float, dict[int, float]]] = {group: {} for group in design.groups()}
    for result in results:
        cell = result.cell
        if cell.phase == "sweep" and cell.group in losses:
            losses[cell.group].setdefault(cell.learning_rate, {})[cell.seed] = result.validation_loss
    seeds = set(design.sweep.seeds)
    return {
        group: {r: fmean(of[s] for s in seeds) for r, of in sorted(tried.items()) if seeds <= of.keys()}
        for group, tried in losses.items()
    }


def choose(sweep: Sweep, first: list[float], curve: Curve) -> Choice:
    """The rate of the lowest validation loss, or the rates to try next.

    Args:
        first: the grid's own rates; curve: those that were tried.
    """
    return BY[sweep.by](sweep, first, curve)


def _by_grid(sweep: Sweep, first: list[float], curve: Curve) -> Choice:
    """The grid, extended while the best stands at an end of it; of equal losses the lower rate's counts."""
    rates = list(first)
    for _ in range(sweep.extend + 1):
        missing = tuple(rate for rate in rates if rate not in curve)
        if missing:
            return Choice(math.nan, missing)
        best = min(rates, key=lambda rate: (curve[rate], rate))
        if best not in (rates[0], rates[-1]):
            return Choice(best)
        rates = sorted([*rates, _beyond(rates, best)])
    return Choice(best, edge=True)


def _beyond(rates: list[float], end: float) -> float:
    """The next rate past an end of the grid, by the factor between its last two, to three digits."""
    other = end / ALONE if len(rates) == 1 else rates[1] if end == rates[0] else rates[-2]
    return float(f"{end * end / other:.3g}")


def _by_optuna(sweep: Sweep, first: list[float], curve: Curve) -> Choice:
    """`sweep.trials` rates, each proposed from the losses before it; asked again, it proposes the same."""
    try:
        optuna: Any = importlib.import_module("optuna")
    except ModuleNotFoundError:
        raise UserError("sweep.by 'optuna': it is not installed; pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    tried: dict[float, float] = {}
    for _ in range(sweep.trials):
        trial = study.ask()
        rate = float(f"{trial.suggest_float('learning_rate', first[0], first[-1], log=True):.3g}")
        if rate not in curve:
            return Choice(math.nan, (rate,))
        study.tell(trial, min(curve[rate], 1e9))
        tried[rate] = curve[rate]
    best = min(tried, key=lambda rate: (tried[rate], rate))
    return Choice(best, edge=best in (min(tried), max(tried)))


BY = {"grid": _by_grid, "optuna": _by_optuna}
