"""What a profile keeps of a module for initialisers: a few directions of its gradient, inputs or sisters' changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cola_core.gap import decomposable
from cola_core.rows import Row
from cola_core.scoring import Objective

__all__ = ["Directions", "activation_directions", "gradient_directions", "sister_directions"]

Directions = dict[str, Tensor]
ROUNDS = 4  # of the subspace iteration, as in LoRA-GA's code


def gradient_directions(gradient: Tensor, count: int, seed: int) -> Directions:
    """The leading singular triples of G, out x in (LoRA-GA, arXiv 2407.05000, section 3.2).

    Returns:
        left: out x k; values: k, largest first; right: in x k, with k = min(count, out, in).
    """
    k = min(count, *gradient.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = torch.svd_lowrank(decomposable(gradient), q=min(2 * k, *gradient.shape), niter=ROUNDS)
    left, values, right = (part[..., :k].contiguous().cpu() for part in found)
    return {"left": left, "values": values, "right": right}


@dataclass
class Moments:
    """Count, sum (in) and X^T X (in x in) of a module's inputs."""

    count: int
    total: Tensor
    gram: Tensor

    def add(self, x: Tensor) -> None:
        """x: tokens x in."""
        self.count += len(x)
        self.total += x.sum(0)
        self.gram.addmm_(x.T, x)

    def directions(self, count: int) -> Directions:
        """axes: in x k, the principal axes of the centred inputs; variance: k, their shares of it, largest first."""
        mean = (self.total / self.count).double()
        values, axes = torch.linalg.eigh(decomposable(self.gram).double() - self.count * mean.outer(mean).cpu())
        values = values.clamp_min(0).flip(0)
        share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        return {"axes": axes.flip(1)[:, :count].float().contiguous(), "variance": share[:count].float()}


def activation_directions(
    objective: Objective, rows: Sequence[Row], modules: Mapping[str, nn.Module], count: int, size: int
) -> tuple[dict[str, Directions], int]:
    """Principal axes of every module's inputs over `rows`, exactly (EVA, arXiv 2410.07170, section 3.2).

    EVA's code updates a truncated decomposition batch by batch; the sums kept here, in x in numbers a module, lose
    nothing. Rows are computed one by one where a batch would hold padding.

    Args:
        count: directions kept of each module; size: rows at once where they are packed.

    Returns:
        module -> {axes, variance}, and the tokens computed.
    """
    found: dict[str, Moments] = {}
    tokens, at_once = 0, size if objective.packed else 1
    objective.eval()
    with torch.no_grad(), _inputs(modules, lambda name, x: _moments(found, name, x).add(x)):
        for start in range(0, len(rows), at_once):
            batch = objective.training_batch(rows[start : start + at_once])
            objective(batch)
            tokens += batch.tokens
    return {name: found[name].directions(count) for name in modules}, tokens


def sister_directions(
    base: Mapping[str, Tensor], sisters: Iterable[Mapping[str, Tensor]], count: int
) -> dict[str, Directions]:
    """The common subspace of several models' changes of each weight (CoRA, arXiv 2409.02119).

    The left singular vectors of [dW_1 ... dW_n], by the eigenvectors of sum dW dW^T.

    Args:
        base: module -> W, out x in; sisters: the same of every sister, one at a time.

    Returns:
        module -> common: out x k, orthonormal columns, largest singular value first.
    """
    grams = {name: weight.new_zeros(len(weight), len(weight), dtype=torch.float64) for name, weight in base.items()}
    for sister in sisters:
        for name, weight in base.items():
            change = (sister[name] - weight).double()
            grams[name].addmm_(change, change.T)
    axes = {name: torch.linalg.eigh(gram).eigenvectors.flip(1) for name, gram in grams.items()}
    return {name: {"common": found[:, :count].float().contiguous()} for name, found in axes.items()}


def _moments(found: dict[str, Moments], name: str, x: Tensor) -> Moments:
    if name not in found:
        found[name] = Moments(0, x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1]))
    return found[name]


@contextmanager
def _inputs(modules: Mapping[str, nn.Module], receive: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand every module's input, tokens x in, float32 or wider, to `receive` at every forward."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def took(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            receive(name, x if x.dtype == torch.float64 else x.float())

        return took

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(watch(name)))
        yield
