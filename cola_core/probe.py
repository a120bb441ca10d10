"""The gradient probe: one pass over the probe rows, each weight's gradient reduced as soon as it is complete.

A module's mean gradient G becomes its importance (GoRA), its sketch S = G A_max^T, from which GoRA's B follows for any
rank, and its Frank-Wolfe gap (COLA); then it is freed. No copy of the model, no optimizer, no step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cola_core.adapters import Pair
from cola_core.axes.initialisers import draw_a
from cola_core.batches import Row
from cola_core.config.recipe import ProfileConfig
from cola_core.errors import UserError
from cola_core.gap import frank_wolfe_gap
from cola_core.scoring import Objective

__all__ = ["IMPORTANCE", "Profile", "probe"]

Modules = Mapping[str, nn.Module]

# GoRA, section 3 and its ablation of the metric; W and G are out x in, G is averaged before the absolute value.
IMPORTANCE: dict[str, Callable[[Tensor, Tensor], float]] = {
    "mean_abs_wg": lambda w, g: float((w * g).abs().mean()),
    "nuclear_wg": lambda w, g: float(torch.linalg.svdvals(w * g).sum()),
    "nuclear_g": lambda w, g: float(torch.linalg.svdvals(g).sum()),
}


@dataclass(frozen=True)
class Profile:
    """What the probe found.

    modules: name -> {importance, gradient_norm, gap, update_nuclear_norm, gap_valid}; sketches: name -> S, out x rows;
    loss: mean training loss over the probe rows; examples, tokens: what was computed, charged to the method's budget.
    """

    modules: dict[str, dict[str, Any]]
    sketches: dict[str, Tensor]
    loss: float
    examples: int
    tokens: int


def probe(
    objective: Objective,
    rows: Sequence[Row],
    modules: Modules,
    earlier: Mapping[str, Sequence[Pair]],
    config: ProfileConfig,
    stream: tuple[int, int],
) -> Profile:
    """Take the gradient of the training loss over all `rows` with respect to the weights of `modules`.

    Args:
        objective: the merged model so far, frozen, without adapters.
        earlier: module -> the pairs already merged into it, for the gap.
        stream: (seed, link) of the random stream that A_max is drawn from.

    Raises:
        UserError: the loss or a gradient is not finite.
    """
    _prepare(objective, modules, config)
    reduce = _Reducer(modules, earlier, config, stream)
    loss, units, seen, tokens = PASSES[config.probe](objective, rows, modules, config, reduce)
    if set(reduce.found) != set(modules):
        missing = sorted(set(modules) - set(reduce.found))
        raise UserError(
            f"probe: {missing[0]} and {len(missing) - 1} more modules got no gradient; leave them out of targets"
        )
    return Profile(reduce.ordered(reduce.found), reduce.ordered(reduce.sketches), loss / units, seen, tokens)


def _prepare(objective: Objective, modules: Modules, config: ProfileConfig) -> None:
    """Eval mode; only the probed weights ask for gradients. Checkpointing needs train mode: the base's dropout is 0."""
    objective.requires_grad_(False).eval()
    if config.activation_checkpointing:
        objective.model.activation_checkpointing_enable({"use_reentrant": False})
        objective.train()
    for module in modules.values():
        module.weight.requires_grad_(True)  # type: ignore[union-attr, operator]


