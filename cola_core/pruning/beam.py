"""BeamLoRA, arXiv 2502.13604, section 3: ranks that matter least give way to copies of those that matter most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola_core.adapters import LoRA
from cola_core.forms.gates import softmax_gates
from cola_core.health import Course
from cola_core.seeds import derive

__all__ = ["Beam", "kept_ranks"]

MOMENTS = ("exp_avg", "exp_avg_sq")


class Beam:
    """Every `every` steps, but for the last so many, the tail of all modules' gates is pruned and expanded.

    A pruned slot takes A's row, B's column and their moments of one of the module's best ranks as they were half a
    period before, which keeps the two from staying the same; both scores become their mean. The function changes.
    """

    def __init__(
        self, layers: Mapping[str, LoRA], optimizer: Optimizer, loss: Callable[[], float], course: Course
    ) -> None:
        self.layers, self.optimizer, self.course = layers, optimizer, course
        self.options: Any = course.config.pruning
        for layer in layers.values():
            for name, value in self._now(layer).items():
                layer.register_buffer(f"then_{name}", value)

    def rounds(self, step: int) -> int:
        """Two a period: what is kept for later, half a period before what is pruned."""
        every = int(self.options.every)
        last = self.course.config.steps - every
        done = min(step, last)
        half = done % every >= every - every // 2 and (done // every + 1) * every <= last
        return 2 * (done // every) + half

    def measured(self, number: int) -> Callable[[], None]:
        """Keep A, B and their moments, or prune and expand."""
        return partial(self._expand, number) if number % 2 else self._keep

    def _keep(self) -> None:
        for layer in self.layers.values():
            for name, value in self._now(layer).items():
                getattr(layer, f"then_{name}").data = value

    def _expand(self, number: int) -> None:
        gates = {name: softmax_gates(layer).detach() for name, layer in self.layers.items()}
        kept = kept_ranks(gates, self._share(number))
        for name, layer in self.layers.items():
            pruned = (~kept[name]).nonzero().flatten()
            if len(pruned):
                generator = torch.Generator().manual_seed(
                    derive(self.course.seed, self.course.link, "beam", name, number)
                )
                best = gates[name].argsort(descending=True, stable=True)[: len(pruned)]
                self._copy(layer, best[torch.randperm(len(pruned), generator=generator).to(best.device)], pruned)

    def _share(self, number: int) -> float:
        """p of this round: rising = from `share` to 1 as in the released code, falling = from 1 to `share`."""
        progress = (number // 2 + 1) * self.options.every / max(1, self.course.config.steps - self.options.every)
        left = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return 1 - (1 - float(self.options.share)) * (left if self.options.schedule == "rising" else 1 - left)

    def _copy(self, layer: LoRA, best: Tensor, pruned: Tensor) -> None:
        with torch.no_grad():
            for name, value in self._now(layer, copied=False).items():
                then = getattr(layer, f"then_{name}")
                if name.startswith("A"):
                    value[pruned] = then[best]
                else:
                    value[:, pruned] = then[:, best]
            mean = (layer.score[best] + layer.score[pruned]) / 2
            layer.score[best], layer.score[pruned] = mean, mean
            for moment in MOMENTS:
                for ranks in (best, pruned):
                    if moment in self.optimizer.state.get(layer.score, {}):
                        self.optimizer.state[layer.score][moment][ranks] = 0

    def _now(self, layer: LoRA, copied: bool = True) -> dict[str, Tensor]:
        """A, B and their moments, zeros before the first step; a copy, or what the layer and the optimizer hold."""
        found: dict[str, Tensor] = {}
        for name, parameter in (("A", layer.A), ("B", layer.B)):
            state = self.optimizer.state.get(parameter, {})
            parts = {name: parameter.data, **{f"{name}_{m}": state[m] for m in MOMENTS if m in state}}
            missing = {f"{name}_{m}": torch.zeros_like(parameter.data) for m in MOMENTS if m not in state and copied}
            found |= {**parts, **missing}
        return {name: value.detach().clone() for name, value in found.items()} if copied else found


def kept_ranks(gates: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Which ranks stay: the largest gates of all modules until their sum exceeds `share` of the whole.

    At most half of a module's ranks go, since each is replaced by another of its own.

    Args:
        gates: module -> r gates that sum to r.

    Returns:
        module -> r booleans.
    """
    values = torch.cat(list(gates.values())).double()
    ranked = values.sort(descending=True, stable=True)
    enough = (ranked.values.cumsum(0) > share * values.sum()).nonzero().flatten()
    floor = ranked.values[enough[0]] if len(enough) else -math.inf
    kept = {}
    for name, own in gates.items():
        stays = own.double() >= floor
        stays[own.argsort(descending=True, stable=True)[: math.ceil(len(own) / 2)]] = True
        kept[name] = stays
    return kept
