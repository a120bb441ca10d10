"""A module's mean gradient known by a few of its rows: G = dY^T X is never formed, whatever the probe's size.

S = G A_max^T = dY^T (X A_max^T) is exact all the same, and its row norms say how much the rows that were not taken are
likely to weigh. The importance is an estimate: half of the rows are those of most energy in the first micro-batch and
count for themselves, the others are drawn at random and stand for all that are left (a ratio estimator, Cochran 1977,
chapter 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from cola_core.gap import decomposable
from cola_core.reduction import Modules, Reducer, wide
from cola_core.seeds import derive

__all__ = ["SampledGradient", "both_ends"]


class SampledGradient:
    """One module's gradient, summed over micro-batches.

    rows: indices of the taken rows, the `certain` first ones by energy; part: G[rows], k x in; sketch: S, out x rows
    of A_max.
    """

    def __init__(self, reduce: Reducer, name: str) -> None:
        self.reduce, self.name = reduce, name
        self.a_max = reduce.a_max(name)
        self.rows: Tensor | None = None
        self.certain = 0
        self.part: Tensor | float = 0.0
        self.sketch: Tensor | float = 0.0

    def add(self, x: Tensor, dy: Tensor) -> None:
        """x: tokens x in, the module's input; dy: tokens x out, the loss's gradient at its output."""
        if self.rows is None:
            self._choose(dy.square().sum(0))
        self.part = self.part + dy[:, self.rows].T @ x
        self.sketch = self.sketch + dy.T @ (x @ self.a_max.T)

    def finish(self, units: int) -> None:
        """Hand the means over `units` to the reducer.

        ||G||_F is estimated from S, whose entries have variance ||G_i||^2 / (3 in); the gap from an approximation of G
        in the span of S's leading singular vectors that fits the taken rows and is no larger than that estimate.
        """
        assert isinstance(self.part, Tensor) and isinstance(self.sketch, Tensor) and self.rows is not None
        part, sketch = decomposable(self.part / units), decomposable(self.sketch / units)
        columns = part.shape[1]
        norm = float(sketch.norm()) * math.sqrt(3 * columns / sketch.shape[1])
        self.reduce.finite(self.name, norm)
        left = torch.linalg.svd(sketch, full_matrices=False).U[:, : max(1, len(self.rows) // 2)]
        nearby = left @ (torch.linalg.pinv(left[self.rows], rtol=0.1) @ part)
        nearby *= min(1.0, norm / max(float(nearby.norm()), 1e-30))
        kept = {"sketch": sketch.cpu()} if "sketch" in self.reduce.config.directions else {}
        self.reduce.keep(self.name, kept, self._importance(part, sketch), norm, nearby)

    def _choose(self, energy: Tensor) -> None:
        """The rows of most energy, then as many of the others drawn at random."""
        out, seed = len(energy), derive(*self.reduce.stream, "rows", self.name)
        count = max(2, math.ceil(self.reduce.config.row_share * out))
        self.certain = count // 2
        ranked = energy.argsort(descending=True)
        rest = torch.randperm(out - self.certain, generator=torch.Generator().manual_seed(seed))
        self.rows = torch.cat([ranked[: self.certain], ranked[self.certain :][rest[: count - self.certain]]])

    def _importance(self, part: Tensor, sketch: Tensor) -> float:
        """mean |W * G|: the certain rows' own sums, plus the others' in proportion to ||W_i|| ||S_i||."""
        assert self.rows is not None
        weight = self.reduce.weight(self.name).to(part)
        found = (weight[self.rows] * part).abs_().sum(1)
        size = weight.norm(dim=1) * sketch.norm(dim=1)
        certain, drawn = self.rows[: self.certain], self.rows[self.certain :]
        left = size.sum() - size[certain].sum()
        share = left / size[drawn].sum().clamp_min(torch.finfo(size.dtype).tiny)
        return float(found[: self.certain].sum() + share * found[self.certain :].sum()) / weight.numel()


@contextmanager
def both_ends(modules: Modules, receive: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Hand every module's input and the gradient at its output to `receive`, once per backward, and free them.

    The outputs of the first modules are made to ask for gradients: no weight does, and nothing below them need.
    """

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def ended(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            def both(x: Tensor, dy: Tensor) -> None:
                receive(name, flat(x), flat(dy))

            if not output.requires_grad:
                output.requires_grad_(True)
            output.register_hook(partial(both, args[0].detach()))  # type: ignore[no-untyped-call]

        return ended

    def flat(tensor: Tensor) -> Tensor:
        return wide(tensor.reshape(-1, tensor.shape[-1]))

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(watch(name)))
        yield
