"""Axis 'base store': how the frozen weights are kept, and how exact a knot can be in that form (laws 2 and 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["BASES", "BaseStore"]


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
