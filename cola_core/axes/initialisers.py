"""Axis 'initialiser': the first A and B of a link."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cola_core.quantisation import Quantised, quantise
from cola_core.seeds import derive

if TYPE_CHECKING:
    from cola_core.adapters import Pair

__all__ = ["INITIALISERS", "First", "Start", "draw_a"]


@dataclass(frozen=True)
class Start:
    """What an initialiser may use for one module.

    weight: W, out x in, in the master dtype; rank: r; scale: s; directions: what the link's own profile kept of the
    module (`sketch`: S = G A_max^T, out x rows); earlier: the pairs that the chain has merged into it; seed, link,
    module: its random stream; store: `link.quantise`.
    """

    weight: Tensor
    rank: int
    scale: float
    directions: Mapping[str, Tensor]
    earlier: Sequence[Pair]
    seed: int
    link: int
    module: str
    store: str = "none"

    @property
    def columns(self) -> int:
        """in."""
        return self.weight.shape[1]


@dataclass(frozen=True)
class First:
    """The first A (r x in) and B (out x r), float64.

    kept: whether the frozen weights give up s B A, so that the link starts from the function it was given;
    base: the quantised W, where the initialiser chose it together with the pair;
    error: ||W - start|| / ||W||, what quantising takes from the weights that the link starts from.
    """

    a: Tensor
    b: Tensor
    kept: bool = False
    base: Quantised | None = None
    error: float = 0.0


Initialiser = Callable[[Start, Any], First]


def draw_a(seed: int, link: int, module: str, rows: int, columns: int) -> Tensor:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), rows x in, float64: kaiming_uniform(a = sqrt 5), as in LoRA and GoRA.

    The probe draws all rows of A_max for its sketch and the initialiser the first r of them: same stream, same values.
    """
    generator = torch.Generator().manual_seed(derive(seed, link, "init", module))
    bound = 1 / math.sqrt(columns)
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64) * (2 * bound) - bound


def kaiming(start: Start, options: Any) -> First:
    """Random A, B = 0: the new link changes nothing (LoRA; COLA, Algorithm 1)."""
    a = draw_a(start.seed, start.link, start.module, start.rank, start.columns)
    return First(a, torch.zeros(len(start.weight), start.rank, dtype=torch.float64))


def random_b(start: Start, options: Any) -> First:
    """B ~ N(0, 1/r), A = 0: RAC-LoRA's left sketch, arXiv 2410.08305, Algorithm 1; the new link changes nothing.

    The paper leaves the variance to the step size; 1/r makes E ||B x||^2 = out/r ||x||^2 independent of the rank.
    """
    generator = torch.Generator().manual_seed(derive(start.seed, start.link, "init", start.module))
    b = torch.randn(len(start.weight), start.rank, generator=generator, dtype=torch.float64)
    return First(torch.zeros(start.rank, start.columns, dtype=torch.float64), b / math.sqrt(start.rank))


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


def loftq(start: Start, options: Any) -> First:
    """Q and a pair with Q + s B A near W (LoftQ, arXiv 2310.08659, Algorithm 1), out x in, float64.

    T times: Q = quantise(W - L), L = the best approximation of W - Q of rank r, L = 0 before the first. The paper has
    B = U S^1/2, A = S^1/2 V^T and needs s = 1; here each is divided by sqrt(s), so that s B A = L for every s.
    """
    weight = start.weight.double()
    low = torch.zeros_like(weight)
    for _ in range(options.iterations):
        base = quantise(weight - low, start.store)
        b, a = leading(weight - base.dense().double(), start.rank)
        low = b @ a
    root = math.sqrt(start.scale)
    return First(a / root, b / root, base=base)


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B = U S^1/2 (out x r) and A = S^1/2 V^T (r x in) of the r largest singular values.

    By the eigenvectors of the smaller Gram matrix, two to three times faster than all singular vectors. B A is the
    matrix's projection on them, so what squaring costs them moves the error in second order alone.
    """
    if len(matrix) > matrix.shape[1]:
        a, b = leading(matrix.T, rank)
        return b.T, a.T
    basis = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)
    core = basis.T @ matrix  # S V^T
    root = core.norm(dim=1).sqrt()
    return basis * root, core / root.clamp_min(torch.finfo(root.dtype).tiny)[:, None]


INITIALISERS: dict[str, Initialiser] = {"kaiming": kaiming, "random_b": random_b, "gora": gora, "loftq": loftq}
