"""Train one link: COLA's Algorithm 1, step 2, a plain loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from cola_core.adapters import LoRA
from cola_core.axes.parametrisations import PARAMETRISATIONS
from cola_core.axes.prunings import PRUNINGS
from cola_core.axes.schedules import learning_rate_factor
from cola_core.axes.updates import build_optimizer
from cola_core.checkpoints import Progress, load_checkpoint, random_state, save_checkpoint
from cola_core.health import Course, check_divergence, check_finite, not_finite
from cola_core.interrupts import uninterrupted
from cola_core.models import head_parameters
from cola_core.rows import Row
from cola_core.scoring import Objective, mean_loss
from cola_core.seeds import derive

__all__ = ["Training", "trained_parameters"]


class Training:
    """One link's training as an iterable: every step that is taken yields what happened in it.

    {step, loss, learning_rate, tokens, validation}; validation is None between validations. After the last step the
    layers hold the adapter that `config.keep` asks for. A step that was taken before the last checkpoint is not
    repeated.
    """

    def __init__(
        self,
        objective: Objective,
        layers: Mapping[str, LoRA],
        train: Sequence[Row],
        validation: Sequence[Row],
        course: Course,
    ) -> None:
        config = course.config
        self.objective, self.layers, self.course = objective, layers, course
        self.train, self.validation = train, validation
        self.accelerator = Accelerator(cpu=objective.model.device.type == "cpu")
        self.named = {name: parameter for name, _, parameter in trained_parameters(objective.model, layers)}
        self.update = build_optimizer(trained_parameters(objective.model, layers), config, layers)
        self.wrapped, self.optimizer = self.accelerator.prepare(objective, self.update)
        self.pruning = PRUNINGS[config.pruning.kind](layers, self.update, self._sample_loss, course)
        self.held = {**self.named, **dict(_buffers(layers))}
        torch.manual_seed(derive(course.seed, course.link, "dropout"))
        kept = course.checkpoint
        self.progress = load_checkpoint(kept, self.held, self.optimizer) if kept else Progress()
        self.progress.random = self.progress.random or random_state()
        self.kept = self._point()
        self.plan = self.update.plan(train, course)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Train to the end.

        Raises:
            UserError: a loss or a gradient stopped being finite, or the link diverged; says where and what to try.
        """
        config, progress = self.course.config, self.progress
        while self._validation_due() or self._pruning_due() or self._step_due():
            if not self._validation_due() and not self._pruning_due():
                self._step(progress.step)
            if self._validation_due():
                self._validate()
            if self._pruning_due():
                self._prune()
            check_divergence(progress.losses, self.course, self.named)
            yield progress.losses[-1]
            if progress.step % config.checkpoint_every == 0:
                self.keep()
        self.keep()  # what follows, proving the knot, may be stopped too
        if config.keep == "best" and progress.best:
            _restore(self.held, progress.best)
        self.objective.eval()

    def keep(self) -> None:
        """Write the checkpoint of what was done last, if it has none yet; also right after being interrupted."""
        if self.course.checkpoint and self.kept != self._point():
            save_checkpoint(self.course.checkpoint, self.progress, self.held, self.optimizer)
            self.kept = self._point()

    def _point(self) -> tuple[int, bool, int]:
        return self.progress.step, self._validation_due(), self.progress.rounds

    def _step_due(self) -> bool:
        config, progress = self.course.config, self.progress
        patient = config.patience is None or progress.waiting < config.patience
        return progress.step < config.steps and patient

    def _validation_due(self) -> bool:
        """Whether the last step asks for a validation that it has not had: the run may have stopped between them."""
        config, step = self.course.config, self.progress.step
        asked = step > 0 and (step % config.validate_every == 0 or step == config.steps)
        return asked and self.progress.losses[-1]["validation"] is None

    def _pruning_due(self) -> bool:
        """Whether a round has had its turn and was not run; none after the last step, whose result nobody trains."""
        progress = self.progress
        return progress.step < self.course.config.steps and self.pruning.rounds(progress.step) > progress.rounds

    def _prune(self) -> None:
        change = self.pruning.measured(self.progress.rounds)
        with uninterrupted():
            change()
            self.progress.rounds += 1

    def _sample_loss(self) -> float:
        """Mean loss of the validation rows that make one batch."""
        return mean_loss(self.objective, self.validation[: self.course.config.batch], self.course.config)

    def _validate(self) -> None:
        progress, config = self.progress, self.course.config
        loss = mean_loss(self.objective, self.validation, config)
        if not math.isfinite(loss):
            raise not_finite("the validation loss", self.course, progress.step)
        with uninterrupted():
            progress.losses[-1]["validation"] = loss
            _keep_best(progress, loss, self.held)

    def _step(self, step: int) -> None:
        """One optimizer step over what the plan reads; the loss is a mean over its supervised units."""
        config, accelerator, progress = self.course.config, self.accelerator, self.progress
        self.objective.train(config.dropout > 0 or config.base_dropout > 0 or config.activation_checkpointing)
        factor = learning_rate_factor(step, self.course.offset, self.course.schedule, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        mean, tokens = self.update.collect(self.plan[step], self._gradients)
        check_finite(mean, self.named, self.course, step + 1)
        if config.clip is not None:
            accelerator.clip_grad_norm_(list(self.named.values()), config.clip)
        rate = config.learning_rate * factor
        event = {"step": step + 1, "loss": mean, "learning_rate": rate, "tokens": tokens, "validation": None}
        with uninterrupted():  # parameters and progress always tell of the same step
            self.optimizer.step()
            self.optimizer.zero_grad()
            for layer in self.layers.values():
                PARAMETRISATIONS[config.parametrisation.kind].settle(layer)
            progress.step, progress.tokens, progress.random = step + 1, progress.tokens + tokens, random_state()
            progress.losses.append(event)

    def _gradients(self, rows: Sequence[int]) -> tuple[float, int]:
        """Accumulate the gradient of the mean loss over this process's part of `rows`, in groups of similar length.

        Args:
            rows: indices into the training rows.

        Returns:
            mean loss and tokens of all `rows`, over all processes.
        """
        config, accelerator, objective = self.course.config, self.accelerator, self.objective
        mine = [self.train[i] for i in rows[accelerator.process_index :: accelerator.num_processes]]
        groups = objective.groups(mine, config.micro_batch, config.micro_tokens)
        batches = [objective.training_batch([mine[i] for i in group]) for group in groups]
        counts = torch.tensor(
            [sum(map(objective.units, batches)), sum(b.tokens for b in batches)], device=accelerator.device
        )
        units, tokens = (int(n) for n in accelerator.reduce(counts, "sum"))
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            loss = self.wrapped(batch)
            # DDP averages gradients over processes; units are already summed over them.
            accelerator.backward(loss * accelerator.num_processes / units)
            total += loss.detach().double().cpu()
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total.to(accelerator.device), "sum")
        return float(total) / units, tokens


