"""LoRA layers: put them around frozen linear maps, take them off, or add them to the weights for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cola_core.axes.parametrisations import PARAMETRISATIONS, Form
from cola_core.models import keeps_transposed

__all__ = ["LoRA", "Pair", "add_pair", "attach", "detach"]


@dataclass(frozen=True)
class Pair:
    """dW = scale * B A for one module; a: r x in, b: out x r; bias: the module's bias where it was trained."""

    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    def to(self, *where: Any) -> Pair:
        """The same pair on another device or in another dtype."""
        return replace(self, a=self.a.to(*where), b=self.b.to(*where))


class LoRA(nn.Module):
    """y = W x + s B A dropout(x), with W frozen (LoRA, arXiv 2106.09685, equation 3).

    A and B are kept in the master dtype and computed in x's own; a form may add parts and read other layers.
    given: the pair that W gave up at the start, so that the layer computes W x + s (B A - B_0 A_0) x; None for nothing.
    noise: standard deviation of every row of the noise on W, out, redrawn at every pass; None for none.
    previous: layers of this kind in earlier blocks, nearest first; seen: the last input; fresh: what a step that is
    not taken yet has seen of inputs' sizes (ResLoRA).
    """

    gate: nn.Parameter
    score: nn.Parameter
    temperature: float
    ratios: Tensor
    batches: Tensor
    seen: Tensor
    fresh: list[float]

    def __init__(
        self, base: nn.Module, pair: Pair, dropout: float = 0.0, form: Form = PARAMETRISATIONS["plain"]
    ) -> None:
        super().__init__()
        self.base, self.scale, self.form = base, pair.scale, form
        self.A, self.B = nn.Parameter(pair.a), nn.Parameter(pair.b)
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.given: Pair | None = None
        self.noise: Tensor | None = None
        self.previous: list[LoRA] = []

    @property
    def weight(self) -> Tensor:
        """The frozen W: some families (T5) look at the dtype of their linear maps' weights."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x: ... x in -> ... x out."""
        a, b = self._with_given(*self.form.factors(self))
        low = self.form.low(self, x, a.to(x.dtype))
        result: Tensor = self.base(x) + functional.linear(low, self.scale * b.to(x.dtype))
        if self.noise is None:
            return result
        noise = self.noise[:, None] * torch.randn(len(b), x.shape[-1], dtype=self.noise.dtype, device=x.device)
        return result + functional.linear(x, noise.to(x.dtype))

    def _with_given(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.given is None:
            return a, b
        return torch.cat([a, self.given.a]), torch.cat([b, -self.given.b], dim=1)

    def pair(self) -> Pair:
        """A copy of what the layer has learned."""
        bias = getattr(self.base, "bias", None)
        trained = bias.detach().clone() if bias is not None and bias.requires_grad else None
        a, b = self._with_given(*(self.form.merged or self.form.factors)(self))
        if trained is not None and not len(a):  # a file has no rank 0, and the bias needs its place
            a, b = a.new_zeros(1, a.shape[1]), b.new_zeros(len(b), 1)
        return Pair(a.detach().clone(), b.detach().clone(), self.scale, trained)


def attach(
    model: nn.Module,
    pairs: Mapping[str, Pair],
    dropout: float = 0.0,
    bias: bool = False,
    form: Form = PARAMETRISATIONS["plain"],
) -> dict[str, LoRA]:
    """Wrap the named modules of a frozen model; only what `form` trains (and, if asked, those modules' biases) can.

    Returns:
        module name -> its layer, in the order of `pairs`.
    """
    layers = {}
    for name, pair in pairs.items():
        base = model.get_submodule(name)
        weight: Tensor = base.weight  # type: ignore[assignment]
        layers[name] = LoRA(base, pair.to(weight.device), dropout, form)
        if bias and base.bias is not None:
            base.bias.requires_grad_(True)  # type: ignore[union-attr]
        _put(model, name, layers[name])
    return layers


def detach(model: nn.Module) -> dict[str, Pair]:
    """Take every LoRA layer off and return what it learned; the frozen weights are as they were."""
    pairs = {}
    for name, layer in list(_layers(model)):
        pairs[name] = layer.pair()
        layer.base.requires_grad_(False)
        _put(model, name, layer.base)
    return pairs


def add_pair(module: nn.Module, pair: Pair) -> float:
    """W <- W + s B A in place, in the weight's master dtype (law 5).

    Returns:
        the relative merge error ||(W' - W) - s B A|| / ||s B A||, 0 where the delta is zero.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    with torch.no_grad():
        delta = pair.scale * (pair.b.to(weight) @ pair.a.to(weight))
        delta = delta.T if keeps_transposed(module) else delta
        before = weight.clone()
        weight.add_(delta)
        if pair.bias is not None:
            module.bias.copy_(pair.bias)  # type: ignore[union-attr, operator]
        size = delta.double().norm()
        error = ((weight.double() - before.double()) - delta.double()).norm()
        return float(error / size) if size > 0 else float(error)


def _layers(model: nn.Module) -> Iterator[tuple[str, LoRA]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRA))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
