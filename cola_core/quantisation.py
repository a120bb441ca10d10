"""Quantised weights: packed codes and one scale per block, dequantised inside forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cola_core.axes.bases import QUANTISERS
from cola_core.models import keeps_transposed

__all__ = ["Quantised", "QuantisedLinear", "quantise", "restore", "sizes"]

BLOCK = 64  # weights that share a scale, along a row of W: QLoRA, section 3, and LoftQ


@dataclass(frozen=True)
class Quantised:
    """One quantised W.

    codes: uint8, 2 or 4 codes a byte, the first in the lowest bits, for whole blocks of W's rows laid end to end;
    scales: float32, blocks x 1 (absmax) or blocks x 2 (least, largest); shape: (out, in); kind: of QUANTISERS.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    kind: str

    def dense(self) -> Tensor:
        """W as the codes tell it, out x in, float32."""
        values = functional.embedding(self.codes.int(), _bytes(self.kind).to(self.codes.device)).view(-1, BLOCK)
        if QUANTISERS[self.kind].affine:
            values = torch.lerp(self.scales[:, :1], self.scales[:, 1:], values)  # both ends exact
        else:
            values = values * self.scales
        return values.view(-1)[: self.shape[0] * self.shape[1]].view(self.shape)


def quantise(weight: Tensor, kind: str) -> Quantised:
    """Round every weight to the nearest level of its block.

    Args:
        weight: W, out x in, of any floating dtype; the scales are kept in float32 whatever it is.
        kind: of QUANTISERS.
    """
    quantiser, flat = QUANTISERS[kind], weight.detach().reshape(-1)
    # The last weight fills the last block up: it changes no scale.
    blocks = torch.cat([flat, flat[-1:].expand(-len(flat) % BLOCK)]).view(-1, BLOCK)
    if quantiser.affine:
        scales = torch.cat([blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)], dim=1).float()
        low, span = scales[:, :1].to(flat), (scales[:, 1:] - scales[:, :1]).to(flat)
    else:
        scales = blocks.abs().amax(1, keepdim=True).float()
        low, span = torch.zeros_like(scales).to(flat), scales.to(flat)
    levels = torch.tensor(quantiser.levels, dtype=flat.dtype, device=flat.device)
    places = ((blocks - low) / span).nan_to_num(0.0)  # 0 / 0: a block of equal weights, of which every code is right
    codes = torch.bucketize(places, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    rows, columns = weight.shape
    return Quantised(pack(codes.view(-1).to(torch.uint8), quantiser.bits), scales, (rows, columns), kind)


def pack(codes: Tensor, bits: int) -> Tensor:
    """8 / bits codes a byte, the first in the lowest bits, as in LoftQ's released code; their number fills bytes."""
    parts = codes.view(-1, 8 // bits)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (parts << shifts).sum(1, dtype=torch.uint8)


def sizes(shape: tuple[int, int], kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and the scales of a W of `shape`."""
    quantiser, blocks = QUANTISERS[kind], -(-shape[0] * shape[1] // BLOCK)
    return (blocks * BLOCK * quantiser.bits // 8,), (blocks, 1 + quantiser.affine)


@cache
def _bytes(kind: str) -> Tensor:
    """256 x codes in a byte: the levels that each byte stands for, float32."""
    quantiser = QUANTISERS[kind]
    codes = torch.arange(256)[:, None] >> torch.arange(0, 8, quantiser.bits) & len(quantiser.levels) - 1
    return torch.tensor(quantiser.levels, dtype=torch.float32)[codes]


class Product(torch.autograd.Function):
    """x W^T with W frozen: only dX, and between forward and backward nothing but codes and scales is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Quantised) -> Tensor:
        """x: ... x in -> ... x out, in x's dtype."""
        ctx.save_for_backward(held.codes, held.scales)
        ctx.shape, ctx.kind = held.shape, held.kind
        return functional.linear(x, held.dense().to(x.dtype))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """dy: ... x out -> dX = dY W, ... x in."""
        codes, scales = ctx.saved_tensors
        held = Quantised(codes, scales, ctx.shape, ctx.kind)
        return dy @ held.dense().to(dy.dtype), None


class QuantisedLinear(nn.Module):
    """What stands for an nn.Linear or a Conv1D while its W is quantised; its bias is the base's own."""

    codes: Tensor
    scales: Tensor
    like: Tensor
    bias: nn.Parameter | None

    def __init__(self, base: nn.Module, held: Quantised) -> None:
        super().__init__()
        weight: Tensor = base.weight  # type: ignore[assignment]
        self.shape, self.kind, self.transposed = held.shape, held.kind, keeps_transposed(base)
        self.register_buffer("codes", held.codes.to(weight.device))
        self.register_buffer("scales", held.scales.to(weight.device))
        self.register_buffer("like", weight.new_empty(0), persistent=False)  # the base's dtype, which casts may change
        self.register_parameter("bias", base.bias)  # type: ignore[arg-type]

    @property
    def held(self) -> Quantised:
        """What the module keeps."""
        return Quantised(self.codes, self.scales, self.shape, self.kind)

    @property
    def weight(self) -> Tensor:
        """W as the codes tell it, dequantised at every call; laid out and typed as the base's."""
        dense = self.held.dense().to(self.like.dtype)
        return dense.T if self.transposed else dense

    def forward(self, x: Tensor) -> Tensor:
        """x: ... x in -> ... x out."""
        y: Tensor = Product.apply(x, self.held)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """Scales move with the module and are never cast."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.like.device)
        return self


def restore(module: nn.Module, held: Quantised) -> None:
    """W <- what `held` tells, in place, in the weight's master dtype: what a link over a quantised store was on."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    with torch.no_grad():
        dense = held.dense()
        weight.copy_(dense.T if keeps_transposed(module) else dense)
