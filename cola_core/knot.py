"""A chain opened for scoring, and the proof that tying one more knot changes no score."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cola_core.adapter_files import Adapter
from cola_core.adapters import add_pair
from cola_core.axes.bases import BASES
from cola_core.axes.parametrisations import PARAMETRISATIONS
from cola_core.chain import head_of, tie
from cola_core.config.recipe import LinkConfig, MachineConfig
from cola_core.errors import UserError
from cola_core.job import LinkJob
from cola_core.lineage import Link
from cola_core.models import head_parameters, load_base, place
from cola_core.quantisation import restore
from cola_core.rows import Row, Task
from cola_core.scoring import Objective

__all__ = ["KNOT_ROWS", "exact", "merged", "open_chain", "sample_scores", "tie_knot", "tied"]

KNOT_ROWS = 8  # validation rows whose scores must not move when the knot is tied


def open_chain(
    base: Path, chain: Sequence[Link], task: Task, machine: MachineConfig, dropout: float = 0.0
) -> Objective:
    """Base + every link of `chain`, merged in the master dtype, cast once and placed (laws 3 and 5)."""
    model = tied(base, chain, task, machine, dropout)
    return Objective(place(model, machine), chain[0].record["base"]["kind"], task)


def tied(
    base: Path, chain: Sequence[Link], task: Task, machine: MachineConfig, dropout: float = 0.0
) -> PreTrainedModel:
    """Base + every link of `chain`, merged in the master dtype: W^(i-1) before it is cast."""
    model = load_base(base, machine, len(task.labels), dropout)
    for _ in tie(model, chain):
        pass
    return model


def sample_scores(objective: Objective, rows: Sequence[Row]) -> Tensor:
    """Candidate scores of a few rows in float64: what a knot must not change."""
    objective.eval()
    with torch.no_grad():
        return objective.scores(objective.scoring_batch(rows)).cpu().double()  # MPS has no float64


def tie_knot(job: LinkJob, adapter: Adapter, scores: Tensor, kept: bool) -> dict[str, Any]:
    """Tie the knot, or leave the chain as it was: then the scores are those of the chain without the link.

    Args:
        scores: what the trained model says of the first KNOT_ROWS rows of the validation split, from `sample_scores`.
        kept: whether the link is part of the model.

    Returns:
        the change, the merge errors, and the merged model's scores, which `verify_chain` finds again.

    Raises:
        UserError: a score moved by more than the base store's tolerance * max(1, |score|max), or is not finite.
    """
    rows = job.validation[:KNOT_ROWS]
    if kept:
        return _check(job, adapter, scores, rows)
    before = sample_scores(open_chain(job.base, job.chain, job.task, job.machine), rows)
    return _check(job, replace(adapter, pairs={}, bases={}, head=head_of(job.chain)), before, rows)


def _check(job: LinkJob, adapter: Adapter, before: Tensor, rows: Sequence[Row]) -> dict[str, Any]:
    """Law 2: rebuild the chain from files, merge the new pair, and compare the scores with those of before.

    A form that has no exact merge only has its change recorded, as long as it is finite.
    """
    errors: dict[str, float] = {}
    after = sample_scores(merged(job, adapter, errors), rows)
    moved = float((after - before).abs().max())
    tolerance = BASES[job.machine.dtype].tolerance if exact(job.config) else sys.float_info.max
    allowed = tolerance * max(1.0, float(before.abs().max()))
    if not moved <= allowed:
        raise UserError(_untied(job, f"moves a score by {moved:.3g}, more than {allowed:.3g}", errors))
    return {
        "exact": exact(job.config),
        "score_change": moved,
        "merge_error_max": max(errors.values(), default=0.0),
        "merge_error_mean": sum(errors.values()) / max(1, len(errors)),
        "rows": [row.id for row in rows],
        "scores": after.tolist(),
    }


def exact(config: LinkConfig) -> bool:
    """Whether the recipe's form merges into what it computes while it trains."""
    return PARAMETRISATIONS[config.parametrisation.kind].exact


def merged(job: LinkJob, adapter: Adapter, errors: dict[str, float] | None = None) -> Objective:
    """The chain with the new link, as the next link will open it; `errors` takes every module's merge error."""
    model, found = tied(job.base, job.chain, job.task, job.machine), {} if errors is None else errors
    for name, held in adapter.bases.items():
        restore(model.get_submodule(name), held)
    found |= {name: add_pair(model.get_submodule(name), pair) for name, pair in adapter.pairs.items()}
    with torch.no_grad():
        for name, parameter in head_parameters(model).items():
            parameter.copy_(adapter.head[name])
    return Objective(place(model, job.machine), adapter.kind, job.task)


def _untied(job: LinkJob, what: str, errors: Mapping[str, float]) -> str:
    """The line about a knot that was not tied; `not x <= y` finds NaN, which is no maximum of anything."""
    worst = max(errors, key=lambda name: errors[name] if errors[name] <= math.inf else math.inf, default="no module")
    return (
        f"link {len(job.chain)}, after step {job.config.steps}: merging it {what}: the knot is not tied; the largest "
        f"merge error is that of {worst}; link.learning_rate is {job.config.learning_rate:g}: try a tenth of it "
        "or machine.dtype=fp32"
    )
