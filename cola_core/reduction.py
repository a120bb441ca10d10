"""What the probe keeps of a module's mean gradient: importance (GoRA), sketch and Frank-Wolfe gap (COLA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cola_core.adapters import Pair
from cola_core.config.recipe import ProfileConfig
from cola_core.directions import Directions, gradient_directions
from cola_core.draws import draw_a
from cola_core.errors import UserError
from cola_core.gap import decomposable, frank_wolfe_gap
from cola_core.models import as_matrix
from cola_core.seeds import derive

__all__ = ["IMPORTANCE", "Modules", "Reducer"]

Modules = Mapping[str, nn.Module]

# GoRA, section 3 and its ablation of the metric; W and G are out x in, G is averaged before the absolute value.
IMPORTANCE: dict[str, Callable[[Tensor, Tensor], float]] = {
    "mean_abs_wg": lambda w, g: float((w * g).abs_().mean()),
    "nuclear_wg": lambda w, g: float(torch.linalg.svdvals(decomposable(w * g)).sum()),
    "nuclear_g": lambda w, g: float(torch.linalg.svdvals(decomposable(g)).sum()),
}


class Reducer:
    """Turns mean gradients into the few numbers that are kept, one module at a time.

    found: module -> {importance, gradient_norm, gap, update_nuclear_norm, gap_valid};
    directions: module -> what is kept for the initialiser, by name.
    """

    def __init__(
        self,
        modules: Modules,
        earlier: Mapping[str, Sequence[Pair] | None],
        config: ProfileConfig,
        stream: tuple[int, int],
    ) -> None:
        self.modules, self.earlier, self.config, self.stream = modules, earlier, config, stream
        self.found: dict[str, dict[str, Any]] = {}
        self.directions: dict[str, dict[str, Tensor]] = {}

    def whole(self, name: str, gradient: Tensor) -> None:
        """Reduce G, out x in, the mean over all probe rows.

        Raises:
            UserError: it is not finite.
        """
        gradient = wide(gradient)
        norm = self.finite(name, float(gradient.norm()))
        kept: Directions = {}
        for kind in self.config.directions:
            kept |= DIRECTIONS[kind](self, name, gradient) if kind in DIRECTIONS else {}
        self.keep(name, kept, self.importance(name, gradient), norm, gradient)

    def keep(self, name: str, directions: Directions, importance: float, norm: float, gradient: Tensor) -> None:
        """Note what was found for one module; the gap is taken of `gradient`, G itself or what stands for it."""
        self.directions[name] = directions
        gap = frank_wolfe_gap(gradient, self.earlier.get(name, ()), self.config.gap_radius)
        self.found[name] = {"importance": importance, "gradient_norm": norm, **gap}

    def importance(self, name: str, gradient: Tensor) -> float:
        """The recipe's importance of one module."""
        return IMPORTANCE[self.config.importance](self.weight(name).to(gradient), gradient)

    def weight(self, name: str) -> Tensor:
        """W, out x in."""
        return as_matrix(self.modules[name])

    def a_max(self, name: str) -> Tensor:
        """A_max, rows x in, drawn anew from its seed as the initialiser draws it; beside W, and as wide as G."""
        weight = self.weight(name)
        drawn = draw_a(*self.stream, name, min(self.config.sketch, *weight.shape), weight.shape[1])
        return drawn.to(weight.device, torch.promote_types(weight.dtype, torch.float32))

    def finite(self, name: str, norm: float) -> float:
        """The norm of a gradient, if it is one."""
        if not math.isfinite(norm):
            raise UserError(f"probe: the gradient of {name} is not finite; check the data, or use machine.dtype=fp32")
        return norm


# What is kept of G, out x in, for an initialiser.
DIRECTIONS: dict[str, Callable[[Reducer, str, Tensor], Directions]] = {
    "sketch": lambda reduce, name, g: {"sketch": (g @ reduce.a_max(name).T).cpu()},
    "gradient": lambda reduce, name, g: gradient_directions(
        g, reduce.config.sketch, derive(*reduce.stream, "svd", name)
    ),
}


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
