"""A gate for every rank: y = W x + s B diag(g) A x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cola_core.adapters import LoRA

__all__ = ["gated", "open_ranks", "softmax_gated", "softmax_gates", "start_gates", "start_scores"]


def start_gates(layer: LoRA, options: Any, seed: int) -> None:
    """g, r: ones; zeros (AdaLoRA, arXiv 2303.10512); or N(0, 1) as SoRA's code draws it (arXiv 2311.11696)."""
    generator, rank = torch.Generator().manual_seed(seed), layer.A.shape[0]
    drawn = torch.randn(rank, generator=generator, dtype=torch.float64)
    layer.gate = nn.Parameter(
        {"one": torch.ones(rank), "zero": torch.zeros(rank), "normal": drawn}[options.start].to(layer.A)
    )


def gated(layer: LoRA) -> tuple[Tensor, Tensor]:
    """diag(g) A and B."""
    return layer.gate[:, None] * layer.A, layer.B


def open_ranks(layer: LoRA) -> tuple[Tensor, Tensor]:
    """The same without the ranks whose gate is 0: g is folded into A."""
    alive = layer.gate != 0
    return layer.gate[alive, None] * layer.A[alive], layer.B[:, alive]


def start_scores(layer: LoRA, options: Any, seed: int) -> None:
    """Scores of 0 give gates of 1: BeamLoRA starts as LoRA does (arXiv 2502.13604, section 3)."""
    layer.score = nn.Parameter(torch.zeros_like(layer.A[:, 0]))
    layer.temperature = options.temperature


def softmax_gates(layer: LoRA) -> Tensor:
    """r softmax(score / temperature), r."""
    return len(layer.score) * torch.softmax(layer.score / layer.temperature, dim=0)


def softmax_gated(layer: LoRA) -> tuple[Tensor, Tensor]:
    """diag(r softmax(score / temperature)) A and B."""
    return softmax_gates(layer)[:, None] * layer.A, layer.B
