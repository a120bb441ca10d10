"""ALoRA, arXiv 2403.16187, section 3: ranks that an ablation finds useless move to modules that lost none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from cola_core.adapters import LoRA
from cola_core.health import Course
from cola_core.interrupts import uninterrupted
from cola_core.processes import check_alone
from cola_core.seeds import derive

__all__ = ["Ablation", "moves"]

Scores = dict[str, list[float]]


class Ablation:
    """After `first` steps and then every `every`, at most `rounds` times: `ranks` ranks are moved.

    The paper's gates are 1 or 0, so a closed gate is a rank that is gone: A and B shrink and grow, their moments with
    them, and the total stays. A grown rank starts as LoRA does, with B = 0; the scale s stays that of the start.
    """

    def __init__(
        self, layers: Mapping[str, LoRA], optimizer: Optimizer, loss: Callable[[], float], course: Course
    ) -> None:
        check_alone("link.pruning 'alora'", "the shapes of A and B change while it trains")
        self.layers, self.optimizer, self.loss, self.course = layers, optimizer, loss, course
        self.options: Any = course.config.pruning

    def rounds(self, step: int) -> int:
        """How many have had their turn."""
        past = step - self.options.first
        due: int = 0 if past < 0 else min(self.options.rounds, 1 + past // self.options.every)
        return due

    def measured(self, number: int) -> Callable[[], None]:
        """Score every rank on the validation sample; the lowest are to go, and to grow where none does."""
        return partial(self._move, *moves(self._scores(), self.options.ranks), number)

    def _move(self, pruned: Mapping[str, set[int]], grown: Mapping[str, int], number: int) -> None:
        for name, layer in self.layers.items():
            keep = torch.tensor([i for i in range(len(layer.A)) if i not in pruned[name]], dtype=torch.long)
            if len(keep) < len(layer.A) or grown[name]:
                self._resize(name, layer, keep.to(layer.A.device), grown[name], number)

    def _scores(self) -> Scores:
        """IS(i) = S(M_i) - S(M without i) for every rank, S = -loss: equation 6, whose S(M) is the same for all."""
        scores: Scores = {name: [] for name in self.layers}
        for name, layer in self.layers.items():
            for rank in range(len(layer.A)):
                with uninterrupted(), _without(layer, rank):  # stopped between two losses, the layers are whole
                    lost = self.loss()
                with uninterrupted(), _alone(self.layers, layer, rank):
                    scores[name].append(lost - self.loss())
        return scores

    def _resize(self, name: str, layer: LoRA, keep: Tensor, grown: int, number: int) -> None:
        seed = derive(self.course.seed, self.course.link, "grow", name, number)
        bound, columns = 1 / math.sqrt(layer.A.shape[1]), layer.A.shape[1]
        drawn = torch.rand(grown, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self._change(layer.A, 0, keep, (drawn * 2 - 1) * bound)
        self._change(layer.B, 1, keep, torch.zeros(layer.B.shape[0], grown))

    def _change(self, parameter: Parameter, dim: int, keep: Tensor, new: Tensor) -> None:
        """Keep some of a factor's ranks and append others; its moments follow, with zeros for the new."""
        old, new = parameter.shape, new.to(parameter)
        for key, value in self.optimizer.state.get(parameter, {}).items():
            if value.shape == old:
                self.optimizer.state[parameter][key] = torch.cat(
                    [value.index_select(dim, keep), torch.zeros_like(new)], dim
                )
        parameter.data = torch.cat([parameter.data.index_select(dim, keep), new], dim)
        parameter.grad = None


def moves(scores: Scores, count: int) -> tuple[dict[str, set[int]], dict[str, int]]:
    """What to prune and where to grow: the lowest ranks of all, to modules that lost none, those of highest mean first.

    Args:
        scores: module -> IS of every rank; count: how many ranks move.

    Returns:
        module -> ranks pruned, and module -> ranks grown; as many of the one as of the other.
    """
    flat = sorted((score, name, rank) for name, own in scores.items() for rank, score in enumerate(own))
    lowest = flat[: min(count, len(flat) - 1)]
    pruned = {name: {rank for _, owner, rank in lowest if owner == name} for name in scores}
    means = {name: sum(own) / len(own) if own else -math.inf for name, own in scores.items()}
    ranked = sorted(scores, key=lambda name: -means[name])
    free = [name for name in ranked if not pruned[name]] or ranked
    grown = dict.fromkeys(scores, 0)
    for turn in range(len(lowest)):
        grown[free[turn % len(free)]] += 1
    return pruned, grown


@contextmanager
def _without(layer: LoRA, rank: int) -> Iterator[None]:
    """One rank taken out."""
    kept = layer.B.data[:, rank].clone()
    layer.B.data[:, rank] = 0
    try:
        yield
    finally:
        layer.B.data[:, rank] = kept


@contextmanager
def _alone(layers: Mapping[str, LoRA], layer: LoRA, rank: int) -> Iterator[None]:
    """All ranks of all layers taken out but one."""
    kept = {name: other.B.data for name, other in layers.items()}
    for other in layers.values():
        other.B.data = torch.zeros_like(other.B.data)
    only = next(name for name, other in layers.items() if other is layer)
    layer.B.data[:, rank] = kept[only][:, rank]
    try:
        yield
    finally:
        for name, other in layers.items():
            other.B.data = kept[name]
