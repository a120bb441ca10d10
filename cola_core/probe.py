"""The gradient probe: one pass over the probe rows, each weight's gradient reduced as soon as it is complete.

A module's mean gradient G becomes its importance (GoRA), its sketch S = G A_max^T, from which GoRA's B follows for any
rank, and its Frank-Wolfe gap (COLA); then it is freed. No copy of the model, no optimizer, no step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from cola_core.adapters import Pair
from cola_core.config.recipe import ProfileConfig
from cola_core.errors import UserError
from cola_core.models import as_matrix
from cola_core.reduction import Modules, Reducer, wide
from cola_core.rows import Row
from cola_core.sampled import SampledGradient, both_ends
from cola_core.scoring import Objective

__all__ = ["Profile", "probe"]


@dataclass(frozen=True)
class Profile:
    """What the probe found.

    modules: name -> {importance, gradient_norm, gap, update_nuclear_norm, gap_valid};
    directions: name -> what is kept for the initialiser, by name (`sketch`: S, out x rows);
    loss: mean training loss over the probe rows; examples, tokens: what was computed, charged to the method's budget.
    """

    modules: dict[str, dict[str, Any]]
    directions: dict[str, dict[str, Tensor]]
    loss: float
    examples: int
    tokens: int


def probe(
    objective: Objective,
    rows: Sequence[Row],
    modules: Modules,
    earlier: Mapping[str, Sequence[Pair] | None],
    config: ProfileConfig,
    stream: tuple[int, int],
) -> Profile:
    """Take the gradient of the training loss over all `rows` with respect to the weights of `modules`.

    Args:
        objective: the merged model so far, frozen, without adapters.
        earlier: module -> the pairs already merged into it, for the gap; None where its weight was replaced.
        stream: (seed, link) of the random stream that A_max is drawn from.

    Raises:
        UserError: a gradient is not finite, or a module got none.
    """
    _prepare(objective, config)
    reduce = Reducer(modules, earlier, config, stream)
    loss, units, seen, tokens = PASSES[config.probe](objective, rows, modules, config, reduce)
    if set(reduce.found) != set(modules):
        missing = sorted(set(modules) - set(reduce.found))
        raise UserError(
            f"probe: {missing[0]} and {len(missing) - 1} more modules got no gradient; leave them out of targets"
        )
    found = {name: reduce.found[name] for name in modules}  # model order; gradients arrive last layer first
    return Profile(found, {name: reduce.directions[name] for name in modules}, loss / units, seen, tokens)


def _prepare(objective: Objective, config: ProfileConfig) -> None:
    """Eval mode, all frozen. Checkpointing needs train mode: the base's dropout is 0."""
    objective.requires_grad_(False).eval()
    if config.activation_checkpointing:
        objective.model.activation_checkpointing_enable({"use_reentrant": False})
        objective.train()


def _one_batch(
    objective: Objective, rows: Sequence[Row], modules: Modules, config: ProfileConfig, reduce: Reducer
) -> tuple[float, int, int, int]:
    """All rows in one forward and backward: exact, and no gradient outlives its own module's turn."""
    batch = objective.training_batch(rows)
    units = objective.units(batch)
    with _on_gradient(modules, lambda name, gradient: reduce.whole(name, gradient.div_(units))):
        loss = objective(batch)
        loss.backward()
    return float(loss.detach()), units, len(rows), batch.tokens


def _accumulate(
    objective: Objective, rows: Sequence[Row], modules: Modules, config: ProfileConfig, reduce: Reducer
) -> tuple[float, int, int, int]:
    """Micro-batches summed in fp32 buffers, for probes too large for one batch; may stop early (GoRA's adaptive N)."""
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        sums[name] = sums[name].add_(wide(gradient)) if name in sums else wide(gradient).clone()

    before: dict[str, float] = {}
    so_far = (0.0, 0, 0, 0)
    for step, so_far in enumerate(
        _micro_batches(objective, rows, config, partial(_on_gradient, modules, add)), start=1
    ):
        if config.adaptive:
            now = {name: reduce.importance(name, total / so_far[1]) for name, total in sums.items()}
            if step > 3 and _settled(before, now, config.tolerance):
                break
            before = now
    for name in list(sums):
        reduce.whole(name, sums.pop(name) / so_far[1])
    return so_far


def _sampled(
    objective: Objective, rows: Sequence[Row], modules: Modules, config: ProfileConfig, reduce: Reducer
) -> tuple[float, int, int, int]:
    """Micro-batches of which a share of every gradient's rows is kept: for probes whose fp32 sums would not fit."""
    kept = {name: SampledGradient(reduce, name) for name in modules}
    watched = partial(both_ends, modules, lambda name, x, dy: kept[name].add(x, dy))
    *_, done = _micro_batches(objective, rows, config, watched)
    for gradient in kept.values():
        if gradient.rows is not None:  # else nothing reached it, which `probe` tells
            gradient.finish(done[1])
    return done


PASSES = {"one_batch": _one_batch, "accumulate": _accumulate, "sampled": _sampled}


def _micro_batches(
    objective: Objective,
    rows: Sequence[Row],
    config: ProfileConfig,
    watched: Callable[[], AbstractContextManager[None]],
) -> Iterator[tuple[float, int, int, int]]:
    """Forward and backward of `micro_batch` rows at a time, `watched`; yields loss, units, rows and tokens so far."""
    total, units, seen, tokens = 0.0, 0, 0, 0
    for start in range(0, len(rows), config.micro_batch):
        batch = objective.training_batch(rows[start : start + config.micro_batch])
        with watched():
            loss = objective(batch)
            loss.backward()
        total, units, tokens = total + float(loss.detach()), units + objective.units(batch), tokens + batch.tokens
        seen += len(batch.labels)
        del loss  # and with it what its graph's hooks hold
        yield total, units, seen, tokens


def _settled(before: Mapping[str, float], now: Mapping[str, float], tolerance: float) -> bool:
    return all(abs(now[name] - old) <= tolerance * abs(old) for name, old in before.items())


@contextmanager
def _on_gradient(modules: Modules, receive: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Let the weights ask for gradients; hand each, finished, as out x in, to `receive` once per backward; free it.

    A tensor hook, as in the code GoRA's authors released, fires before its own gradient is stored and loses one;
    `register_post_accumulate_grad_hook` fires after.
    """

    def hook(name: str) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient, weight.grad = weight.grad, None
            receive(name, as_matrix(modules[name], gradient))

        return take

    weights: dict[str, Tensor] = {name: module.weight for name, module in modules.items()}  # type: ignore[misc]
    with ExitStack() as undo:
        for name, weight in weights.items():
            undo.callback(weight.requires_grad_(True).requires_grad_, False)
            undo.enter_context(weight.register_post_accumulate_grad_hook(hook(name)))  # type: ignore[no-untyped-call]
        yield
