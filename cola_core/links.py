"""One whole link: attach, train, detach, and prove that the knot can be tied."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cola_core.adapter_files import Adapter
from cola_core.adapters import Pair
from cola_core.axes.bases import BASES
from cola_core.axes.initialisers import INITIALISERS, Start
from cola_core.axes.parametrisations import PARAMETRISATIONS
from cola_core.batches import Row
from cola_core.checkpoints import Progress
from cola_core.config.recipe import LinkConfig
from cola_core.errors import UserError
from cola_core.models import adaptable, weight_shape
from cola_core.scoring import Objective

__all__ = ["check_knot", "initial_pairs", "losses_csv", "make_adapter", "sample_logits"]


def initial_pairs(
    model: PreTrainedModel,
    ranks: Mapping[str, int],
    sketches: Mapping[str, Tensor],
    config: LinkConfig,
    stream: tuple[int, int],
    dtype: torch.dtype,
) -> dict[str, Pair]:
    """A and B of every module, by the recipe's initialiser and parametrisation.

    Args:
        ranks: module -> r; a rank of 0 leaves the module alone.
        sketches: module -> S of this link's own probe, empty without one.
        stream: (seed, link).
    """
    parametrisation, initialise = PARAMETRISATIONS[config.parametrisation], INITIALISERS[config.initialiser]
    modules = adaptable(model)
    pairs = {}
    for name, rank in ranks.items():
        if rank == 0:
            continue
        scale = parametrisation.scale(config.alpha, rank)
        shape = weight_shape(modules[name])
        a, b = initialise(Start(shape, rank, scale, config.gamma, sketches.get(name), *stream, name))
        pairs[name] = Pair(a.to(dtype), b.to(dtype), scale)
    return pairs


def sample_logits(objective: Objective, rows: Sequence[Row]) -> Tensor:
    """Candidate scores of a few rows, float64: what a knot must not change."""
    objective.eval()
    with torch.no_grad():
        return objective.scores(objective.scoring_batch(rows)).double().cpu()


def check_knot(before: Tensor, after: Tensor, dtype: str, link: int) -> float:
    """Law 2: tying the knot changes no logit.

    Args:
        before, after: scores with the adapter attached, and of the model rebuilt from files with it merged.
        dtype: name of the base store, which states the tolerance.

    Returns:
        the largest change.

    Raises:
        UserError: the change is above tolerance * max(1, |score|max), or not finite.
    """
    error = float((after - before).abs().max())
    allowed = BASES[dtype].tolerance * max(1.0, float(before.abs().max()))
    if not error <= allowed:
        raise UserError(f"link {link}: merging it moves a score by {error:.3g}, more than {allowed:.3g}; not tied")
    return error


def losses_csv(progress: Progress) -> str:
    """One line per step: step, loss, learning_rate, tokens, validation (empty where none was taken)."""
    text = io.StringIO()
    fields = ["step", "loss", "learning_rate", "tokens", "validation"]
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(progress.losses)
    return text.getvalue()


def make_adapter(pairs: Mapping[str, Pair], config: LinkConfig, base: Mapping[str, Any], head: dict[str, Tensor]) -> Adapter:
    """The adapter file of one link: PEFT's own scale, alpha / r or alpha / sqrt(r)."""
    return Adapter(
        pairs=dict(pairs),
        base=base["asset"],
        kind=base["kind"],
        alpha=dict.fromkeys(pairs, config.alpha),
        rslora=PARAMETRISATIONS[config.parametrisation].rslora,
        transposed=base["family"] == "gpt2",
        head=head,
    )

