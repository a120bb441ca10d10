"""What is published of a chain: its release, gathered from the artifacts, and the folder that a server needs."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cola_core.assets.base import keep_base
from cola_core.checksums import check_files, checksum
from cola_core.config.recipe import MachineConfig
from cola_core.config.report import RegisterConfig
from cola_core.config.task import FetchConfig, PrepareConfig
from cola_core.errors import UserError
from cola_core.lineage import check_manifest, read_chain
from cola_core.sealed import read_sealed, write_sealed
from tasks.card import chain_json, metrics
from tasks.context import Context
from tasks.places import ARTIFACTS, link_dir

__all__ = ["FOLDER", "Release", "gather", "pack", "read_release", "registration"]

FOLDER = ARTIFACTS / "register"
SCORES = ("n", "accuracy", "macro_f1", "loss", "calibration_error")


@dataclass(frozen=True)
class Release:
    """What is written to registration.json, and is enough to register the same version again.

    chain: the chain's hash; serve: serve.json of `cola_core.predict`; scores: the metrics of SCORES.
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
    chain, scored = chain_json(), metrics()
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
    scores = {name: float(scored[name]) for name in SCORES if scored.get(name) is not None}
    return Release(name=register.name, chain=chain["hash"], merged=register.merged, serve=serve, scores=scores, **names)


def pack(release: Release, folder: Path) -> None:
    """Write the folder that `cola_core.predict` loads: the links, or merged weights if they were asked for.

    Raises:
        UserError: the artifacts hold another chain than the release, or are not what was written.
    """
    merge, chain = ARTIFACTS / "merge", chain_json()
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
