"""The start of a link: its first pairs, drawn from the weights as they are, and its layers around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from cola_core.adapters import LoRA, Pair, attach
from cola_core.axes.bases import BASES
from cola_core.axes.initialisers import INITIALISERS, First, Start
from cola_core.axes.parametrisations import PARAMETRISATIONS, SCALES
from cola_core.chain import earlier_pairs
from cola_core.job import LinkJob
from cola_core.models import adaptable, as_matrix, weight_shape
from cola_core.quantisation import QuantisedLinear, quantise
from cola_core.ranks import check_ranks
from cola_core.seeds import of_layer

__all__ = ["first_layers", "first_pairs"]


def first_pairs(model: PreTrainedModel, job: LinkJob) -> dict[str, First]:
    """A and B of every module by the recipe's initialiser; rank 0 leaves a module alone.

    Args:
        model: base and chain, merged, in the master dtype.
    """
    config, modules = job.config, adaptable(model)
    earlier, last = earlier_pairs(job.chain)
    initialise, firsts = INITIALISERS[config.initialiser.kind], {}
    for name, rank in check_ranks(job.ranks, {n: weight_shape(m) for n, m in modules.items()}).items():
        if rank:
            start = Start(
                as_matrix(modules[name]), rank, SCALES[config.scale](config.alpha, rank), job.directions.get(name, {}),
                earlier.get(name, []), job.seed, len(job.chain), name, config.quantise, last.get(name),
            )  # fmt: skip
            firsts[name] = _stored(start, initialise(start, config.initialiser))
    return firsts


def first_layers(model: PreTrainedModel, job: LinkJob, firsts: Mapping[str, First]) -> dict[str, LoRA]:
    """Layers that start from `firsts`, around the modules of the placed model, whose weights may be quantised."""
    config, dtype = job.config, BASES[job.machine.dtype].adapter
    form, scale = PARAMETRISATIONS[config.parametrisation.kind], SCALES[config.scale]
    # Dense, as a checkpoint gives them back: how a factor is laid out decides how its products are summed (law 7).
    factors = {n: (f.a.to(dtype).contiguous(), f.b.to(dtype).contiguous()) for n, f in firsts.items()}
    pairs = {n: Pair(a, b, scale(config.alpha, len(a))) for n, (a, b) in factors.items()}
    for name, first in firsts.items():
        if first.base is not None:
            model.set_submodule(name, QuantisedLinear(model.get_submodule(name), first.base))
    layers = attach(model, pairs, config.dropout, config.bias == "lora", form)
    for name, layer in layers.items():
        if firsts[name].kept:
            layer.given = Pair(layer.A.detach().clone(), layer.B.detach().clone(), layer.scale)
        form.prepare(layer, config.parametrisation, of_layer(job.seed, len(job.chain), name))
    form.connect(layers, config.parametrisation)
    return layers


def _stored(start: Start, first: First) -> First:
    """What the link starts from with its base quantised: by the initialiser, or as it is (QLoRA; GoRA's QGoRA).

    A step that the initialiser takes on purpose is no error; a pair that was chosen with its base makes up for it.
    """
    if start.store == "none":
        return first
    weight, base = start.weight.double(), first.base or quantise(start.weight, start.store)
    missing = weight - base.dense().double()
    if first.base is not None:
        missing -= start.scale * first.b @ first.a
    return replace(first, base=base, error=float(missing.norm() / weight.norm().clamp_min(1e-30)))
