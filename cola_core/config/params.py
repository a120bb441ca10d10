"""The whole of params.yaml: every section, the chain's wiring, and which values compose."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import Field, field_validator

from cola_core.config.base import Strict, parse
from cola_core.config.recipe import AllocateConfig, LinkConfig, MachineConfig, ProfileConfig, ScheduleConfig
from cola_core.config.refusals import check_composition
from cola_core.config.report import EvaluateConfig, MergeConfig, PromoteConfig, RegisterConfig
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
    promote: PromoteConfig = Field(default_factory=PromoteConfig)

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
        source = knots[params.chain[key].profile_from].profile
        check_composition(params, key, knot, source, [each.link for each in knots.values()])
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
