"""One link of the chain, as in COLA's Algorithm 1: tune a LoRA on the frozen weights, tie the knot, extend.

The learned pair is written to a file and the next link starts from the base with all files merged, so the knot is tied
by whoever opens the chain next; `tie_knot` proves beforehand that tying it changes no score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cola_core.adapter_files import Adapter
from cola_core.adapters import Pair, detach
from cola_core.axes.parametrisations import SCALES
from cola_core.checkpoints import Progress
from cola_core.config.recipe import LinkConfig
from cola_core.health import Course, not_finite
from cola_core.job import LinkJob
from cola_core.knot import KNOT_ROWS, sample_scores, tie_knot, tied
from cola_core.models import head_parameters, place
from cola_core.scoring import Objective
from cola_core.start import first_layers, first_pairs
from cola_core.train import Training, mean_loss

__all__ = ["run_link"]

Report = Callable[[dict[str, Any]], None]


def run_link(job: LinkJob, report: Report = lambda event: None) -> tuple[Adapter, dict[str, Any], Progress]:
    """Train one link and check its knot.

    Args:
        report: called after each step with {step, steps, loss, learning_rate, tokens, validation}.

    Returns:
        the adapter, the content of link.json, and the losses.

    Raises:
        UserError: the ranks are not of this base, training stopped being finite, or tying the knot would change the
            model.
    """
    model = tied(job.base, job.chain, job.task, job.machine, job.config.base_dropout)  # W^(i-1), frozen
    firsts = first_pairs(model, job)  # a fresh pair on the residual
    objective = Objective(place(model, job.machine), job.chain[0].record["base"]["kind"], job.task)
    offset = sum(link.record["link_section"]["steps"] for link in job.chain[1:])
    course = Course(job.config, job.schedule, job.seed, len(job.chain), offset, job.checkpoint)
    without = _loss_without(objective, job, course) if job.config.keep_link == "if_better" else None
    if job.config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    layers = first_layers(model, job, firsts)
    training = Training(objective, layers, job.train, job.validation, course)
    try:
        for event in training:
            report({**event, "steps": job.config.steps})
    except (KeyboardInterrupt, SystemExit):
        training.keep()
        raise
    scores = sample_scores(objective, job.validation[:KNOT_ROWS])
    adapter, progress = _adapter(model, job), training.progress
    told = getattr(training.update, "record", _nothing)(progress.step, [link.record for link in job.chain[1:]])
    del objective, model, layers, training
    record = {**_record(job, adapter, progress, without), **told}
    return adapter, {**record, "knot": tie_knot(job, adapter, scores, record["kept"])}, progress


def _loss_without(objective: Objective, job: LinkJob, course: Course) -> float:
    """Validation loss of the chain before the link; one that is not finite would drop any link, after all its steps."""
    loss = mean_loss(objective, job.validation, job.config)
    if not math.isfinite(loss):
        raise not_finite("the validation loss of the chain without the link", course, 0)
    return loss


def _nothing(steps: int, earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What most updates add to link.json."""
    return {}


def _adapter(model: PreTrainedModel, job: LinkJob) -> Adapter:
    """What was learned, as a file of its own."""
    base = job.chain[0].record["base"]
    pairs = {name: Pair(p.a.cpu(), p.b.cpu(), p.scale, p.bias) for name, p in detach(model).items()}
    return Adapter(
        pairs=pairs,
        base=base["asset"],
        kind=base["kind"],
        alpha={name: _alpha(pair, job.config) for name, pair in pairs.items()},
        rslora=job.config.scale == "rslora",
        transposed=any(isinstance(model.get_submodule(name), Conv1D) for name in pairs),
        head={name: p.detach().cpu().clone() for name, p in head_parameters(model).items()},
    )


def _alpha(pair: Pair, config: LinkConfig) -> float:
    """What PEFT's alpha / r or alpha / sqrt(r) gives the pair's scale from; its rank may not be that of training."""
    if SCALES[config.scale](config.alpha, pair.rank) == pair.scale:
        return config.alpha
    return pair.scale / SCALES[config.scale](1.0, pair.rank)


def _record(job: LinkJob, adapter: Adapter, progress: Progress, without: float | None) -> dict[str, Any]:
    """The content of link.json, knot and file hashes apart; no time, host or path stands in it.

    Args:
        without: validation loss of the chain before this link, where the policy asks for it.
    """
    best = job.config.keep == "best"
    loss = progress.best_loss if best else progress.losses[-1]["validation"]
    assert loss is not None, "the last step is always validated"
    return {
        "link": len(job.chain),
        "parent": {"link": job.chain[-1].number, "hash": job.chain[-1].hash},
        "base": job.chain[0].record["base"],
        "seed": job.seed,
        "link_section": job.config.model_dump(),
        "schedule_section": job.schedule.model_dump(),
        "machine_section": job.machine.model_dump(),
        "optimizer_state_at_start": "empty",
        "steps": progress.step,
        "kept_step": progress.best_step if best else progress.step,
        "kept": without is None or loss < without,
        "validation_before": without,
        "validation_loss": loss,
        "tokens": progress.tokens,
        "probe_tokens": job.probe_tokens,
        "ranks": {name: pair.rank for name, pair in adapter.pairs.items()},
        "trainable_parameters": sum(p.a.numel() + p.b.numel() for p in adapter.pairs.values()),
    }
