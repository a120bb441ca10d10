"""The model card of the chain that stands in the artifacts, and what it is told from."""

from __future__ import annotations

from typing import Any

from cola_core.checksums import check_files
from cola_core.config.base import Strict
from cola_core.config.recipe import AllocateConfig, LinkConfig, MachineConfig, ProfileConfig, ScheduleConfig
from cola_core.config.report import RegisterConfig
from cola_core.config.task import FetchConfig, PrepareConfig
from cola_core.errors import UserError
from cola_core.evaluation.card import Facts, render_card
from cola_core.files import read_json
from cola_core.lineage import read_manifest
from cola_core.root import base_manifest
from cola_core.sealed import read_sealed
from tasks.context import Context
from tasks.places import ARTIFACTS, link_dir

__all__ = ["card", "chain_json", "metrics"]

TRAINED: dict[str, type[Strict]] = {"link": LinkConfig, "schedule": ScheduleConfig, "machine": MachineConfig}


def card(context: Context) -> str:
    """The model card of the chain that stands in the artifacts.

    Raises:
        UserError: params.yaml has changed since the chain was trained, so the card would tell of another one, or what
            it tells of is not what was written.
    """
    chain, fetch = chain_json(), context.section(FetchConfig, "fetch")
    links = [str(link["link"]) for link in chain["links"]]
    _check_unchanged(context, links)
    data = {"train": fetch.data.train.asset, **({"test": fetch.data.test.asset} if fetch.data.test else {})}
    return render_card(
        Facts(
            name=context.section(RegisterConfig, "register").name,
            recipe=context.value("recipe"),
            task=context.value("task"),
            kind=context.section(PrepareConfig, "prepare").kind,
            seed=context.value("seed"),
            chain=chain,
            note=base_manifest(ARTIFACTS / "fetch/model")["note"],
            axes=_axes(context, links),
            data=data,
            manifest=read_sealed(ARTIFACTS / "prepare/manifest.json", "manifest"),
            metrics=metrics(),
        )
    )


def chain_json() -> dict[str, Any]:
    """chain.json of the artifacts.

    Raises:
        UserError: the chain is not merged, or chain.json is not what was written.
    """
    return read_manifest(ARTIFACTS / "merge/chain.json")


def metrics() -> dict[str, Any]:
    """metrics.json of the artifacts.

    Raises:
        UserError: the chain is not evaluated, or something of its evaluation is not what was written.
    """
    check_files(ARTIFACTS / "evaluate")
    found: dict[str, Any] = read_json(ARTIFACTS / "evaluate/metrics.json")
    return found


def _check_unchanged(context: Context, links: list[str]) -> None:
    if links != list(context.raw["chain"]):
        raise UserError(
            f"params.yaml: chain: has other links than the trained chain ({', '.join(links)}); run `dvc repro`"
        )
    for key in links:
        record = read_sealed(link_dir(key) / "link.json", "link")
        for name, model in TRAINED.items():
            now = context.section(model, name, key if name == "link" else None).model_dump()
            if now != record[f"{name}_section"]:
                raise UserError(f"params.yaml: {name}: is not what link {key} was trained with; run `dvc repro`")


def _axes(context: Context, links: list[str]) -> dict[str, list[str]]:
    """Every axis' value in every link."""
    tuned = [context.section(LinkConfig, "link", key) for key in links]
    profiles = [context.section(ProfileConfig, "profile", key) for key in links]
    schedule, machine = context.section(ScheduleConfig, "schedule"), context.section(MachineConfig, "machine")
    return {
        "allocator": [context.section(AllocateConfig, "allocate", key).allocator.kind for key in links],
        "initialiser": [link.initialiser.kind for link in tuned],
        "parametrisation": [f"{link.parametrisation.kind}, {link.scale} scale" for link in tuned],
        "update": [link.update.kind for link in tuned],
        "schedule": [f"{schedule.kind}, learning rate {schedule.learning_rate}" for _ in links],
        "base store": [_store(machine.dtype, link.quantise) for link in tuned],
        "probe": [profile.probe for profile in profiles],
    }


def _store(dtype: str, quantise: str) -> str:
    return dtype if quantise == "none" else f"{dtype}, {quantise} while it trains"
