"""What cannot compose: pairs of values, numbers that do not fit each other, and what a form of export cannot hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cola_core.config.compositions import OWN_PROFILE, SHORTCUTS, STEPPING, refused
from cola_core.config.federation import refused_federation
from cola_core.config.recipe import LinkConfig, ProfileConfig
from cola_core.config.rounds import refused_rounds
from cola_core.errors import UserError

if TYPE_CHECKING:
    from cola_core.config.params import Knot, Params

__all__ = ["check_composition"]


def check_composition(params: Params, key: str, knot: Knot, source: ProfileConfig, links: list[LinkConfig]) -> None:
    """Check one link's settings with each other and with the rest of params.yaml.

    Args:
        knot: the settings of link `key`; source: of the profile that it reads; links: of every link of the chain.

    Raises:
        UserError: the first that cannot compose, with both values and the reason.
    """
    if reason := refused(_values(params, knot, source)):
        raise UserError(f"params.yaml: chain.{key}: {reason}")
    federated = refused_federation(knot.link, links, source, params.prepare.kind, params.fetch.model.kind)
    numbers, outputs = _refused_numbers(params, key, knot, source), _refused_outputs(params, knot, source)
    for wrong, reason in [*numbers, *outputs, *federated, *refused_rounds(knot.link, knot.allocate)]:
        if wrong:
            raise UserError(f"params.yaml: chain.{key}: {reason}")


def _values(params: Params, knot: Knot, source: ProfileConfig) -> dict[str, str]:
    """Every key that names a value of an axis -> that name."""
    link = knot.link
    return {
        "allocate.allocator": knot.allocate.allocator.kind,
        "link.initialiser": link.initialiser.kind,
        "link.parametrisation": link.parametrisation.kind,
        "link.update": link.update.kind,
        "link.pruning": link.pruning.kind,
        "link.scale": link.scale,
        "link.quantise": link.quantise,
        "profile.probe": source.probe,
        "schedule.kind": params.schedule.kind,
        "machine.dtype": params.machine.dtype,
        "machine.device": params.machine.device,
    }


def _refused_numbers(params: Params, key: str, knot: Knot, source: ProfileConfig) -> list[tuple[bool, str]]:
    """What depends on a number or on another link, each with its reason."""
    start, allocator = knot.link.initialiser.kind, knot.allocate.allocator.kind
    most = "r_max" if allocator in ("gora", "eva") else "rank"
    (needed, times), rank = OWN_PROFILE.get(start, ("", 0)), getattr(knot.allocate, most)
    given = getattr(knot.link.initialiser, "sisters", "") == "given"
    form = knot.link.parametrisation
    gates = getattr(form, "start", None)
    return [
        (knot.link.cycles > 1 and params.schedule.learning_rate != "restart",
         f"link.cycles {knot.link.cycles} with schedule.learning_rate {params.schedule.learning_rate!r}: only under "
         "'restart' has a link a schedule of its own"),
        (knot.link.cycles > knot.link.steps,
         f"link.cycles {knot.link.cycles} with link.steps {knot.link.steps}: a cycle needs a step"),
        (params.schedule.kind == "none" and len(params.chain) > 1,
         "schedule.kind 'none' with more than one link: only 'cola' ties knots"),
        (start in OWN_PROFILE and params.chain[key].profile_from != key,
         f"link.initialiser {start!r} with another link's profile: that gradient was taken at other weights"),
        (source.sketch < times * rank,
         f"profile.sketch {source.sketch} below {'2 x ' * (times == 2)}allocate.{most} {rank}: {start!r} takes {times} "
         f"of the profile's directions for every rank; raise profile.sketch to at least {times * rank}"),
        (allocator == "eva" and source.sketch < knot.allocate.r_max,
         f"profile.sketch {source.sketch} below allocate.r_max {knot.allocate.r_max}: 'eva' compares so many axes"),
        (allocator == "eva" and knot.allocate.rank > knot.allocate.r_max,
         "allocate.rank above r_max: the budget of the reference rank could not be spent"),
        (start in STEPPING.split() and gates not in ("one", None),
         f"link.parametrisation.start {gates!r} with link.initialiser {start!r}: such gates would turn its start into "
         "another; use start: one"),
        ((start == "gaussian") != (gates == "zero"),
         f"link.parametrisation.start {gates!r} with link.initialiser {start!r}: zero and 'gaussian' go together, "
         "or nothing would train, or the model would change"),
        (form.kind in SHORTCUTS.split() and form.kind != "res_bs" and knot.link.activation_checkpointing,
         f"link.activation_checkpointing with link.parametrisation {form.kind!r}: a layer computed again would read "
         "what a later block left"),
        (bool(needed) and needed not in source.directions,
         f"link.initialiser {start!r} with profile.directions {source.directions}: it needs {needed!r} among them"),
        (allocator == "eva" and "activations" not in source.directions,
         f"allocate.allocator 'eva' with profile.directions {source.directions}: it needs 'activations' among them"),
        ("gradient" in source.directions and source.probe in ("none", "sampled"),
         f"profile.directions 'gradient' with profile.probe {source.probe!r}: singular vectors need whole gradients"),
        (given and source.sketch < rank,
         f"profile.sketch {source.sketch} below allocate.{most} {rank}: a basis of so many directions is completed by "
         "random ones; raise profile.sketch"),
        (given and "sisters" not in source.directions,
         f"link.initialiser.sisters 'given' with profile.directions {source.directions}: it needs 'sisters' there"),
        ("sisters" in source.directions and not params.fetch.sisters,
         "profile.directions 'sisters' with no fetch.sisters: name at least one model of the same base"),
        (allocator == "gora" and not knot.allocate.r_min <= knot.allocate.rank <= knot.allocate.r_max,
         "allocate.rank outside [r_min, r_max]: the reference rank must be reachable"),
    ]  # fmt: skip


def _refused_outputs(params: Params, knot: Knot, source: ProfileConfig) -> list[tuple[bool, str]]:
    """What the probe, the model or a form of export cannot do, each with its reason."""
    return [
        ((params.prepare.kind == "classify") != (params.fetch.model.kind == "encoder"),
         f"prepare.kind {params.prepare.kind!r} with fetch.model.kind {params.fetch.model.kind!r}: "
         "classify needs an encoder, choice and generate a language model"),
        (knot.link.bias == "lora" and params.machine.dtype == "bf16",
         "link.bias 'lora' with machine.dtype 'bf16': a bias has no fp32 master there, so small steps would be lost"),
        (source.adaptive and source.probe != "accumulate",
         f"profile.adaptive with profile.probe {source.probe!r}: only 'accumulate' looks at importances on its way"),
        (source.probe == "sampled" and source.importance != "mean_abs_wg",
         f"profile.importance {source.importance!r} with profile.probe 'sampled': it needs whole gradients"),
        (source.probe == "sampled" and source.activation_checkpointing,
         "profile.activation_checkpointing with profile.probe 'sampled': it holds every module's input itself"),
        (params.merge.portable_adapter and params.fetch.model.kind == "encoder",
         "merge.portable_adapter with an encoder: its head is saved with the adapter, which servers refuse"),
        (knot.link.quantise != "none" and not params.merge.checkpoint,
         f"link.quantise {knot.link.quantise!r} with merge.checkpoint false: the link replaces weights of the base, so "
         "that no adapter fits it and nothing would be left to hand on"),
        (knot.link.bias == "lora" and (params.merge.flat_adapter or params.merge.portable_adapter),
         "link.bias 'lora' with merge.flat_adapter or portable_adapter: PEFT's readers do not agree on biases"),
    ]  # fmt: skip
