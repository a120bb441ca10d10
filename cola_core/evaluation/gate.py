"""May a challenger take the champion's place? Paired on the same test rows, with what the test set still allows.

Two tests must agree that it is better: the paired bootstrap's interval excludes zero (which tells by how much), and the
exact sign test on the rows that one model alone answers rightly (McNemar's; the bootstrap's tail is too short where few
rows differ). Guards then ask whether anything else has become clearly worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cola_core.config.report import PromoteConfig
from cola_core.evaluation.metrics import calibration_gaps
from cola_core.seeds import derive

__all__ = ["Decision", "Scored", "judge"]

Floats = NDArray[np.float64]
GUARDED = 0.95  # confidence with which a guard calls something worse


@dataclass(frozen=True)
class Scored:
    """One model's answers to the test rows, in their order; confidence is empty where answers are generated."""

    gold: Sequence[str]
    predicted: Sequence[str]
    loss: Sequence[float]
    confidence: Sequence[float] = ()

    @property
    def correct(self) -> Floats:
        """1 where the answer is right."""
        pairs = zip(self.predicted, self.gold, strict=True)
        return np.array([predicted == gold != "" for predicted, gold in pairs], dtype=float)


@dataclass(frozen=True)
class Decision:
    """verdict, why in one line, and the numbers behind it.

    gains: name of the rival -> {difference, low, high, p} in accuracy; guards: what was asked -> {worse, low, allowed},
    positive where the challenger is worse; level: of this one decision; more: test rows beside those there are with
    which a gain as large would be seen, None where there is none.
    """

    verdict: Literal["promote", "abstain", "reject"]
    reason: str
    level: float
    gains: dict[str, dict[str, float]]
    guards: dict[str, dict[str, float]]
    more: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def judge(challenger: Scored, champion: Scored | None, base: Scored, config: PromoteConfig, seed: int) -> Decision:
    """Decide on a challenger.

    Args:
        champion: what has to be beaten beside the base, None where there is none yet.
        seed: of the bootstrap, so that the same models are judged alike.
    """
    level = config.level / config.uses
    rivals = {"champion": champion, "base": base} if champion else {"base": base}
    gains = {name: _gain(challenger, rival, level, config.resamples, seed) for name, rival in rivals.items()}
    guards = dict(_guards(challenger, champion, config, seed)) if champion else {}
    more = max((_more(challenger, rival, level, config.power) for rival in rivals.values()), key=_most)
    verdict, reason = _verdict(gains, guards, level, more)
    return Decision(verdict, reason, level, gains, guards, more if verdict == "abstain" else None)


def _most(more: int | None) -> float:
    return math.inf if more is None else more


def _verdict(
    gains: dict[str, dict[str, float]], guards: dict[str, dict[str, float]], level: float, more: int | None
) -> tuple[Literal["promote", "abstain", "reject"], str]:
    for name, gain in gains.items():
        told = f"{100 * gain['difference']:+.2f} points [{100 * gain['low']:.2f}, {100 * gain['high']:.2f}]"
        if gain["high"] < 0:
            return "reject", f"less accurate than the {name}: {told}"
        if not (gain["low"] > 0 and gain["p"] <= level):
            asked = f"about {more:,} more test rows would tell" if more is not None else "it is not ahead"
            return (
                "abstain",
                f"not shown to be more accurate than the {name}: {told}, sign test p {gain['p']:.2g}; {asked}",
            )
    for name, guard in guards.items():
        if guard["low"] > guard["allowed"]:
            return (
                "reject",
                f"more accurate, but its {name} is worse by {guard['worse']:.4f}, at least {guard['low']:.4f}",
            )
    first = next(iter(gains))
    return "promote", f"more accurate than the {first} by {100 * gains[first]['difference']:.2f} points"


def _gain(challenger: Scored, rival: Scored, level: float, resamples: int, seed: int) -> dict[str, float]:
    """Difference in accuracy with its bootstrap interval, either end of which errs with probability `level`."""
    difference = challenger.correct - rival.correct
    low, high = _interval(_mean(difference), len(difference), 1 - 2 * level, resamples, seed)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    p = stats.binomtest(wins, wins + losses, 0.5, "greater").pvalue if wins + losses else 1.0
    return {"difference": float(difference.mean()), "low": low, "high": high, "p": float(p)}


def _guards(
    challenger: Scored, champion: Scored, config: PromoteConfig, seed: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """By how much the challenger is worse, and at least by how much."""
    measures: list[tuple[str, Statistic, float]] = [
        ("loss", _mean(np.asarray(challenger.loss) - np.asarray(champion.loss)), config.loss)
    ]
    if challenger.confidence and champion.confidence:
        errors = _calibration(challenger), _calibration(champion)
        measures.append(("calibration error", lambda rows: errors[0](rows) - errors[1](rows), config.calibration_error))
        for label in sorted(set(challenger.gold)):
            measures.append((f"F1 of {label}", _f1_lost(challenger, champion, label), config.f1))
    rows = np.arange(len(challenger.gold))
    confidence = 1 - 2 * (1 - GUARDED) / len(measures)  # its lower end alone calls any of them worse by chance
    for name, statistic, allowed in measures:
        low, _ = _interval(statistic, len(rows), confidence, config.guard_resamples, seed)
        yield name, {"worse": float(statistic(rows)), "low": low, "allowed": allowed}


Statistic = Callable[[NDArray[np.int64]], Any]  # of test rows, along the last axis


def _mean(values: Floats) -> Statistic:
    return lambda rows: values[rows].mean(axis=-1)


def _calibration(scored: Scored) -> Statistic:
    """`metrics.calibration_error` of resampled rows."""
    gaps = calibration_gaps(scored.correct, scored.confidence)
    return lambda rows: np.abs(gaps[rows].sum(axis=-2)).sum(axis=-1) / rows.shape[-1]


def _f1_lost(challenger: Scored, champion: Scored, label: str) -> Statistic:
    true = np.array([gold == label for gold in champion.gold])

    def f1(scored: Scored) -> Statistic:
        said = np.array([predicted == label for predicted in scored.predicted])
        hits, seen = (true & said).astype(float), true.astype(float) + said
        return lambda rows: 2 * hits[rows].sum(axis=-1) / np.maximum(seen[rows].sum(axis=-1), 1)

    new, old = f1(challenger), f1(champion)
    return lambda rows: old(rows) - new(rows)


def _interval(statistic: Statistic, rows: int, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap over test rows, the same resamples for both models."""
    found = stats.bootstrap(
        (np.arange(rows),),
        lambda drawn, axis=-1: statistic(drawn),
        vectorized=True,
        n_resamples=resamples,
        batch=200,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(derive(seed, "gate")),
    ).confidence_interval
    return float(found.low), float(found.high)


def _more(challenger: Scored, rival: Scored, level: float, power: float) -> int | None:
    """Rows beside those there are with which the gain seen now would be found; None where there is no gain."""
    difference = challenger.correct - rival.correct
    gain, spread = difference.mean(), difference.var()
    if gain <= 0:
        return None
    needed: float = spread * ((stats.norm.isf(level) + stats.norm.isf(1 - power)) / gain) ** 2
    return max(0, math.ceil(needed) - len(difference))
