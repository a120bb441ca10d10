"""One link of the chain, as in COLA's Algorithm 1: tune a LoRA on the frozen weights, tie the knot, extend.

The learned pair is written to a file and the next link starts from the base with all files merged, so the knot is tied
by whoever opens the chain next; `run_link` proves beforehand that tying it changes no score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cola_core.adapter_files import Adapter
from cola_core.adapters import Pair, add_pair, attach, detach
from cola_core.axes.bases import BASES
from cola_core.axes.initialisers import INITIALISERS, Start
from cola_core.axes.parametrisations import PARAMETRISATIONS
from cola_core.chain import head_of, tie
from cola_core.checkpoints import Progress
from cola_core.config.recipe import LinkConfig, MachineConfig, ScheduleConfig
from cola_core.errors import UserError
from cola_core.health import Course, not_finite
from cola_core.lineage import Link
from cola_core.models import adaptable, head_parameters, load_base, place, weight_shape
from cola_core.ranks import check_ranks
from cola_core.rows import Row, Task
from cola_core.scoring import Objective
from cola_core.train import Training, mean_loss

__all__ = ["LinkJob", "open_chain", "run_link", "sample_scores"]

Report = Callable[[dict[str, Any]], None]

KNOT_ROWS = 8  # validation rows whose scores must not move when the knot is tied


@dataclass(frozen=True)
class LinkJob:
    """Everything that decides one link.

    chain: the root and all earlier links; ranks: module -> r; sketches: module -> S of this link's own probe, or empty;
    checkpoint: where the resume state is kept, None for nowhere; probe_tokens: what this link's own probe has cost.
    """

    base: Path
    chain: Sequence[Link]
    task: Task
    machine: MachineConfig
    schedule: ScheduleConfig
    config: LinkConfig
    seed: int
    ranks: Mapping[str, int]
    sketches: Mapping[str, Tensor]
    train: Sequence[Row]
    validation: Sequence[Row]
    checkpoint: Path | None = None
    probe_tokens: int = 0


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
    objective = open_chain(job.base, job.chain, job.task, job.machine, job.config.base_dropout)  # W^(i-1), frozen
    model, number = objective.model, len(job.chain)
    pairs = initial_pairs(model, job, number)  # a fresh pair on the residual
    offset = sum(link.record["link_section"]["steps"] for link in job.chain[1:])
    course = Course(job.config, job.schedule, job.seed, number, offset, job.checkpoint)
    without = _loss_without(objective, job, course) if job.config.keep_link == "if_better" else None
    if job.config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    layers = attach(model, pairs, job.config.dropout, bias=job.config.bias == "lora")
    training = Training(objective, layers, job.train, job.validation, course)
    try:
        for event in training:
            report({**event, "steps": job.config.steps})
    except (KeyboardInterrupt, SystemExit):
        training.keep()
        raise
    scores = sample_scores(objective, job.validation[:KNOT_ROWS])
    adapter, progress = _adapter(model, job), training.progress
    del objective, model, layers, training
    record = _record(job, adapter, progress, without)
    return adapter, {**record, "knot": _knot(job, adapter, scores, record["kept"])}, progress


def _loss_without(objective: Objective, job: LinkJob, course: Course) -> float:
    """Validation loss of the chain before the link; one that is not finite would drop any link, after all its steps."""
    loss = mean_loss(objective, job.validation, job.config)
    if not math.isfinite(loss):
        raise not_finite("the validation loss of the chain without the link", course, 0)
    return loss


def open_chain(
    base: Path, chain: Sequence[Link], task: Task, machine: MachineConfig, dropout: float = 0.0
) -> Objective:
    """Base + every link of `chain`, merged in the master dtype, cast once and placed (laws 3 and 5)."""
    model = load_base(base, machine, len(task.labels), dropout)
    for _ in tie(model, chain):
        pass
    return Objective(place(model, machine), chain[0].record["base"]["kind"], task)


def initial_pairs(model: PreTrainedModel, job: LinkJob, number: int) -> dict[str, Pair]:
    """A and B of every module, by the recipe's initialiser and parametrisation; rank 0 leaves a module alone."""
    parametrisation = PARAMETRISATIONS[job.config.parametrisation]
    initialise = INITIALISERS[job.config.initialiser]
    modules, dtype = adaptable(model), BASES[job.machine.dtype].adapter
    shapes = {name: weight_shape(module) for name, module in modules.items()}
    pairs = {}
    for name, rank in check_ranks(job.ranks, shapes).items():
        if rank == 0:
            continue
        scale = parametrisation.scale(job.config.alpha, rank)
        start = Start(shapes[name], rank, scale, job.config.gamma, job.sketches.get(name), job.seed, number, name)
        a, b = initialise(start)
        pairs[name] = Pair(a.to(dtype), b.to(dtype), scale)
    return pairs


