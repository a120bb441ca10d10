"""Axis 'schedule': what happens at knots, and the learning rate between them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from cola_core.config.recipe import LinkConfig, ScheduleConfig

__all__ = ["SCHEDULES", "Schedule", "learning_rate_factor"]


@dataclass(frozen=True)
class Schedule:
    """knots: whether a link may be merged and followed by another."""

    knots: bool


SCHEDULES = {"none": Schedule(knots=False), "cola": Schedule(knots=True)}

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}


def learning_rate_factor(step: int, offset: int, schedule: ScheduleConfig, link: LinkConfig) -> float:
    """The learning rate of one step as a fraction of its peak: warm-up, then decay to `link.floor`.

    Args:
        step: 0-based step inside the link.
        offset: steps of all earlier links; counts only where the schedule is `global` or `jagged`.
    """
    if schedule.learning_rate == "jagged":  # ReLoRA, arXiv 2307.05695, section 3: warmed up again after every knot
        warm = min(1.0, (step + 1) / max(1, math.ceil(link.warmup * link.steps)))
        return warm * _decayed((offset + step) / schedule.horizon, link)
    whole = schedule.learning_rate == "global"
    position, steps = (offset + step, schedule.horizon) if whole else _in_cycle(step, link)
    warm = math.ceil(link.warmup * steps)
    if position < warm:
        return (position + 1) / warm
    return _decayed((position - warm) / max(1, steps - warm), link)


def _in_cycle(step: int, link: LinkConfig) -> tuple[int, int]:
    """A step's place in its cycle, and the cycle's steps: `link.cycles` even shares that add up to `link.steps`."""
    ends = [link.steps * (k + 1) // link.cycles for k in range(link.cycles)]
    cycle = bisect_right(ends, step)
    start = ends[cycle - 1] if cycle else 0
    return step - start, ends[cycle] - start


def _decayed(done: float, link: LinkConfig) -> float:
    return link.floor + (1 - link.floor) * DECAYS[link.decay](done)
