"""The whole of params.yaml: every section, the chain's wiring, and which values compose."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import Field, field_validator

from cola_core.config.base import Strict, parse
from cola_core.config.compositions import OWN_PROFILE, SHORTCUTS, STEPPING, refused
from cola_core.config.federation import refused_federation
from cola_core.config.recipe import AllocateConfig, LinkConfig, MachineConfig, ProfileConfig, ScheduleConfig
from cola_core.config.report import EvaluateConfig, MergeConfig, RegisterConfig
from cola_core.config.task import FetchConfig, HeadConfig, PrepareConfig
from cola_core.errors import UserError

__all__ = ["Params", "check_chain", "check_params"]


class Item(Strict):
    """One link of `chain`: its parent, whose profile it reads, and what it changes in the shared sections."""

    prev: str
    profile_from: str
    profile: dict[str, Any]
    allocate: dict[str, Any]
    link: dict[str, Any]


class Params(Strict):
    """params.yaml."""

    recipe: str
    task: str
    seed: int
    final: str
    targets: str | list[str]
    machine: MachineConfig
    fetch: FetchConfig
    prepare: PrepareConfig
    head: HeadConfig
    schedule: ScheduleConfig
    profile: dict[str, Any]
    allocate: dict[str, Any]
    link: dict[str, Any]
    chain: dict[str, Item]
    merge: MergeConfig
    evaluate: EvaluateConfig
    registry: RegisterConfig = Field(alias="register")

    @field_validator("targets", mode="before")
    @classmethod
    def _names_something(cls, value: Any) -> Any:
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError("needs all, query_value, or at least one ending of module names such as [q_proj, v_proj]")
        return value


Section = TypeVar("Section", ProfileConfig, AllocateConfig, LinkConfig)


class Knot(Strict):
    """The settings of one link after its own changes."""

    profile: ProfileConfig
    allocate: AllocateConfig
    link: LinkConfig


def check_params(raw: dict[str, Any]) -> Params:
    """Everything that can be wrong with params.yaml, checked before any work starts.

    Raises:
        UserError: the first mistake, in one line.
    """
    check_chain(raw)
    params = parse(Params, raw, "")
    knots = {key: knot_of(params, key) for key in params.chain}
    for key, knot in knots.items():
        _check_composition(params, key, knot)
    total = sum(knot.link.steps for knot in knots.values())
    if total != params.schedule.horizon:
        raise UserError(
            f"params.yaml: schedule.horizon: is {params.schedule.horizon}, but the links' steps add up to {total}; "
            "the two must be equal"
        )
    return params


def check_chain(raw: dict[str, Any]) -> None:
    """Check the raw chain before DVC templates it: DVC drops an unquoted integer key without a word.

    Raises:
        UserError: keys not quoted or not '1'..'M', `prev` not k-1, `final` not M, `profile_from` ahead of its link.
    """
    chain = raw.get("chain")
    if not isinstance(chain, dict) or not chain:
        raise UserError("params.yaml: chain: needs at least the link '1'")
    for key in chain:
        if not isinstance(key, str):
            raise UserError(f"params.yaml: chain.{key}: the key must be quoted ('{key}'); DVC drops a bare number")
    wanted = [str(k + 1) for k in range(len(chain))]
    if sorted(chain) != sorted(wanted):
        raise UserError(f"params.yaml: chain: links are {', '.join(chain)}; they must be {', '.join(wanted)}, no gap")
    for key in wanted:
        _check_wiring(key, chain[key])
    if raw.get("final") != wanted[-1]:
        raise UserError(f"params.yaml: final: is {raw.get('final')!r}; the chain's last link is '{wanted[-1]}'")


def _check_wiring(key: str, item: Any) -> None:
    where = f"params.yaml: chain.{key}"
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected prev, profile_from, profile, allocate and link")
    before = str(int(key) - 1)
    if item.get("prev") != before:
        raise UserError(
            f"{where}.prev: is {item.get('prev')!r}; link '{key}' follows '{before}', anything else is a cycle"
        )
    source = item.get("profile_from")
    if source not in [str(k + 1) for k in range(int(key))]:
        raise UserError(f"{where}.profile_from: is {source!r}; allowed: a quoted link from '1' to '{key}'")


def knot_of(params: Params, key: str) -> Knot:
    """The shared sections with the changes of one link.

    Raises:
        UserError: a mistake in either.
    """
    return Knot(
        profile=_section(ProfileConfig, params, key, "profile"),
        allocate=_section(AllocateConfig, params, key, "allocate"),
        link=_section(LinkConfig, params, key, "link"),
    )


def _section(model: type[Section], params: Params, key: str, name: str) -> Section:
    """A shared section, checked first and under its own name, then with the changes of one link under theirs."""
    shared, changes, here = getattr(params, name), getattr(params.chain[key], name), f"chain.{key}.{name}"
    parse(model, {**changes, **shared}, name, dict.fromkeys(changes.keys() - shared.keys(), here))
    return parse(model, {**shared, **changes}, name, dict.fromkeys(changes, here))


def _check_composition(params: Params, key: str, knot: Knot) -> None:
    """Refuse what cannot compose, naming both values and the reason."""
    source = knot_of(params, params.chain[key].profile_from).profile
    if reason := refused(_values(params, knot, source)):
        raise UserError(f"params.yaml: chain.{key}: {reason}")
    links = [knot_of(params, other).link for other in params.chain]
    federated = refused_federation(knot.link, links, source, params.prepare.kind, params.fetch.model.kind)
    numbers, outputs = _refused_numbers(params, key, knot, source), _refused_outputs(params, knot, source)
    for wrong, reason in [*numbers, *outputs, *federated]:
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
    return [
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
        (start in STEPPING.split() and getattr(form, "start", "") == "normal",
         f"link.parametrisation.start 'normal' with link.initialiser {start!r}: random gates would turn its start into "
         "another; use start: one"),
        (form.kind in SHORTCUTS.split() and form.kind != "res_bs" and knot.link.activation_checkpointing,
         f"link.activation_checkpointing with link.parametrisation {form.kind!r}: a layer computed again would read "
         "what a later block left"),
        (bool(needed) and needed not in source.directions,
         f"link.initialiser {start!r} with profile.directions {source.directions}: it needs {needed!r} among them"),
        (allocator == "eva" and "activations" not in source.directions,
         f"allocate.allocator 'eva' with profile.directions {source.directions}: it needs 'activations' among them"),
        ("gradient" in source.directions and source.probe in ("none", "sampled"),
         f"profile.directions 'gradient' with profile.probe {source.probe!r}: singular vectors need whole gradients"),
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
