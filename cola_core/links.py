"""One link of the chain, as in COLA's Algorithm 1: tune a LoRA on the frozen weights, tie the knot, extend.

The learned pair is written to a file and the next link starts from the base with all files merged, so the knot is tied
by whoever opens the chain next; `tie_knot` proves beforehand that tying it changes no score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cola_core.adapter_files import Adapter
from cola_core.checkpoints import Progress
from cola_core.health import Course, not_finite
from cola_core.job import LinkJob
from cola_core.knot import KNOT_ROWS, exact, merged, sample_scores, tie_knot, tied
from cola_core.models import place
from cola_core.outcome import adapter_of, record_of
from cola_core.scoring import Objective, mean_loss
from cola_core.start import first_layers, first_pairs
from cola_core.train import Training, trained_parameters

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
    progress = _train(training, report)
    told = training.update.record(progress.step, [link.record for link in job.chain[1:]])
    scores = sample_scores(objective, job.validation[:KNOT_ROWS])
    trained = sum(p.numel() for _, role, p in trained_parameters(model, layers) if role != "head")
    adapter = adapter_of(model, layers, job, firsts)
    del objective, model, layers, training
    handed_on = None if exact(job.config) else mean_loss(merged(job, adapter), job.validation, job.config)
    record = record_of(job, adapter, progress, firsts, trained, without, handed_on)
    return adapter, {**record, **told, "knot": tie_knot(job, adapter, scores, record["kept"])}, progress


def _train(training: Training, report: Report) -> Progress:
    """All its steps; stopped by hand, a checkpoint of the last one is kept."""
    try:
        for event in training:
            report({**event, "steps": training.course.config.steps})
    except (KeyboardInterrupt, SystemExit):
        training.keep()
        raise
    return training.progress


def _loss_without(objective: Objective, job: LinkJob, course: Course) -> float:
    """Validation loss of the chain before the link; one that is not finite would drop any link, after all its steps."""
    loss = mean_loss(objective, job.validation, job.config)
    if not math.isfinite(loss):
        raise not_finite("the validation loss of the chain without the link", course, 0)
    return loss
