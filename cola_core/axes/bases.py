"""Axis 'base store': how the frozen weights are kept, and how exact a knot can be in that form (laws 2 and 5)."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch

__all__ = ["BASES", "QUANTISERS", "BaseStore", "Quantiser"]


@dataclass(frozen=True)
class BaseStore:
    """One way to keep the frozen weights.

    master: dtype in which files are read and links are added; compute: dtype of the forward pass, cast to once.
    tolerance: largest change of a logit at a knot, relative to max(1, |logit|max), before the run is stopped.
    """

    master: torch.dtype
    compute: torch.dtype
    tolerance: float

    @property
    def adapter(self) -> torch.dtype:
        """dtype of A, B and the optimizer's state."""
        return self.master


BASES = {
    "fp32": BaseStore(torch.float32, torch.float32, 1e-5),
    "bf16": BaseStore(torch.float32, torch.bfloat16, 0.1),
    "fp64": BaseStore(torch.float64, torch.float64, 1e-10),
}


@dataclass(frozen=True)
class Quantiser:
    """What stands for the weights of a block while a link trains.

    levels: 2^bits, ascending; affine: a block keeps its least and its largest weight, and levels from 0 to 1 lie
    between them; else it keeps its absmax, which levels from -1 to 1 are multiplied by.
    """

    levels: tuple[float, ...]
    affine: bool

    @property
    def bits(self) -> int:
        """Of one code."""
        return len(self.levels).bit_length() - 1


def normal_levels(bits: int) -> tuple[float, ...]:
    """NormalFloat, QLoRA, arXiv 2305.14314, section 3: quantiles of N(0, 1), scaled to [-1, 1], one of them 0.

    The paper's quantiles have no 0 and no end; its released code, which LoftQ's follows for 2 bits, takes 2^(bits-1)
    probabilities from 0.9677083 down to 1/2 for the levels above 0 and one less below. With these probabilities in
    float32 the 16 levels are the published ones, bit for bit.
    """
    half = 2 ** (bits - 1)
    above, below = (_upper_quantiles(count) for count in (half, half - 1))
    values = torch.tensor([-x for x in below] + [0.0] + above[::-1], dtype=torch.float32)
    return tuple((values / values.max()).tolist())


def _upper_quantiles(count: int) -> list[float]:
    """Quantiles of N(0, 1), descending, at `count` probabilities from 0.9677083 towards 1/2, which is left out."""
    first = float(torch.tensor(0.9677083))
    chances = torch.tensor([first + (0.5 - first) * i / count for i in range(count)], dtype=torch.float32)
    return [NormalDist().inv_cdf(chance) for chance in chances.tolist()]


# `link.quantise`; `none` keeps the weights of BASES.
QUANTISERS = {
    "nf4": Quantiser(normal_levels(4), affine=False),
    "nf2": Quantiser(normal_levels(2), affine=False),
    "uniform4": Quantiser(tuple(i / 15 for i in range(16)), affine=True),
    "uniform2": Quantiser(tuple(i / 3 for i in range(4)), affine=True),
}
