"""What the numbers of a study can tell: intervals over seeds, paired tests against the baseline, what n can detect.

The tests are scipy's and statsmodels'. A block is one model, task and seed: two recipes see the same rows there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy import stats

from cola_core.study.design import Design, Tests
from cola_core.study.results import Result

__all__ = ["Block", "Comparison", "Estimate", "block_of", "compare", "detectable", "estimate", "over_rows", "scores"]

Block = tuple[str, str, int]  # model, task, seed
Scores = Mapping[str, Mapping[Block, float]]  # recipe -> block -> score
RESAMPLES = 2_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its t interval; low and high are the mean where there is one value alone."""

    mean: float
    low: float
    high: float
    n: int

    def told(self, scale: float, form: str) -> str:
        """The mean and its interval, such as `80.1 [79.0, 81.2]`; form: a number's, as in a format string."""
        mean, low, high = (format(scale * value, form) for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Comparison:
    """One recipe against the baseline, over the blocks that both have.

    difference: mean of recipe - baseline with its interval; wide: the same at level / number of recipes, so that all of
    them hold at once; sd: of the differences; p: of a two-sided paired t test; holm: the same, corrected for all
    recipes that are compared.
    """

    recipe: str
    difference: Estimate
    wide: Estimate
    sd: float
    p: float
    holm: float

    def verdict(self, tests: Tests, rising: bool = True) -> str:
        """What may be said of it: only a difference, or its absence within the margin, is a finding.

        Args:
            rising: whether more is better; the margin is one of accuracy, so of a loss no absence is told.
        """
        if self.holm < tests.level:
            return "better" if (self.difference.mean > 0) == rising else "worse"
        inside = max(abs(self.wide.low), abs(self.wide.high)) <= tests.margin
        spread = self.sd > 0  # blocks that all differ alike tell nothing of what others would
        return f"no difference beyond {100 * tests.margin:g} point" if rising and inside and spread else "cannot tell"


def scores(design: Design, results: Iterable[Result], metric: str, headline: bool = True) -> Scores:
    """A metric of every test cell, by recipe and block; a cell whose training failed has what the base model scores.

    Args:
        headline: leave out the tasks that do not count in the mean.
    """
    found: dict[str, dict[Block, float]] = {recipe: {} for recipe in design.recipes}
    tests = [
        r for r in results if r.cell.phase == "test" and (design.tasks[r.cell.group.task].headline or not headline)
    ]
    base = {block_of(r): r.content["base"][metric] for r in tests if metric in r.content.get("base", {})}
    for result in tests:
        block, recipe = block_of(result), result.cell.group.recipe
        if metric in result.metrics:
            found[recipe][block] = result.metrics[metric]
        elif result.failed and block in base:
            found[recipe][block] = base[block]
    return found


def block_of(result: Result) -> Block:
    """The model, task and seed of a cell."""
    return *result.cell.group.panel, result.cell.seed


def estimate(values: Sequence[float], level: float) -> Estimate:
    """The mean of independent values with its t interval at 1 - level."""
    mean = fmean(values)
    if len(values) < 2 or not np.ptp(values):
        return Estimate(mean, mean, mean, len(values))
    interval = stats.ttest_1samp(values, mean).confidence_interval(1 - level)
    return Estimate(mean, float(interval.low), float(interval.high), len(values))


def compare(tests: Tests, found: Scores, recipes: Iterable[str]) -> list[Comparison]:
    """Every one of `recipes` against the baseline, with Holm's correction over all of them.

    Those with fewer than two common blocks are left out.
    """
    from statsmodels.stats.multitest import multipletests

    base, rows = found[tests.baseline], list[tuple[str, list[float]]]()
    for recipe in recipes:
        common = sorted(found[recipe].keys() & base.keys())
        if recipe != tests.baseline and len(common) > 1:
            rows.append((recipe, [found[recipe][block] - base[block] for block in common]))
    if not rows:
        return []
    p = [_p(differences) for _, differences in rows]
    holm = multipletests(p, alpha=tests.level, method="holm")[1]
    return [
        Comparison(
            *(recipe, estimate(differences, tests.level), estimate(differences, tests.level / len(rows))),
            *(stdev(differences), p_one, float(p_holm)),
        )
        for (recipe, differences), p_one, p_holm in zip(rows, p, holm, strict=True)
    ]


def _p(differences: Sequence[float]) -> float:
    """Of a two-sided paired t test; 1 where all differences are one number, of which t says nothing."""
    if not np.ptp(differences):
        return 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def over_rows(new: Sequence[Result], old: Sequence[Result], level: float) -> Estimate:
    """Difference in accuracy of models that answered the same rows, with what the choice of rows alone leaves open.

    The paired percentile bootstrap over rows, of each row's difference averaged over the models: how far these very
    models differ, not how far newly trained ones would.

    Args:
        new, old: results of one task, paired; n of the estimate counts rows.
    """
    rows = np.mean([mine.correct - theirs.correct for mine, theirs in zip(new, old, strict=True)], axis=0)
    if not np.ptp(rows):
        return Estimate(float(rows[0]), float(rows[0]), float(rows[0]), len(rows))
    found = stats.bootstrap(
        *((rows,), np.mean),
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=1 - level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(float(rows.mean()), float(found.low), float(found.high), len(rows))


def detectable(blocks: int, compared: int, tests: Tests) -> float:
    """The smallest mean difference that a paired t test finds, in standard deviations of a block's difference.

    With the power and level asked for, at the first step of Holm's correction, which is the strictest.
    """
    from statsmodels.stats.power import TTestPower

    if blocks < 2:
        return math.inf
    found = TTestPower().solve_power(nobs=blocks, alpha=tests.level / max(1, compared), power=tests.power)
    return float(np.squeeze(found))
