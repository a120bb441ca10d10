"""Accuracy and macro-F1 with bootstrap intervals, of a model and of the majority class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from cola_core.config.report import EvaluateConfig
from cola_core.seeds import derive

__all__ = ["calibration_error", "calibration_gaps", "confusion", "majority", "summary"]

BINS = 15

Ints = NDArray[np.int64]


def summary(
    predicted: Sequence[str],
    gold: Sequence[str],
    loss: Sequence[float],
    config: EvaluateConfig,
    seed: int,
    confidence: Sequence[float] = (),
    classes: bool = True,
) -> dict[str, float]:
    """n, mean loss, accuracy and macro-F1, each score with `_low` and `_high` of a percentile bootstrap over rows.

    Macro-F1 is scikit-learn's: taken over the classes that occur in `gold` or `predicted`, in every resample anew.
    Generated text has no classes: pass `classes=False`. The calibration error comes with `confidence`.
    """
    names = sorted({*gold, *predicted})
    index = {name: i for i, name in enumerate(names)}
    true = np.array([index[g] for g in gold])
    said = np.array([index[p] for p in predicted])
    result = {"n": len(gold), "loss": float(np.mean(loss))}
    if confidence:
        result["calibration_error"] = calibration_error(
            [p == g for p, g in zip(predicted, gold, strict=True)], confidence
        )
    for name, statistic in STATISTICS if classes else STATISTICS[:1]:
        result |= _interval(name, statistic, true, said, config, seed)
    return result


def majority(train: Sequence[str], gold: Sequence[str], config: EvaluateConfig, seed: int) -> dict[str, float]:
    """The score of always answering with the commonest training label."""
    commonest = min(Counter(train).items(), key=lambda item: (-item[1], item[0]))[0]
    result = summary([commonest] * len(gold), gold, [0.0], config, seed)
    return {name: value for name, value in result.items() if name != "loss"}


def calibration_error(correct: Sequence[bool], confidence: Sequence[float]) -> float:
    """Expected calibration error: mean |accuracy - confidence| over 15 even bins of confidence, by their rows.

    Guo et al., arXiv 1706.04599, equation 3.
    """
    return float(np.abs(calibration_gaps(correct, confidence).sum(axis=0)).sum() / len(confidence))


def calibration_gaps(correct: Sequence[bool] | NDArray[np.float64], confidence: Sequence[float]) -> NDArray[np.float64]:
    """1 or 0 for right or wrong, minus the confidence, of every row in the column of its bin: [rows, 15]."""
    right, sure = np.asarray(correct, dtype=float), np.asarray(confidence)
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    return np.where(bins[:, None] == np.arange(BINS), (right - sure)[:, None], 0.0)


def confusion(predicted: Sequence[str], gold: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Counts: one line per true label, one column per predicted label."""
    counts = Counter(zip(gold, predicted, strict=True))
    return [[counts[g, p] for p in labels] for g in labels]


def _interval(name: str, statistic: Any, true: Ints, said: Ints, config: EvaluateConfig, seed: int) -> dict[str, float]:
    value = float(statistic(true, said))
    if len(true) < 2:
        return {name: value, f"{name}_low": value, f"{name}_high": value}
    found = bootstrap(
        (true, said),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=config.resamples,
        batch=200,
        confidence_level=config.confidence,
        method="percentile",
        rng=np.random.default_rng(derive(seed, "bootstrap", name)),
    ).confidence_interval
    return {name: value, f"{name}_low": float(found.low), f"{name}_high": float(found.high)}


def _accuracy(true: Ints, said: Ints, axis: int = -1) -> Any:
    return np.mean(true == said, axis=axis)


def _macro_f1(true: Ints, said: Ints, axis: int = -1) -> Any:
    """Mean of 2 TP / (2 TP + FP + FN) over the classes that occur, in truth or answer, along `axis`."""
    total: Any = 0.0
    classes: Any = 0
    for label in range(max(int(true.max()), int(said.max())) + 1):
        hit = np.sum((true == label) & (said == label), axis=axis)
        seen = np.sum(true == label, axis=axis) + np.sum(said == label, axis=axis)
        total = total + 2 * hit / np.maximum(seen, 1)
        classes = classes + (seen > 0)
    return total / classes


STATISTICS = (("accuracy", _accuracy), ("macro_f1", _macro_f1))