def trained_parameters(model: PreTrainedModel, layers: Mapping[str, LoRA]) -> Iterator[tuple[str, str, Parameter]]:
    """(name, role, parameter) of all that trains: every layer's parts, their biases if asked, an encoder's head."""
    for name, layer in layers.items():
        for part, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield f"{name}.{part}", part, parameter
        bias = getattr(layer.base, "bias", None)
        if bias is not None and bias.requires_grad:
            yield f"{name}.bias", "bias", bias
    for name, parameter in head_parameters(model).items():
        parameter.requires_grad_(True)
        yield name, "head", parameter


def _keep_best(progress: Progress, validation: float, held: Mapping[str, Tensor]) -> None:
    if progress.best_loss is None or validation < progress.best_loss:
        progress.best_loss, progress.best_step, progress.waiting = validation, progress.step, 0
        progress.best = {name: tensor.detach().clone() for name, tensor in held.items()}
    else:
        progress.waiting += 1


def _buffers(layers: Mapping[str, LoRA]) -> Iterator[tuple[str, Tensor]]:
    """What layers hold beside what trains, and change."""
    for name, layer in layers.items():
        for part, tensor in layer.named_buffers(recurse=False):
            yield f"{name}.{part}", tensor


def _restore(held: Mapping[str, Tensor], best: Mapping[str, Tensor]) -> None:
    for name, tensor in held.items():
        tensor.data = best[name].clone()  # of another shape where ranks have changed since
