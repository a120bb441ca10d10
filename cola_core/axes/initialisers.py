"""Axis 'initialiser': the first A and B of a link."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cola_core.draws import DRAWN, draw_a

if TYPE_CHECKING:
    from cola_core.adapters import Pair

__all__ = ["INITIALISERS", "First", "Start", "draw_a"]


@dataclass(frozen=True)
class Start:
    """What an initialiser may use for one module.

    weight: W, out x in, in the master dtype; rank: r; scale: s; directions: what the link's own profile kept of the
    module (`sketch`: S = G A_max^T, out x rows); earlier: the pairs that the chain has merged into it; seed, link,
    module: its random stream.
    """

    weight: Tensor
    rank: int
    scale: float
    directions: Mapping[str, Tensor]
    earlier: Sequence[Pair]
    seed: int
    link: int
    module: str

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def columns(self) -> int:
        """in."""
        return self.weight.shape[1]


@dataclass(frozen=True)
class First:
    """The first A (r x in) and B (out x r), float64.

    kept: whether the frozen weights give up s B A, so that the link starts from the function it was given.
    """

    a: Tensor
    b: Tensor
    kept: bool = False


Initialiser = Callable[[Start, Any], First]


def kaiming(start: Start, options: Any) -> First:
    """Random A, B = 0: the new link changes nothing (LoRA; COLA, Algorithm 1)."""
    return First(*DRAWN["kaiming"](start.seed, start.link, start.module, start.rank, start.shape))


def random_b(start: Start, options: Any) -> First:
    """B ~ N(0, 1/r), A = 0: RAC-LoRA's left sketch, arXiv 2410.08305, Algorithm 1; the new link changes nothing.

    The paper leaves the variance to the step size; 1/r makes E ||B x||^2 = out/r ||x||^2 independent of the rank.
    """
    return First(*DRAWN["random_b"](start.seed, start.link, start.module, start.rank, start.shape))


def gora(start: Start, options: Any) -> First:
    """Random A, B = -xi G A^T (A A^T)^-1 (GoRA, section 3): s B A = -gamma sqrt(in/r) G P_A, a step down the gradient.

    Only the sketch S = G A_max^T is needed: G A^T is its first r columns. xi = gamma sqrt(in/r) / s, which is the
    paper's gamma sqrt(in) / alpha where s = alpha / sqrt(r). Computed in float64.
    """
    sketch = start.directions["sketch"]
    assert sketch.shape[1] >= start.rank, "refused by the configuration: B would follow fewer rows than asked for"
    a = draw_a(start.seed, start.link, start.module, sketch.shape[1], start.columns)[: start.rank]
    xi = options.gamma * math.sqrt(start.columns / start.rank) / start.scale
    g_at = sketch[:, : start.rank].double()
    return First(a, -xi * torch.linalg.solve(a @ a.T, g_at, left=False))


INITIALISERS: dict[str, Initialiser] = {"kaiming": kaiming, "random_b": random_b, "gora": gora}
