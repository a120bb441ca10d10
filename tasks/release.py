"""What is published of a chain, gathered from the artifacts: the facts of its card and the folder a server needs."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cola_core.assets.base import keep_base
from cola_core.config.recipe import AllocateConfig, LinkConfig, MachineConfig, ProfileConfig, ScheduleConfig
from cola_core.config.report import RegisterConfig
from cola_core.config.task import FetchConfig, PrepareConfig
from cola_core.errors import UserError
from cola_core.evaluation.card import Facts, render_card
from cola_core.files import read_json
from cola_core.lineage import check_manifest, read_chain, read_manifest
from cola_core.root import base_manifest
from cola_core.sealed import check_files, checksum, read_sealed, write_sealed
from tasks.context import Context
from tasks.places import ARTIFACTS, link_dir

__all__ = ["FOLDER", "Release", "card", "gather", "pack", "read_chain_json", "read_release", "registration"]

FOLDER = ARTIFACTS / "register"
TRAINED: dict[str, type[BaseModel]] = {"link": LinkConfig, "schedule": ScheduleConfig, "machine": MachineConfig}
SCORES = ("n", "accuracy", "macro_f1")


@dataclass(frozen=True)
class Release:
    """What is written to registration.json, and is enough to register the same version again.

    chain: the chain's hash; serve: serve.json of `cola_core.predict`; scores: n, accuracy and macro-F1.
    """

    name: str
    chain: str
    recipe: str
    task: str
    seed: int
    merged: bool
    serve: dict[str, Any]
    scores: dict[str, float]

    @property
    def served(self) -> str:
        """What a version is known by: a hash of the chain, its form and how it is asked."""
        content = json.dumps([self.chain, self.merged, self.serve], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def gather(context: Context) -> Release:
    """Read what is to be published, and put the base where a server finds it by hash.

    Raises:
        UserError: a stage before has not run, or merged weights are asked for and were not made.
    """
    register, fetch = context.section(RegisterConfig, "register"), context.section(FetchConfig, "fetch")
    check_files(ARTIFACTS / "merge")
    chain, metrics = read_chain_json(), _metrics()
    if register.merged and not (ARTIFACTS / "merge/checkpoint").is_dir():
        raise UserError("params.yaml: register.merged: true needs merge.checkpoint: true")
    keep_base(ARTIFACTS / "fetch/model")
    serve = {
        "base": {**chain["base"], "sha256": fetch.model.sha256},
        "final": str(chain["links"][-1]["link"]),
        "dtype": context.section(MachineConfig, "machine").dtype,
        "prepare": context.section(PrepareConfig, "prepare").model_dump(),
    }
    names = {name: context.value(name) for name in ("recipe", "task", "seed")}
    scores = {name: float(metrics[name]) for name in SCORES if metrics.get(name) is not None}
    return Release(name=register.name, chain=chain["hash"], merged=register.merged, serve=serve, scores=scores, **names)


def card(context: Context) -> str:
    """The model card of the chain that stands in the artifacts.

    Raises:
        UserError: params.yaml has changed since the chain was trained, so the card would tell of another one, or what
            it tells of is not what was written.
    """
    chain, fetch = read_chain_json(), context.section(FetchConfig, "fetch")
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
            metrics=_metrics(),
        )
    )


def pack(release: Release, folder: Path) -> None:
    """Write the folder that `cola_core.predict` loads: the links, or merged weights if they were asked for.

    Raises:
        UserError: the artifacts hold another chain than the release, or are not what was written.
    """
    merge, chain = ARTIFACTS / "merge", read_chain_json()
    if chain["hash"] != release.chain:
        raise UserError(f"{merge}: holds chain {chain['hash'][:12]}, not {release.chain[:12]}; run `dvc repro`")
    check_files(merge)
    check_manifest(merge / "chain.json", read_chain(link_dir(str(chain["links"][-1]["link"]))))
    folder.mkdir(parents=True)
    shutil.copyfile(merge / "chain.json", folder / "chain.json")
    shutil.copyfile(ARTIFACTS / "prepare/task.json", folder / "task.json")
    write_sealed(folder / "serve.json", "serve", release.serve)
    if release.merged:
        shutil.copytree(merge / "checkpoint", folder / "checkpoint")
        sums = {file.name: checksum(file) for file in (folder / "checkpoint").iterdir()}
        base = {**release.serve["base"], "note": None, "files": {}, "checksums": sums}
        write_sealed(folder / "checkpoint/cola.json", "base", base)
        return
    for key in ["0", *(str(link["link"]) for link in chain["links"])]:
        shutil.copytree(link_dir(key), folder / "links" / key / "adapter")


def read_release(place: Path = Path()) -> tuple[Release, dict[str, Any]] | None:
    """The release that registration.json of a checkout tells of, and the whole file; None if there is none."""
    path = place / FOLDER / "registration.json"
    if not path.is_file():
        return None
    content = read_sealed(path, "registration")
    return Release(**content["release"]), content


def registration(release: Release, version: str, alias: str, store: str) -> dict[str, Any]:
    """The content of registration.json."""
    top = {"name": release.name, "version": version, "chain": release.chain, "alias": alias, "store": store}
    return {**top, "release": asdict(release)}


def read_chain_json() -> dict[str, Any]:
    """chain.json of the artifacts."""
    return read_manifest(ARTIFACTS / "merge/chain.json")


def _metrics() -> dict[str, Any]:
    """metrics.json of the artifacts."""
    check_files(ARTIFACTS / "evaluate")
    metrics: dict[str, Any] = read_json(ARTIFACTS / "evaluate/metrics.json")
    return metrics


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
        "allocator": [context.section(AllocateConfig, "allocate", key).allocator for key in links],
        "initialiser": [link.initialiser for link in tuned],
        "parametrisation": [link.parametrisation for link in tuned],
        "update": [link.update for link in tuned],
        "schedule": [f"{schedule.kind}, learning rate {schedule.learning_rate}" for _ in links],
        "base store": [machine.dtype for _ in links],
        "probe": [profile.probe for profile in profiles],
    }
