"""Axis 'parametrisation': what the pair (A, B) means; dW = scale * B A."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["PARAMETRISATIONS", "Parametrisation"]


@dataclass(frozen=True)
class Parametrisation:
    """scale(alpha, r): the factor before B A; rslora: how PEFT's file format says it."""

    scale: Callable[[float, int], float]
    rslora: bool


PARAMETRISATIONS = {
    # LoRA, arXiv 2106.09685, section 4.1.
    "plain": Parametrisation(lambda alpha, rank: alpha / rank, rslora=False),
    # rsLoRA, arXiv 2312.03732: the only scale under which activations stay of order one as r grows. RoRA is the same.
    "rslora": Parametrisation(lambda alpha, rank: alpha / math.sqrt(rank), rslora=True),
}