def sample_scores(objective: Objective, rows: Sequence[Row]) -> Tensor:
    """Candidate scores of a few rows in float64: what a knot must not change."""
    objective.eval()
    with torch.no_grad():
        return objective.scores(objective.scoring_batch(rows)).cpu().double()  # MPS has no float64


def _knot(job: LinkJob, adapter: Adapter, scores: Tensor, kept: bool) -> dict[str, Any]:
    """Tie the knot, or leave the chain as it was: then the scores are those of the chain without the link."""
    rows = job.validation[:KNOT_ROWS]
    if kept:
        return _check_knot(job, adapter, scores, rows)
    before = sample_scores(open_chain(job.base, job.chain, job.task, job.machine), rows)
    return _check_knot(job, replace(adapter, pairs={}, head=head_of(job.chain)), before, rows)


def _check_knot(job: LinkJob, adapter: Adapter, before: Tensor, rows: Sequence[Row]) -> dict[str, Any]:
    """Law 2: rebuild the chain from files, merge the new pair, and compare the scores with the trained model's.

    Returns:
        the change, the merge errors, and the merged model's scores, which `verify_chain` finds again.

    Raises:
        UserError: a score moved by more than the base store's tolerance * max(1, |score|max), or is not finite.
    """
    model = load_base(job.base, job.machine, len(job.task.labels))
    for _ in tie(model, job.chain):
        pass
    errors = {name: add_pair(model.get_submodule(name), pair) for name, pair in adapter.pairs.items()}
    with torch.no_grad():
        for name, parameter in head_parameters(model).items():
            parameter.copy_(adapter.head[name])
    merged = Objective(place(model, job.machine), adapter.kind, job.task)
    after = sample_scores(merged, rows)
    moved = float((after - before).abs().max())
    allowed = BASES[job.machine.dtype].tolerance * max(1.0, float(before.abs().max()))
    if not moved <= allowed:
        raise UserError(_untied(job, f"moves a score by {moved:.3g}, more than {allowed:.3g}", errors))
    return {
        "score_change": moved,
        "merge_error_max": max(errors.values(), default=0.0),
        "merge_error_mean": sum(errors.values()) / max(1, len(errors)),
        "rows": [row.id for row in rows],
        "scores": after.tolist(),
    }


def _untied(job: LinkJob, what: str, errors: Mapping[str, float]) -> str:
    """The line about a knot that was not tied; `not x <= y` finds NaN, which is no maximum of anything."""
    worst = max(errors, key=lambda name: errors[name] if errors[name] <= math.inf else math.inf, default="no module")
    return (
        f"link {len(job.chain)}, after step {job.config.steps}: merging it {what}: the knot is not tied; the largest "
        f"merge error is that of {worst}; link.learning_rate is {job.config.learning_rate:g}: try a tenth of it "
        "or machine.dtype=fp32"
    )


def _adapter(model: PreTrainedModel, job: LinkJob) -> Adapter:
    """What was learned, as a file of its own: PEFT's alpha / r or alpha / sqrt(r) gives back each module's scale."""
    base = job.chain[0].record["base"]
    pairs = {name: Pair(p.a.cpu(), p.b.cpu(), p.scale, p.bias) for name, p in detach(model).items()}
    return Adapter(
        pairs=pairs,
        base=base["asset"],
        kind=base["kind"],
        alpha=dict.fromkeys(pairs, job.config.alpha),
        rslora=PARAMETRISATIONS[job.config.parametrisation].rslora,
        transposed=any(isinstance(model.get_submodule(name), Conv1D) for name in pairs),
        head={name: p.detach().cpu().clone() for name, p in head_parameters(model).items()},
    )


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
