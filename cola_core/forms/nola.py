"""NOLA, arXiv 2310.02556, section 3: A and B are sums of random matrices, of which only the coefficients are learned.

A = A_0 + (1/sqrt k) sum_i a_i E_i and B = B_0 + (1/sqrt k) sum_j b_j F_j, all entries of E_i and F_j from U(-1, 1). No
basis is kept: forward and backward draw them again, one at a time, from the layer's seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from cola_core.errors import UserError
from cola_core.seeds import derive

if TYPE_CHECKING:
    from cola_core.adapters import LoRA
    from cola_core.config.values import Parametrisation as Options

__all__ = ["connect", "excess", "expand", "factors", "prepare"]

# What one adapter may come to: numbers in its A and B together, and random numbers that one pass over them draws. A
# file of a few bytes could else ask for any memory and time. A Llama of 13 billion weights at rank 16 has 2^25.9
# numbers; 2^33 draws take most of a minute.
MOST_NUMBERS, MOST_DRAWS = 2**26, 2**33


@dataclass(frozen=True)
class Origin:
    """What does not train: A_0 (r x in), B_0 (out x r), and the seed of the layer's bases."""

    a: Tensor
    b: Tensor
    seed: int


def prepare(layer: LoRA, options: Options, seed: int) -> None:
    """The pair that the layer was given stays as A_0 and B_0; its A and B become coefficients, all 0, `bases` each."""
    layer.origin = Origin(layer.A.detach(), layer.B.detach(), seed)  # type: ignore[assignment]
    for part, given in (("A", layer.A), ("B", layer.B)):
        setattr(layer, part, Parameter(given.new_zeros(options.bases)))  # type: ignore[union-attr]


def connect(layers: Mapping[str, LoRA], options: Options) -> None:
    """Refuse, before the first step, a link whose file no reader would take.

    Raises:
        UserError: too many numbers in A and B, or too many to draw.
    """
    origins: list[Origin] = [layer.origin for layer in layers.values()]  # type: ignore[misc]
    sizes = ((len(o.a), len(o.b), o.a.shape[1]) for o in origins)
    if reason := excess(sizes, options.bases):  # type: ignore[union-attr]
        raise UserError(f"link.parametrisation 'nola': {reason}: lower allocate.rank or bases, or take fewer targets")


def factors(layer: LoRA) -> tuple[Tensor, Tensor]:
    """A (r x in) and B (out x r) as sums; gradients reach the coefficients alone."""
    origin: Origin = layer.origin  # type: ignore[assignment]
    return expand(origin.a, origin.b, layer.A, layer.B, origin.seed)


def expand(a_0: Tensor, b_0: Tensor, a: Tensor, b: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A and B from their coefficients.

    Args:
        a_0, b_0: the constant terms, r x in and out x r.
        a, b: coefficients, k each, of the terms' dtype.
        seed: of the layer; A's bases and B's are two streams.
    """
    return a_0 + _combine(a, derive(seed, "A"), a_0.shape), b_0 + _combine(b, derive(seed, "B"), b_0.shape)


def excess(sizes: Iterable[tuple[int, int, int]], bases: int) -> str | None:
    """What is too much about modules of these (r, out, in); None where nothing is."""
    numbers = sum(rank * (rows + columns) for rank, rows, columns in sizes)
    if numbers > MOST_NUMBERS:
        return f"A and B would have {numbers:,} numbers, more than {MOST_NUMBERS:,}"
    if numbers * bases > MOST_DRAWS:
        return f"{bases:,} bases draw {numbers * bases:,} numbers in every pass, more than {MOST_DRAWS:,}"
    return None


class _Combination(torch.autograd.Function):
    """(1/sqrt k) sum_i c_i E_i, and dL/dc_i = <dL/dA, E_i> / sqrt k. What is saved for backward is a seed and a shape.

    Bases are drawn on the CPU, and summed there term by term: a link's file means the same bits on every device and
    under any number of threads.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, seed: int, shape: torch.Size) -> Tensor:
        """coefficients: k -> a matrix of `shape`."""
        ctx.seed, ctx.shape, ctx.count = seed, shape, len(coefficients)
        total = torch.zeros(shape, dtype=coefficients.dtype)
        for coefficient, basis in zip(coefficients.tolist(), _bases(seed, ctx.count, total), strict=True):
            total += basis.mul_(coefficient)
        return total.div_(math.sqrt(ctx.count)).to(coefficients.device)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """gradient: of the sum -> of the coefficients, k."""
        whole = gradient.cpu()
        parts = [basis.mul_(whole).sum() for basis in _bases(ctx.seed, ctx.count, whole)]
        return torch.stack(parts).div_(math.sqrt(ctx.count)).to(gradient.device), None, None


def _combine(coefficients: Tensor, seed: int, shape: torch.Size) -> Tensor:
    result: Tensor = _Combination.apply(coefficients, seed, shape)  # type: ignore[no-untyped-call]
    return result


def _bases(seed: int, count: int, like: Tensor) -> Iterator[Tensor]:
    """`count` matrices of the shape and dtype of `like`, drawn as float32 whatever that dtype is."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.empty(like.shape, dtype=torch.float32).uniform_(-1, 1, generator=generator).to(like.dtype)