class _Reducer:
    """Turns one module's mean gradient into the few numbers that are kept."""

    def __init__(
        self,
        modules: Modules,
        earlier: Mapping[str, Sequence[Pair]],
        config: ProfileConfig,
        stream: tuple[int, int],
    ) -> None:
        self.modules, self.earlier, self.config, self.stream = modules, earlier, config, stream
        self.found: dict[str, dict[str, Any]] = {}
        self.sketches: dict[str, Tensor] = {}

    def __call__(self, name: str, gradient: Tensor) -> None:
        """gradient: out x in, the mean over all probe rows."""
        gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
        norm = float(gradient.norm())
        if norm != norm or norm == float("inf"):
            raise UserError(f"probe: the gradient of {name} is not finite; check the data, or use machine.dtype=fp32")
        out, columns = gradient.shape
        rows = min(self.config.sketch, out, columns)
        a = draw_a(*self.stream, name, rows, columns).to(gradient)
        self.sketches[name] = (gradient @ a.T).cpu()
        weight = _matrix(self.modules[name], self.modules[name].weight.detach())  # type: ignore[union-attr, operator]
        self.found[name] = {
            "importance": IMPORTANCE[self.config.importance](weight.to(gradient), gradient),
            "gradient_norm": norm,
            **frank_wolfe_gap(gradient, self.earlier.get(name, ()), self.config.gap_radius),
        }

    def ordered(self, found: dict[str, Any]) -> dict[str, Any]:
        """In model order; gradients arrive from the last layer to the first."""
        return {name: found[name] for name in self.modules}


def _one_batch(
    objective: Objective, rows: Sequence[Row], modules: Modules, config: ProfileConfig, reduce: _Reducer
) -> tuple[float, int, int, int]:
    """All rows in one forward and backward: exact, and no gradient outlives its own module's turn."""
    batch = objective.training_batch(rows)
    units = objective.units(batch)
    with _on_gradient(modules, lambda name, gradient: reduce(name, gradient / units)):
        loss = objective(batch)
        loss.backward()
    return float(loss.detach()), units, len(rows), batch.tokens


def _accumulate(
    objective: Objective, rows: Sequence[Row], modules: Modules, config: ProfileConfig, reduce: _Reducer
) -> tuple[float, int, int, int]:
    """Micro-batches summed in fp32 buffers, for probes too large for one batch; may stop early (GoRA's adaptive N)."""
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        sums[name] = sums[name].add_(wide) if name in sums else wide.clone()

    before: dict[str, float] = {}
    total, units, seen, tokens = 0.0, 0, 0, 0
    for step, start in enumerate(range(0, len(rows), config.micro_batch), start=1):
        batch = objective.training_batch(rows[start : start + config.micro_batch])
        with _on_gradient(modules, add):
            loss = objective(batch)
            loss.backward()
        total, units, tokens = total + float(loss.detach()), units + objective.units(batch), tokens + batch.tokens
        seen += len(batch.labels)
        if config.adaptive:
            now = _importances(modules, sums, units, config)
            if step > 3 and _settled(before, now, config.tolerance):
                break
            before = now
    for name in list(sums):
        reduce(name, sums.pop(name) / units)
    return total, units, seen, tokens


PASSES = {"one_batch": _one_batch, "accumulate": _accumulate}


def _importances(modules: Modules, sums: Mapping[str, Tensor], units: int, config: ProfileConfig) -> dict[str, float]:
    metric = IMPORTANCE[config.importance]
    return {
        name: metric(_matrix(modules[name], modules[name].weight.detach()).to(total), total / units)  # type: ignore[union-attr, operator]
        for name, total in sums.items()
    }


def _settled(before: Mapping[str, float], now: Mapping[str, float], tolerance: float) -> bool:
    return all(abs(now[name] - old) <= tolerance * abs(old) for name, old in before.items())


@contextmanager
def _on_gradient(modules: Modules, receive: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand every weight's finished gradient, as out x in, to `receive` once per backward, and free it.

    A tensor hook, as in the code GoRA's authors released, fires before its own gradient is stored and loses one;
    `register_post_accumulate_grad_hook` fires after.
    """

    def hook(name: str) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient, weight.grad = weight.grad, None
            receive(name, _matrix(modules[name], gradient))

        return take

    handles = [
        module.weight.register_post_accumulate_grad_hook(hook(name))  # type: ignore[union-attr, operator]
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight-shaped tensor as out x in."""
    return weight.T if isinstance(module, Conv1D) else weight
