"""What else a study tells of its recipes: usable learning rates, allocations that agree, gaps, budgets and costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np
from scipy import stats

from cola_core.study.compare import Block, block_of
from cola_core.study.design import PROBE_ROW, Design, Group
from cola_core.study.results import Result
from cola_core.study.sweep import choose

__all__ = ["Spending", "Usable", "agreement", "spending", "usable"]

NEAR = 0.02  # nats of validation loss: rates within it of the best are usable
EQUAL = 0.05  # share by which a budget may differ and still be called equal


@dataclass(frozen=True)
class Usable:
    """A group's learning rates: the chosen one, how wide around it they are usable, what an untuned one costs.

    decades: log10 of the widest ratio of neighbouring rates within NEAR of the best loss; open: whether that range ends
    where the trials do, so that it may be wider; default: loss at the untuned rate above the best, infinite where
    training failed, None where it was not tried; edge: whether the best itself stands at the end of all trials.
    """

    rate: float
    decades: float
    open: bool
    default: float | None
    edge: bool


def usable(design: Design, group: Group, curve: Mapping[float, float]) -> Usable | None:
    """What a group's sweep tells of learning rates; None before it has ended."""
    choice = choose(design.sweep, design.rates(group.recipe), curve)
    if choice.missing:
        return None
    rates, best = sorted(curve), curve[choice.rate]
    low = high = rates.index(choice.rate)
    while low and curve[rates[low - 1]] <= best + NEAR:
        low -= 1
    while high + 1 < len(rates) and curve[rates[high + 1]] <= best + NEAR:
        high += 1
    untuned = curve.get(design.sweep.default) if design.sweep.default else None
    over = None if untuned is None else untuned - best
    decades, ends = math.log10(rates[high] / rates[low]), low == 0 or high == len(rates) - 1
    return Usable(choice.rate, decades, ends, over, choice.edge)


@dataclass(frozen=True)
class Spending:
    """What a recipe's test cells have spent on average, and what of it is not what the baseline has spent.

    parameters: trainable at a time, the largest over a chain; tokens: of training, and a probe's by what they cost;
    cpu_seconds: of its probes and links; points: accuracy gained over the base model, per cell.
    """

    parameters: float
    tokens: float
    cpu_seconds: float
    points: float
    unequal: tuple[str, ...] = ()


def spending(design: Design, results: Iterable[Result]) -> dict[str, Spending]:
    """Of every recipe's test cells of headline tasks, beside the baseline's cells of the same task and seed."""
    by: dict[str, list[Result]] = {}
    for result in results:
        if result.metrics and design.tasks[result.cell.group.task].headline:
            by.setdefault(result.cell.group.recipe, []).append(result)
    base = {block_of(result): result for result in by.get(design.tests.baseline, [])}
    return {recipe: _spent([r for r in cells if block_of(r) in base], base) for recipe, cells in by.items()}


def _spent(cells: Sequence[Result], base: Mapping[Block, Result]) -> Spending:
    shares = {
        name: [count(r) / max(1.0, count(base[block_of(r)])) for r in cells]
        for name, count in (("parameters", _parameters), ("tokens", _tokens))
    }
    unequal = tuple(
        f"{_range(found)} x {name}" for name, found in shares.items() if any(abs(share - 1) > EQUAL for share in found)
    )
    parameters, tokens, points = (_mean(count(r) for r in cells) for count in (_parameters, _tokens, _gained))
    seconds = _mean(r.cpu_seconds for r in cells if not r.interrupted)
    return Spending(parameters, tokens, seconds, points, unequal)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fmean(found) if found else math.nan


def _range(shares: Sequence[float]) -> str:
    """One number, or two where blocks differ."""
    ends = f"{min(shares):.2f}", f"{max(shares):.2f}"
    return ends[0] if ends[0] == ends[1] else "-".join(ends)


def _parameters(result: Result) -> float:
    return float(max(link["trainable_parameters"] for link in result.content["links"]))


def _tokens(result: Result) -> float:
    return float(sum(link["tokens"] + PROBE_ROW * link["probe_tokens"] for link in result.content["links"]))


def _gained(result: Result) -> float:
    return 100 * float(result.metrics["accuracy"] - result.content["base"]["accuracy"])


def agreement(results: Iterable[Result], recipe: str) -> dict[str, float]:
    """Mean Spearman correlation of a recipe's ranks over modules: between links of one chain, seeds, and tasks.

    A kind without two allocations to compare, or whose ranks are all alike, is left out.
    """
    found: dict[tuple[str, str, int, int], list[int]] = {}
    for result in results:
        group = result.cell.group
        if group.recipe == recipe and result.metrics:
            for number, link in enumerate(result.content["links"], start=1):
                found[group.model, group.task, result.cell.seed, number] = [r for _, r in sorted(link["ranks"].items())]
    kinds = {"links": 3, "seeds": 2, "tasks": 1}
    pairs = {kind: list(_correlations(found, place)) for kind, place in kinds.items()}
    return {kind: fmean(values) for kind, values in pairs.items() if values}


def _correlations(found: Mapping[tuple[str, str, int, int], list[int]], place: int) -> Iterator[float]:
    """Of every two allocations that differ in one part of their name alone."""
    for one, two in combinations(found, 2):
        alone = all((a == b) == (i != place) for i, (a, b) in enumerate(zip(one, two, strict=True)))
        if alone and np.ptp(found[one]) and np.ptp(found[two]):
            yield float(stats.spearmanr(found[one], found[two]).statistic)
