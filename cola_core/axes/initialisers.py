"""Axis 'initialiser': the first A and B of a link."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cola_core.draws import DRAWN, draw_a
from cola_core.quantisation import Quantised, quantise
from cola_core.seeds import derive

if TYPE_CHECKING:
    from cola_core.adapters import Pair

__all__ = ["INITIALISERS", "First", "Start", "draw_a"]


@dataclass(frozen=True)
class Start:
    """What an initialiser may use for one module.

    weight: W, out x in, in the master dtype; rank: r; scale: s; directions: what the link's own profile kept of the
    module (see `cola_core.directions`; `sketch`: S = G A_max^T, out x rows); earlier: the pairs that the chain has
    merged into it; seed, link, module: its random stream; store: `link.quantise`; last: what the link just before
    trained, without what W gave up for it; None where it left the module alone.
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
    last: Pair | None = None

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


def kaiming(start: Start, options: Any) -> First:
    """Random A, B = 0: the new link changes nothing (LoRA; COLA, Algorithm 1)."""
    return First(*DRAWN["kaiming"](start.seed, start.link, start.module, start.rank, start.shape))


def random_b(start: Start, options: Any) -> First:
    """B ~ N(0, 1/r), A = 0: RAC-LoRA's left sketch, arXiv 2410.08305, Algorithm 1; the new link changes nothing.

    The paper leaves the variance to the step size; 1/r makes E ||B x||^2 = out/r ||x||^2 independent of the rank.
    """
    return First(*DRAWN["random_b"](start.seed, start.link, start.module, start.rank, start.shape))


def gaussian(start: Start, options: Any) -> First:
    """A and B from N(0, 0.02^2), for gates that are 0 (AdaLoRA, as in PEFT's code)."""
    generator = torch.Generator().manual_seed(derive(start.seed, start.link, "init", start.module))
    shapes = (start.rank, start.columns), (len(start.weight), start.rank)
    a, b = (0.02 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return First(a, b)


def identity(start: Start, options: Any) -> First:
    """A = I and B = 0 where in <= out, else B = I and A = 0: the other factor is the whole dW / s."""
    out, columns = start.shape
    zeros, eye = torch.zeros(out, columns, dtype=torch.float64), torch.eye(start.rank, dtype=torch.float64)
    return First(eye, zeros) if columns <= out else First(zeros, eye)


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


def lora_ga(start: Start, options: Any) -> First:
    """Singular vectors of G for A and others for B, and W gives up s B A (LoRA-GA, arXiv 2407.05000, section 3.2).

    paper: both orthonormal times out^(1/4) / sqrt(gamma), as the authors' code; peft: A stays orthonormal and B takes
    the gradient's singular values too, as PEFT 0.21 does.
    """
    left, values, right = (start.directions[name].double() for name in ("left", "values", "right"))
    of_a, of_b = (_within(which, len(values)) for which in DIRECTIONS[options.direction](start.rank))
    size = len(start.weight) ** 0.25 / math.sqrt(options.gamma)
    a, b = right[:, of_a].T, left[:, of_b]
    a, b = (a * size, b * size) if options.form == "paper" else (a, b * values[of_b] * size)
    return First(a.contiguous(), b.contiguous(), kept=True)


# Which singular vectors become A and which B: LoRA-GA's names, r -> (A's, B's) of the leading 2 r.
DIRECTIONS: dict[str, Callable[[int], tuple[range, range]]] = {
    "ArB2r": lambda r: (range(r), range(r, 2 * r)),
    "A2rBr": lambda r: (range(r, 2 * r), range(r)),
    "ArBr": lambda r: (range(1, 2 * r, 2), range(0, 2 * r, 2)),
}


def _within(which: range, count: int) -> list[int]:
    """A small matrix has fewer than 2 r singular vectors: then they are counted from the first again."""
    return [index % count for index in which] if which[-1] >= count else list(which)


def eva(start: Start, options: Any) -> First:
    """A = the inputs' leading principal axes, B = 0 (EVA, arXiv 2410.07170, section 3.2)."""
    a = start.directions["axes"][:, : start.rank].T.double()
    return First(a.contiguous(), torch.zeros(len(start.weight), start.rank, dtype=torch.float64))


def cora(start: Start, options: Any) -> First:
    """B = an orthonormal basis of what sister models have in common, A = 0 (CoRA, arXiv 2409.02119).

    The sisters are the chain's own earlier links, or models of the user's. A random orthonormal basis completes what
    they do not span: all of it in a chain's first link.
    """
    common = start.directions.get("common") if options.sisters == "given" else _span(start.earlier)
    generator = torch.Generator().manual_seed(derive(start.seed, start.link, "init", start.module))
    drawn = torch.randn(len(start.weight), start.rank, generator=generator, dtype=torch.float64)
    parts = [drawn] if common is None else [common.double(), drawn]
    b = torch.linalg.qr(torch.cat(parts, dim=1)).Q[:, : start.rank]
    return First(torch.zeros(start.rank, start.columns, dtype=torch.float64), b.contiguous())


def _span(pairs: Sequence[Pair]) -> Tensor | None:
    """Left singular vectors of [dW_1 ... dW_n], out x k, from the factors alone: with A^T = Q R, B A = (B R^T) Q^T."""
    if not pairs:
        return None
    cores = [p.scale * p.b.double() @ torch.linalg.qr(p.a.double().T).R.T for p in pairs]
    left, values, _ = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    spanned: Tensor = left[:, values > values[0] * 1e-9]
    return spanned


def momentum(start: Start, options: Any) -> First:
    """A share of the last link's update stays in the pair: sqrt(m) A and sqrt(m) B, and W gives up m dW.

    PeriodicLoRA's partial unloading (arXiv 2402.16141), by the rule of a third party's port: the function goes on
    unchanged. The first link, and ranks that the last link did not have, start as LoRA does.
    """
    first = kaiming(start, options)
    if start.last:
        last, root = start.last, math.sqrt(options.momentum)
        rank = min(start.rank, last.rank)
        first.a[:rank] = root * last.a[:rank].double()
        first.b[:, :rank] = root * last.scale / start.scale * last.b[:, :rank].double()
    return First(first.a, first.b, kept=bool(first.b.any()))


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


INITIALISERS: dict[str, Initialiser] = {
    "kaiming": kaiming,
    "random_b": random_b,
    "gaussian": gaussian,
    "identity": identity,
    "gora": gora,
    "lora_ga": lora_ga,
    "eva": eva,
    "cora": cora,
    "momentum": momentum,
    "loftq": loftq,
}
