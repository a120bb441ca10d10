"""When a link's training has gone wrong: numbers that are not finite, and a loss that stays above its start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn import Parameter

from cola_core.config.recipe import LinkConfig, ScheduleConfig
from cola_core.errors import TrainingError

__all__ = ["Course", "check_divergence", "check_finite", "not_finite"]

# A link has diverged when the mean of its last RECENT losses is more than FACTOR times the lowest of its first START
# (the second may be a diverged one already) and more than MARGIN nats above it, so that a link that starts near zero is
# not stopped for noise.
START, RECENT = 3, 20
FACTOR, MARGIN = 2.0, 1.0


@dataclass(frozen=True)
class Course:
    """What a link is trained by.

    offset: optimizer steps of all earlier links (the global learning rate goes on from there);
    checkpoint: where to keep the resume state, None for nowhere.
    """

    config: LinkConfig
    schedule: ScheduleConfig
    seed: int
    link: int
    offset: int = 0
    checkpoint: Path | None = None


def check_finite(loss: float, named: Mapping[str, Parameter], course: Course, step: int) -> None:
    """Refuse a loss or a gradient that is not finite, before it reaches a parameter.

    Args:
        step: 1 for the link's first.

    Raises:
        TrainingError: names the first parameter that is concerned.
    """
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    if math.isfinite(loss) and math.isfinite(torch.nn.utils.get_total_norm(gradients.values())):
        return
    bad = [name for name, gradient in gradients.items() if not math.isfinite(gradient.norm())]
    raise not_finite(f"the gradient of {bad[0]}" if bad else "the loss or its gradient", course, step)


def check_divergence(losses: Sequence[Mapping[str, Any]], course: Course, named: Mapping[str, Parameter]) -> None:
    """Stop a link whose loss has stayed far above its start, which no knot should be tied with.

    Raises:
        TrainingError: names the module whose adapter has grown largest.
    """
    if len(losses) < START + RECENT:
        return
    start, now = min(event["loss"] for event in losses[:START]), fmean(event["loss"] for event in losses[-RECENT:])
    if now <= FACTOR * start or now - start <= MARGIN:
        return
    largest = max(named, key=lambda name: float(named[name].detach().norm()))
    raise TrainingError(
        f"link {course.link}, step {len(losses)}: diverged: the last {RECENT} losses are {now:.3g} on average, "
        f"its start was {start:.3g}; {largest} is the largest parameter; {_advice(course)}"
    )


def not_finite(what: str, course: Course, step: int) -> TrainingError:
    """The line about a number that is not finite."""
    return TrainingError(f"link {course.link}, step {step}: {what} is not finite; {_advice(course)}")


def _advice(course: Course) -> str:
    clip = "" if course.config.clip else ", link.clip=1.0"
    return f"link.learning_rate is {course.config.learning_rate:g}: try a tenth of it{clip} or machine.dtype=fp32"
