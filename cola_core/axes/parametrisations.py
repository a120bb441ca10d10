"""Axis 'parametrisation': what a layer's A and B are made of, which parts train, and the scale; dW = s B A."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from cola_core.forms import gates, nola, shortcuts

if TYPE_CHECKING:
    from cola_core.adapters import LoRA
    from cola_core.config.values import Parametrisation as Options

__all__ = ["PARAMETRISATIONS", "SCALES", "Form"]

# alpha, r -> s. LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732: the only scale under which activations
# stay of order one as r grows (RoRA, arXiv 2501.04315, is the same).
SCALES: dict[str, Callable[[float, int], float]] = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
    "unit": lambda alpha, rank: 1.0,
}


@dataclass(frozen=True)
class Form:
    """One way to make A and B.

    prepare: gives a new layer the parts it has beside A and B, and freezes what does not train; its last argument is
        the seed of the layer's own random stream;
    factors: A (r x in) and B (out x r) as the forward pass takes them;
    connect: tells the layers of one link of each other, by name, once all are prepared;
    low: r numbers per token, A x unless the form says otherwise;
    merged: A and B that stand for the layer when it is merged, None for `factors`; exact: whether they compute what
        the layer does;
    settle: what follows a step that was taken;
    stored: what the link's file holds of the layer's A and B, where the rest can be drawn again.
    """

    prepare: Callable[[LoRA, Options, int], None]
    factors: Callable[[LoRA], tuple[Tensor, Tensor]]
    connect: Callable[[Mapping[str, LoRA], Options], None] = lambda layers, options: None
    low: Callable[[LoRA, Tensor, Tensor], Tensor] = lambda layer, x, a: functional.linear(layer.dropout(x), a)
    merged: Callable[[LoRA], tuple[Tensor, Tensor]] | None = None
    exact: bool = True
    settle: Callable[[LoRA], None] = lambda layer: None
    stored: Callable[[LoRA], tuple[Tensor, Tensor]] | None = None


def own(layer: LoRA) -> tuple[Tensor, Tensor]:
    """The layer's A and B as they are."""
    return layer.A, layer.B


def nothing(layer: LoRA, options: Options, seed: int) -> None:
    """A and B train, and nothing else."""


def freeze_a(layer: LoRA, options: Options, seed: int) -> None:
    """FFA-LoRA, arXiv 2403.12313, section 3; RAC-LoRA, arXiv 2410.08305, with a right sketch: B alone trains."""
    layer.A.requires_grad_(False)


def freeze_b(layer: LoRA, options: Options, seed: int) -> None:
    """RAC-LoRA with a left sketch: A alone trains."""
    layer.B.requires_grad_(False)


def freeze_identity(layer: LoRA, options: Options, seed: int) -> None:
    """The factor on the smaller side is the identity; the other is the whole dW / s, as full fine-tuning trains it."""
    (layer.A if layer.A.shape[1] <= len(layer.B) else layer.B).requires_grad_(False)


def whole_input(layer: LoRA, x: Tensor, a: Tensor) -> Tensor:
    """x itself where A is the identity."""
    return layer.dropout(x) if layer.B.requires_grad else functional.linear(layer.dropout(x), a)


# What a layer has read of earlier blocks stands for no matrix, so the merge is only near.
inexact = partial(Form, shortcuts.remember, own, shortcuts.connect, exact=False, settle=shortcuts.settle)

PARAMETRISATIONS = {
    "plain": Form(nothing, own),
    "frozen_a": Form(freeze_a, own),
    "frozen_b": Form(freeze_b, own),
    "dense": Form(freeze_identity, own, low=whole_input),
    "gated": Form(gates.start_gates, gates.gated, merged=gates.open_ranks),
    "softmax_gated": Form(gates.start_scores, gates.softmax_gated),
    "res_is": inexact(low=shortcuts.input_low, merged=shortcuts.by_inputs),
    "res_bs": Form(nothing, shortcuts.block_factors, shortcuts.connect),
    "res_ms": inexact(low=shortcuts.middle_low, merged=shortcuts.by_inputs),
    "res_ms_weights": inexact(low=shortcuts.middle_low, merged=shortcuts.by_weights),
    "nola": Form(nola.prepare, nola.factors, nola.connect, stored=own),
}
