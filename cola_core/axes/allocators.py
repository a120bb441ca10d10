"""Axis 'allocator': the rank of every module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cola_core.config.recipe import AllocateConfig

__all__ = ["ALLOCATORS", "Allocation", "Allocator", "allocate"]

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Allocation:
    """Ranks with what led to them, and what they cost.

    ranks: module -> r; advantage: share of the total importance; clamped: modules that met a bound, and which;
    budget, spent: trainable parameters of the uniform reference rank, and of these ranks.
    """

    ranks: dict[str, int]
    importance: dict[str, float]
    advantage: dict[str, float]
    clamped: dict[str, str]
    budget: int
    spent: int

    def to_json(self) -> dict[str, Any]:
        """The content of ranks.json."""
        return asdict(self)


Allocator = Callable[[Shapes, Mapping[str, float], AllocateConfig], dict[str, float]]

# How a module's size enters GoRA's budget. The paper takes sqrt(in + out) and rounds; the code its authors
# released takes in + out and divides the rounded share by it with floor.
FEATURES: dict[str, tuple[Callable[[int], float], Callable[[float, float], float]]] = {
    "sqrt": (math.sqrt, lambda share, size: round(share / size)),
    "linear": (float, lambda share, size: round(share) // size),
}


def uniform(shapes: Shapes, importance: Mapping[str, float], config: AllocateConfig) -> dict[str, float]:
    """The same rank everywhere (LoRA)."""
    return dict.fromkeys(shapes, config.rank)


def gora(shapes: Shapes, importance: Mapping[str, float], config: AllocateConfig) -> dict[str, float]:
    """GoRA, section 3: r_i = clip(round(b a_i / f_i), r_min, r_max), b = sum_j r_ref f_j, a_i = I_i / sum_j I_j."""
    size, divide = FEATURES[config.features]
    features = {name: size(sum(shape)) for name, shape in shapes.items()}
    budget = sum(config.rank * f for f in features.values())
    return {name: divide(budget * a, features[name]) for name, a in advantage(importance).items()}


ALLOCATORS: dict[str, Allocator] = {"uniform": uniform, "gora": gora}


def advantage(importance: Mapping[str, float]) -> dict[str, float]:
    """a_i = I_i / sum_j I_j; equal shares where every importance is zero."""
    total = sum(importance.values())
    return {name: value / total if total else 1 / len(importance) for name, value in importance.items()}


def allocate(shapes: Shapes, importance: Mapping[str, float], config: AllocateConfig) -> Allocation:
    """Ask the allocator of `config` for ranks and bound them; ranks are not renormalised after it (GoRA, section 3).

    Args:
        shapes: module -> (out, in).
        importance: module -> I, empty where no probe was taken.
    """
    wanted = ALLOCATORS[config.allocator.kind](shapes, importance, config)
    bounds = (1, 10**9) if config.allocator.kind == "uniform" else (config.r_min, config.r_max)
    ranks, clamped = {}, {}
    for name, shape in shapes.items():
        low, high = min(bounds[0], *shape), min(bounds[1], *shape)
        ranks[name] = int(min(max(wanted[name], low), high))
        if ranks[name] != wanted[name]:
            clamped[name] = "r_min" if wanted[name] < low else "r_max"
    return Allocation(
        ranks=ranks,
        importance=dict(importance),
        advantage=advantage(importance) if importance else {},
        clamped=clamped,
        budget=sum(config.rank * sum(shape) for shape in shapes.values()),
        spent=sum(ranks[name] * sum(shape) for name, shape in shapes.items()),
    )
