"""Axis 'initialiser': the first A and B of a link."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_core.seeds import derive

__all__ = ["INITIALISERS", "Start", "draw_a"]


@dataclass(frozen=True)
class Start:
    """What an initialiser may use for one module.

    shape: (out, in) of W; rank: r; scale: s of the parametrisation; gamma: size of GoRA's first step;
    sketch: S = G A_max^T, out x rows, of the link's own probe (None without one); seed, link, module: its stream.
    """

    shape: tuple[int, int]
    rank: int
    scale: float
    gamma: float
    sketch: Tensor | None
    seed: int
    link: int
    module: str


def draw_a(seed: int, link: int, module: str, rows: int, columns: int) -> Tensor:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), rows x in, float64: kaiming_uniform(a = sqrt 5), as in LoRA and GoRA.

    The probe draws all rows of A_max for its sketch and the initialiser the first r of them: same stream, same values.
    """
    generator = torch.Generator().manual_seed(derive(seed, link, "init", module))
    bound = 1 / math.sqrt(columns)
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64) * (2 * bound) - bound


def kaiming(start: Start) -> tuple[Tensor, Tensor]:
    """Random A (r x in), B = 0 (out x r): the new link changes nothing (LoRA; COLA, Algorithm 1)."""
    out, columns = start.shape
    a = draw_a(start.seed, start.link, start.module, start.rank, columns)
    return a, torch.zeros(out, start.rank, dtype=torch.float64)


def gora(start: Start) -> tuple[Tensor, Tensor]:
    """Random A, B = -xi G A^T (A A^T)^-1 (GoRA, section 3): s B A = -gamma sqrt(in/r) G P_A, a step down the gradient.

    Only the sketch S = G A_max^T is needed: G A^T is its first r columns. xi = gamma sqrt(in/r) / s, which is the
    paper's gamma sqrt(in) / alpha where s = alpha / sqrt(r). Computed in float64.
    """
    assert start.sketch is not None, "refused by the configuration without a probe"
    assert start.sketch.shape[1] >= start.rank, "refused by the configuration: B would follow fewer rows than asked for"
    columns = start.shape[1]
    a = draw_a(start.seed, start.link, start.module, start.sketch.shape[1], columns)[: start.rank]
    xi = start.gamma * math.sqrt(columns / start.rank) / start.scale
    g_at = start.sketch[:, : start.rank].double()
    return a, -xi * torch.linalg.solve(a @ a.T, g_at, left=False)


INITIALISERS: dict[str, Callable[[Start], tuple[Tensor, Tensor]]] = {"kaiming": kaiming, "gora": gora}
