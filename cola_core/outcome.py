"""What a link leaves behind: its adapter and the content of link.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from cola_core.adapter_files import Adapter
from cola_core.adapters import LoRA, Pair, detach
from cola_core.axes.initialisers import First
from cola_core.axes.parametrisations import SCALES
from cola_core.checkpoints import Progress
from cola_core.config.recipe import LinkConfig
from cola_core.errors import UserError
from cola_core.job import LinkJob
from cola_core.models import head_parameters, keeps_transposed
from cola_core.nola_files import Drawn

__all__ = ["adapter_of", "record_of"]


def adapter_of(
    model: PreTrainedModel, layers: Mapping[str, LoRA], job: LinkJob, firsts: Mapping[str, First]
) -> Adapter:
    """What was learned, and the quantised weights that it was learned on; the layers are taken off the model.

    Raises:
        UserError: nothing is left of any pair.
    """
    base, drawn = job.chain[0].record["base"], _drawn(layers, job)
    pairs = {name: pair.to("cpu") for name, pair in detach(model).items() if pair.rank or pair.bias is not None}
    if not pairs:
        raise UserError(
            f"link {len(job.chain)}: training took every rank away; lower link.update.threshold or take fewer steps"
        )
    return Adapter(
        pairs=pairs,
        base=base["asset"],
        kind=base["kind"],
        alpha={name: _alpha(pair, job.config) for name, pair in pairs.items()},
        rslora=job.config.scale == "rslora",
        transposed=any(keeps_transposed(model.get_submodule(name)) for name in pairs),
        head={name: p.detach().cpu().clone() for name, p in head_parameters(model).items()},
        drawn=drawn,
        bases={name: first.base for name, first in firsts.items() if first.base is not None},
    )


def _drawn(layers: Mapping[str, LoRA], job: LinkJob) -> Drawn | None:
    """What the file holds instead of A and B; None for forms whose file holds these."""
    stored = {name: layer.form.stored(layer) for name, layer in layers.items() if layer.form.stored}
    parts = {name: (a.detach().cpu().clone(), b.detach().cpu().clone()) for name, (a, b) in stored.items()}
    return Drawn(job.seed, len(job.chain), job.config.initialiser.kind, parts) if parts else None


def _alpha(pair: Pair, config: LinkConfig) -> float:
    """What PEFT's alpha / r or alpha / sqrt(r) gives the pair's scale from; its rank may not be that of training."""
    rule = "rslora" if config.scale == "rslora" else "lora"  # the two that PEFT's files know
    if SCALES[rule](config.alpha, pair.rank) == pair.scale:
        return config.alpha
    return pair.scale / SCALES[rule](1.0, pair.rank)


def record_of(
    job: LinkJob,
    adapter: Adapter,
    progress: Progress,
    firsts: Mapping[str, First],
    trained: int,
    without: float | None,
    handed_on: float | None,
) -> dict[str, Any]:
    """The content of link.json, knot and file hashes apart; no time, host or path stands in it.

    Args:
        trained: numbers that trained in the modules; an encoder's head, the same in every method, is not counted.
        without: validation loss of the chain before this link, where the policy asks for it.
        handed_on: that of the merged model, where merging changes what was trained.
    """
    best = job.config.keep == "best"
    loss = progress.best_loss if best else progress.losses[-1]["validation"]
    assert loss is not None, "the last step is always validated"
    errors = [first.error for first in firsts.values()]  # ||W - (Q + s B_0 A_0)|| / ||W||, 0 unless quantised
    as_trained, loss = loss, loss if handed_on is None else handed_on
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
        "validation_loss_as_trained": as_trained,
        "tokens": progress.tokens,
        "probe_tokens": job.probe_tokens,
        "ranks": {name: pair.rank for name, pair in adapter.pairs.items()},
        "given_ranks": {name: len(first.a) for name, first in firsts.items() if first.kept and name in adapter.pairs},
        "trainable_parameters": trained,
        "start_error": {"max": max(errors), "mean": sum(errors) / len(errors)},
    }
