"""Train one link: COLA's Algorithm 1, step 2, a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel

from cola_core.adapters import LoRA
from cola_core.axes.schedules import learning_rate_factor
from cola_core.axes.updates import build_optimizer
from cola_core.batches import Row, group_by_length, order
from cola_core.checkpoints import Progress, load_checkpoint, save_checkpoint
from cola_core.config.recipe import LinkConfig, ScheduleConfig
from cola_core.errors import UserError
from cola_core.models import head_parameters
from cola_core.scoring import Objective, batches_of
from cola_core.seeds import derive

__all__ = ["Course", "train_link", "trained_parameters"]

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Course:
    """What a link is trained by.

    offset: optimizer steps of all earlier links (the global learning rate goes on from there);
    checkpoint: where to keep the resume state, None for nowhere.
    """

    config: LinkConfig
    schedule: ScheduleConfig
    seed: int
    link: int
    offset: int = 0
    checkpoint: Path | None = None


def train_link(
    objective: Objective,
    layers: Mapping[str, LoRA],
    train: Sequence[Row],
    validation: Sequence[Row],
    course: Course,
    report: Report = lambda event: None,
) -> Progress:
    """Train the attached layers (and an encoder's head) in place, from the last checkpoint if there is one.

    Args:
        layers: module -> its layer, from `attach`.
        report: called after each step with {step, steps, loss, learning_rate, tokens, validation}.

    Returns:
        what happened; the layers hold the adapter that `config.keep` asks for.

    Raises:
        UserError: the loss or a gradient stopped being finite; says at which step and what to try.
    """
    config = course.config
    accelerator = Accelerator(cpu=objective.model.device.type == "cpu")
    named = {name: parameter for name, _, parameter in trained_parameters(objective.model, layers)}
    optimizer = build_optimizer(trained_parameters(objective.model, layers), config)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    torch.manual_seed(derive(course.seed, course.link, "dropout"))
    progress = load_checkpoint(course.checkpoint, named, optimizer) if course.checkpoint else Progress()
    plan = order(len(train), config.batch, config.steps, derive(course.seed, course.link, "data"))
    for step in range(progress.step, config.steps):
        if config.patience is not None and progress.waiting >= config.patience:
            break
        rows = [train[i] for i in plan[step]]
        event = _step(accelerator, wrapped, optimizer, objective, rows, named, course, step)
        progress.step, progress.tokens = step + 1, progress.tokens + event["tokens"]
        if progress.step % config.validate_every == 0 or progress.step == config.steps:
            event["validation"] = mean_loss(objective, validation, config.micro_batch)
            _keep_best(progress, event["validation"], named)
        progress.losses.append(event)
        report({**event, "steps": config.steps})
        if course.checkpoint and progress.step % config.checkpoint_every == 0:
            save_checkpoint(course.checkpoint, progress, named, optimizer)
    if config.keep == "best" and progress.best:
        _restore(named, progress.best)
    objective.eval()
    return progress


def _step(
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    rows: Sequence[Row],
    named: Mapping[str, Parameter],
    course: Course,
    step: int,
) -> dict[str, Any]:
    """One optimizer step over `rows`; the loss is normalised by the supervised units of the whole step."""
    config = course.config
    objective.train(config.dropout > 0 or config.base_dropout > 0 or config.activation_checkpointing)
    factor = learning_rate_factor(step, course.offset, course.schedule, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    groups = group_by_length([len(row.prompt) + len(row.answer) for row in mine], config.micro_batch)
    batches = [objective.training_batch([mine[i] for i in group]) for group in groups]
    counts = torch.tensor(
        [sum(map(objective.units, batches)), sum(b.tokens for b in batches)], device=accelerator.device
    )
    units, tokens = (int(n) for n in accelerator.reduce(counts, "sum"))
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = wrapped(batch)
        # DDP averages gradients over processes; units are already summed over them.
        accelerator.backward(loss * accelerator.num_processes / units)
        total += loss.detach().double().cpu()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total.to(accelerator.device), "sum")
    mean = float(total) / units
    _check_finite(mean, named, course, step)
    if config.clip is not None:
        accelerator.clip_grad_norm_(list(named.values()), config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return {
        "step": step + 1,
        "loss": mean,
        "learning_rate": config.learning_rate * factor,
        "tokens": tokens,
        "validation": None,
    }


def mean_loss(objective: Objective, rows: Sequence[Row], size: int) -> float:
    """Mean training loss over `rows`, in eval mode, without gradients."""
    objective.eval()
    total, units = 0.0, 0
    with torch.no_grad():
        for indices in batches_of(rows, size):
            batch = objective.training_batch([rows[i] for i in indices])
            total, units = total + float(objective(batch)), units + objective.units(batch)
    return total / units


def trained_parameters(model: PreTrainedModel, layers: Mapping[str, LoRA]) -> Iterator[tuple[str, str, Parameter]]:
    """(name, role, parameter) of all that trains: A and B of every layer, their biases if asked, an encoder's head."""
    for name, layer in layers.items():
        yield f"{name}.A", "A", layer.A
        yield f"{name}.B", "B", layer.B
        bias = getattr(layer.base, "bias", None)
        if bias is not None and bias.requires_grad:
            yield f"{name}.bias", "bias", bias
    for name, parameter in head_parameters(model).items():
        parameter.requires_grad_(True)
        yield name, "head", parameter


def _keep_best(progress: Progress, validation: float, named: Mapping[str, Parameter]) -> None:
    """NaN never becomes best: the comparison is false."""
    if progress.best_loss is None or validation < progress.best_loss:
        progress.best_loss, progress.best_step, progress.waiting = validation, progress.step, 0
        progress.best = {name: parameter.detach().clone() for name, parameter in named.items()}
    else:
        progress.waiting += 1


def _restore(named: Mapping[str, Parameter], best: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(best[name])


def _check_finite(loss: float, named: Mapping[str, Parameter], course: Course, step: int) -> None:
    bad = [n for n, p in named.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    if math.isfinite(loss) and not bad:
        return
    where = f"the gradient of {bad[0]}" if bad else "the loss"
    raise UserError(
        f"link {course.link}, step {step + 1}: {where} is not finite at link.learning_rate "
        f"{course.config.learning_rate:g}; try a tenth of it, link.clip=1.0 or machine.dtype=fp32"
    )
