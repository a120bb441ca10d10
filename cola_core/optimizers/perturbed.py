"""Updates that take their gradients beside the weights: at noisy ones, or a step up the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cola_core.adapters import LoRA
from cola_core.interrupts import uninterrupted
from cola_core.models import as_matrix
from cola_core.optimizers.privacy import Reading
from cola_core.optimizers.stepping import Adam

__all__ = ["Ggpo", "Mgpo"]


class Ggpo(Adam):
    """LoRA-GGPO, arXiv 2502.14538 v1: AdamW on gradients taken at W + s B A + noise.

    Row i of the noise, out x in, is N(0, 1) times (sigma n_i + beta ||g_i||^2) / sqrt(out), with
    n_i^2 = (mean_j ||W_j||)^2 + ||s (B A)_i||^2 and g = s (B dA + dB A), what the pair saw one step before. The
    formula is that of a third party's code; the first step has no gradient before it and is taken without noise.
    """

    def __init__(self, groups: Any, layers: Mapping[str, LoRA], sigma: float, beta: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.layers, self.sigma, self.beta = layers, sigma, beta
        self.rows = {name: float(as_matrix(layer.base).float().norm(dim=1).mean()) for name, layer in layers.items()}

    def collect(self, rows: Sequence[int], read: Reading) -> tuple[float, int]:
        """Gradients of the rows under noise."""
        with self.around():
            return read(rows)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Every layer adds noise of its own to each forward pass inside."""
        for name, layer in self.layers.items():
            seen = self.state.get(_owner(layer), {}).get("rows")
            layer.noise = None if seen is None else self._size(name, layer, seen)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.noise = None

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Note every row's gradient, then AdamW's step."""
        rows = {name: _gradient_rows(layer) for name, layer in self.layers.items()}
        super().step(closure)
        for name, layer in self.layers.items():
            self.state[_owner(layer)]["rows"] = rows[name]

    def _size(self, name: str, layer: LoRA, seen: Tensor) -> Tensor:
        """Standard deviation of every row's noise, out; seen: ||g_i||^2."""
        with torch.no_grad():
            pair = layer.scale * (layer.B @ layer.A)
            weights = (self.rows[name] ** 2 + pair.square().sum(1)).sqrt()
            return (self.sigma * weights + self.beta * seen) / math.sqrt(len(seen))


class Mgpo(Adam):
    """LoRA-MGPO, arXiv 2502.14538 v2: AdamW on gradients taken a step up Adam's momentum, theta + rho_t m / ||m||.

    No second backward pass is needed. rho_t = rho ||g|| / EMA(||g||), of the gradients before: our reading of its
    perturbation normalised by smoothed gradient magnitudes, whose constants we do not have. ||g|| is that of the
    gradient which steps, so `link.clip` bounds it. The first step has no momentum and is taken in place.
    """

    def __init__(self, groups: Any, rho: float, smoothing: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.rho, self.smoothing = rho, smoothing

    def collect(self, rows: Sequence[int], read: Reading) -> tuple[float, int]:
        """Gradients of the rows where the momentum leads."""
        with self.around():
            return read(rows)

    @contextmanager
    def around(self) -> Iterator[None]:
        """The parameters are moved inside, and put back to the bit."""
        trained = [p for group in self.param_groups for p in group["params"]]
        momenta = [self.state.get(p, {}).get("exp_avg") for p in trained]
        if any(m is None for m in momenta):
            yield
            return
        length = float(torch.nn.utils.get_total_norm([m for m in momenta if m is not None]))
        before = [p.detach().clone() for p in trained]
        size = self._size(self.state[trained[0]]["magnitudes"])
        try:
            with torch.no_grad():
                for p, m in zip(trained, momenta, strict=True):
                    p.add_(m, alpha=size / max(length, 1e-30))  # type: ignore[arg-type]
            yield
        finally:
            with uninterrupted(), torch.no_grad():
                for p, old in zip(trained, before, strict=True):
                    p.copy_(old)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Smooth the gradients' magnitude, then AdamW's step."""
        trained = [p for group in self.param_groups for p in group["params"]]
        now = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).double().cpu()
        super().step(closure)
        state = self.state[trained[0]]
        _, smooth, weight = state.get("magnitudes", torch.zeros(3, dtype=torch.float64))
        keep = self.smoothing
        state["magnitudes"] = torch.stack([now, keep * smooth + (1 - keep) * now, keep * weight + (1 - keep)])

    def _size(self, magnitudes: Tensor) -> float:
        """rho_t; magnitudes: last ||g||, its moving average, and the average's total weight."""
        last, smooth, weight = magnitudes.tolist()
        return self.rho * last * weight / smooth if smooth else 0.0


def _owner(layer: LoRA) -> Parameter:
    """The parameter whose state holds what is known of the layer."""
    return layer.B if layer.B.requires_grad else layer.A


def _gradient_rows(layer: LoRA) -> Tensor:
    """||g_i||^2 of every row of g = s (B dA + dB A), out; a frozen factor has no gradient."""
    with torch.no_grad():
        parts = [layer.B @ layer.A.grad] if layer.A.grad is not None else []
        parts += [layer.B.grad @ layer.A] if layer.B.grad is not None else []
        total = layer.scale * torch.stack(parts).sum(0)
        return total.square().sum(1)
