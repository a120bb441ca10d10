"""The random parts of a link's first A and B, which its seed alone decides and brings back."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cola_core.seeds import derive

__all__ = ["DRAWN", "draw_a", "random_a", "random_b"]


def draw_a(seed: int, link: int, module: str, rows: int, columns: int) -> Tensor:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), rows x in, float64: kaiming_uniform(a = sqrt 5), as in LoRA and GoRA.

    The probe draws all rows of A_max for its sketch and the initialiser the first r of them: same stream, same values.
    """
    bound = 1 / math.sqrt(columns)
    return torch.rand(rows, columns, generator=_stream(seed, link, module), dtype=torch.float64) * (2 * bound) - bound


def random_a(seed: int, link: int, module: str, rank: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Random A and B = 0 for a module of `shape` (out, in), float64."""
    a = draw_a(seed, link, module, rank, shape[1])
    return a, torch.zeros(shape[0], rank, dtype=torch.float64)


def random_b(seed: int, link: int, module: str, rank: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A = 0 and B ~ N(0, 1/r) for a module of `shape` (out, in), float64."""
    b = torch.randn(shape[0], rank, generator=_stream(seed, link, module), dtype=torch.float64)
    return torch.zeros(rank, shape[1], dtype=torch.float64), b / math.sqrt(rank)


# The initialisers of which nothing need be kept: seed, link, module, r, (out, in) -> A, B.
DRAWN: dict[str, Callable[[int, int, str, int, tuple[int, int]], tuple[Tensor, Tensor]]]
DRAWN = {"kaiming": random_a, "random_b": random_b}


def _stream(seed: int, link: int, module: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, link, "init", module))
