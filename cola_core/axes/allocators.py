"""Axis 'allocator': the rank of every module."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cola_core.config.recipe import AllocateConfig
from cola_core.config.values import LayerSubset
from cola_core.errors import UserError
from cola_core.seeds import derive

__all__ = ["ALLOCATORS", "Allocation", "Question", "allocate"]

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Question:
    """What an allocator may use.

    shapes: module -> (out, in); found: module -> what the profile found of it (`importance` of a gradient probe,
    `variance` of the inputs' principal axes), empty without one; seed, link: its random stream.
    """

    shapes: Shapes
    found: Mapping[str, Mapping[str, Any]]
    config: AllocateConfig
    seed: int
    link: int


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


@dataclass(frozen=True)
class Allocator:
    """wanted: module -> rank before bounds; bounds: the smallest and largest rank a module may get."""

    wanted: Callable[[Question], dict[str, float]]
    bounds: Callable[[AllocateConfig], tuple[float, float]]


# How a module's size enters GoRA's budget. The paper takes sqrt(in + out) and rounds; the code its authors
# released takes in + out and divides the rounded share by it with floor.
FEATURES: dict[str, tuple[Callable[[int], float], Callable[[float, float], float]]] = {
    "sqrt": (math.sqrt, lambda share, size: round(share / size)),
    "linear": (float, lambda share, size: round(share) // size),
}
BLOCK = re.compile(r"^.*?\.\d+(?=\.)")  # a module's block, as its name begins


def uniform(asked: Question) -> dict[str, float]:
    """The same rank everywhere (LoRA)."""
    return dict.fromkeys(asked.shapes, asked.config.rank)


def full(asked: Question) -> dict[str, float]:
    """The smaller side of every weight: B A reaches every matrix of its shape (full fine-tuning)."""
    return {name: min(shape) for name, shape in asked.shapes.items()}


def gora(asked: Question) -> dict[str, float]:
    """GoRA, section 3: r_i = clip(round(b a_i / f_i), r_min, r_max), b = sum_j r_ref f_j, a_i = I_i / sum_j I_j."""
    size, divide = FEATURES[asked.config.features]
    features = {name: size(sum(shape)) for name, shape in asked.shapes.items()}
    budget = sum(asked.config.rank * f for f in features.values())
    return {name: divide(budget * a, features[name]) for name, a in advantage(importance(asked.found)).items()}


def layer_subset(asked: Question) -> dict[str, float]:
    """The reference rank in a few blocks, drawn for every link; 0 elsewhere (XGBLoRA's column subsampling, section 3).

    Raises:
        UserError: more blocks are asked for than the targets have.
    """
    assert isinstance(asked.config.allocator, LayerSubset), "this function's own value"
    blocks = {name: found.group() if (found := BLOCK.match(name)) else name for name in asked.shapes}
    drawn = sorted(set(blocks.values()), key=lambda block: derive(asked.seed, asked.link, "blocks", block))
    if asked.config.allocator.blocks > len(drawn):
        raise UserError(f"params.yaml: allocate.allocator.blocks: the targets have {len(drawn)}; allowed: 1 to that")
    chosen = drawn[: asked.config.allocator.blocks]
    return {name: asked.config.rank * (block in chosen) for name, block in blocks.items()}


def eva(asked: Question) -> dict[str, float]:
    """As many principal axes as the uniform rank has, those of the largest shares of their module's variance.

    EVA, arXiv 2410.07170, section 3.3; `r_max` bounds a module (PEFT's rho times its rank), and `r_min` may be 0 there.
    """
    shares = [(share, name) for name, found in asked.found.items() for share in found["variance"][: asked.config.r_max]]
    best = sorted(shares, key=lambda pair: -pair[0])[: asked.config.rank * len(asked.shapes)]
    return {name: sum(1 for _, owner in best if owner == name) for name in asked.shapes}


ALLOCATORS: dict[str, Allocator] = {
    "uniform": Allocator(uniform, lambda config: (1, math.inf)),
    "full": Allocator(full, lambda config: (1, math.inf)),
    "gora": Allocator(gora, lambda config: (config.r_min, config.r_max)),
    "layer_subset": Allocator(layer_subset, lambda config: (0, math.inf)),
    "eva": Allocator(eva, lambda config: (0, config.r_max)),
}


def importance(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """I of every module, empty where no gradient was taken."""
    return {name: numbers["importance"] for name, numbers in found.items() if "importance" in numbers}


def advantage(importance: Mapping[str, float]) -> dict[str, float]:
    """a_i = I_i / sum_j I_j; equal shares where every importance is zero."""
    total = sum(importance.values())
    return {name: value / total if total else 1 / len(importance) for name, value in importance.items()}


def allocate(asked: Question) -> Allocation:
    """Ask the allocator of the recipe for ranks and bound them; they are not renormalised after it (GoRA, section 3).

    Raises:
        UserError: what the allocator cannot give this model.
    """
    shapes, allocator = asked.shapes, ALLOCATORS[asked.config.allocator.kind]
    wanted, bounds, known = allocator.wanted(asked), allocator.bounds(asked.config), importance(asked.found)
    ranks, clamped = {}, {}
    for name, shape in shapes.items():
        low, high = min(bounds[0], *shape), min(bounds[1], *shape)
        ranks[name] = int(min(max(wanted[name], low), high))
        if ranks[name] != wanted[name]:
            clamped[name] = "r_min" if wanted[name] < low else "r_max"
    return Allocation(
        ranks=ranks,
        importance=known,
        advantage=advantage(known),
        clamped=clamped,
        budget=sum(asked.config.rank * sum(shape) for shape in shapes.values()),
        spent=sum(ranks[name] * sum(shape) for name, shape in shapes.items()),
    )
