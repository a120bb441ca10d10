"""ResLoRA, arXiv 2402.18039, section 3: shortcuts between the layers of one kind in blocks that follow each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from cola_core.adapters import LoRA

__all__ = ["block_factors", "by_inputs", "by_weights", "connect", "input_low", "middle_low", "remember", "settle"]

WINDOW = 100  # training micro-batches whose inputs' sizes are remembered


def connect(layers: Mapping[str, LoRA], options: Any) -> None:
    """Tell every layer of those before it: of its own name but for the block's number, of its own shape, nearest first.

    The first block has none before it; the authors' code lets it read its own input twice, which we do not.
    """

    def kind(name: str) -> tuple[str, torch.Size, torch.Size]:
        return re.sub(r"\d+", "*", name), layers[name].A.shape[1:], layers[name].B.shape[:1]

    def blocks(name: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", name)]

    for _, names in groupby(sorted(layers, key=lambda name: (kind(name), blocks(name))), key=kind):
        stack: list[LoRA] = []
        for name in names:
            layers[name].previous = stack[::-1][: getattr(options, "previous", 1)]
            stack.append(layers[name])


def remember(layer: LoRA, options: Any, seed: int) -> None:
    """Ratios of earlier inputs' sizes to the layer's own, of the last WINDOW micro-batches, are part of its state."""
    layer.register_buffer("ratios", torch.zeros(WINDOW, dtype=torch.float64))
    layer.register_buffer("batches", torch.zeros((), dtype=torch.long))
    layer.fresh = []


def settle(layer: LoRA) -> None:
    """The ratios of a step that was taken are remembered; those of one that is stopped and repeated are not (law 7)."""
    for ratio in layer.fresh:
        layer.ratios[layer.batches % WINDOW] = ratio
        layer.batches += 1
    layer.fresh.clear()


def block_factors(layer: LoRA) -> tuple[Tensor, Tensor]:
    """bs: y_n = W_n x + s sum_k B_(n-k) A_(n-k) x is one pair of all their ranks: the merge is exact."""
    stack = [layer, *layer.previous]
    return torch.cat([other.A for other in stack]), torch.cat([other.B for other in stack], dim=1)


def input_low(layer: LoRA, x: Tensor, a: Tensor) -> Tensor:
    """is: A_n (x_n + x_(n-1))."""
    return functional.linear(layer.dropout(sum(_inputs(layer, x), start=x)), a)


def middle_low(layer: LoRA, x: Tensor, a: Tensor) -> Tensor:
    """ms: A_n x_n + sum_k A_(n-k) x_(n-k)."""
    low = functional.linear(layer.dropout(x), a)
    for other, seen in zip(layer.previous, _inputs(layer, x), strict=True):
        low = low + functional.linear(layer.dropout(seen), other.A.to(seen.dtype))
    return low


def by_inputs(layer: LoRA) -> tuple[Tensor, Tensor]:
    """A and (1 + alpha) B stand for is and ms once there is one matrix; alpha: mean of sum_k ||x_(n-k)|| / ||x_n||."""
    count = int(layer.batches.clamp(max=WINDOW))
    return layer.A, (1 + float(layer.ratios[:count].mean()) if count else 1.0) * layer.B


def by_weights(layer: LoRA) -> tuple[Tensor, Tensor]:
    """A and (1 + alpha) B stand for ms, alpha = sum_k ||A_(n-k)|| / ||A_n||."""
    sizes = sum(float(other.A.norm()) for other in layer.previous)
    return layer.A, (1 + sizes / max(float(layer.A.norm()), 1e-30)) * layer.B


def _inputs(layer: LoRA, x: Tensor) -> list[Tensor]:
    """What the layers before have read in this forward pass, nearest first."""
    layer.seen = x
    earlier = [other.seen for other in layer.previous]
    if earlier and torch.is_grad_enabled():
        with torch.no_grad():
            layer.fresh.append(sum(float(seen.norm()) for seen in earlier) / max(float(x.norm()), 1e-30))
    return earlier
