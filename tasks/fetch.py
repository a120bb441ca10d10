"""Fetch the base model and the raw data files that the recipe names, each checked by hash."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cola_core.assets.base import base_folder
from cola_core.assets.references import opened
from cola_core.checksums import seal_folder
from cola_core.config.task import AssetConfig, FetchConfig, ModelKind
from cola_core.errors import UserError, suggest
from cola_core.files import new_dir
from cola_core.root import base_manifest
from tasks.context import Context, Done
from tasks.places import ARTIFACTS
from tasks.stage import run

__all__ = ["RETRIES", "main"]

RETRIES = 3  # an index or a hub may be away for a moment
FORMATS = ("tab", "tsv", "csv", "jsonl", "json", "parquet")


def main(context: Context) -> Done:
    """Write artifacts/fetch/model, artifacts/fetch/data and artifacts/fetch/sisters.

    Raises:
        UserError: a reference that names nothing, or something that cannot be used.
        RetryError: the index or the hub cannot be reached.
    """
    fetch = context.section(FetchConfig, "fetch")
    model, data, sisters = (ARTIFACTS / "fetch" / name for name in ("model", "data", "sisters"))
    with new_dir(model) as weights, new_dir(data) as tables, new_dir(sisters) as others:
        for name, asset in (("train", fetch.data.train), ("test", fetch.data.test)):
            if asset is not None:
                _copy(asset, tables, name)
        _model(fetch.model, fetch.model.kind, weights)
        for name, asset in fetch.sisters.items():
            _sister(name, asset, fetch.model.kind, weights, others / name)
        seal_folder(tables)
        seal_folder(others)
    outputs = [model, data, sisters]
    return Done(metrics={f"{part.name}_bytes": _size(part) for part in outputs}, outputs=outputs)


def _size(folder: Path) -> float:
    return float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def _model(asset: AssetConfig, kind: ModelKind, folder: Path) -> None:
    for file in sorted(base_folder(asset.asset, asset.sha256, kind).iterdir()):
        _link(file, folder / file.name)


def _sister(name: str, asset: AssetConfig, kind: ModelKind, base: Path, folder: Path) -> None:
    folder.mkdir()
    _model(asset, kind, folder)
    if base_manifest(folder)["modules"] != base_manifest(base)["modules"]:
        raise UserError(f"fetch.sisters.{name}: its linear maps are not those of fetch.model, so it has another base")


def _copy(asset: AssetConfig, folder: Path, name: str) -> None:
    with opened(asset.asset, asset.sha256) as source:
        ending = source.suffix.removeprefix(".").lower()
        if ending not in FORMATS or not source.is_file():
            raise UserError(f"{asset.asset}: not a data file{suggest(ending, FORMATS)}")
        shutil.copyfile(source, folder / f"{name}.{ending}")


def _link(source: Path, target: Path) -> None:
    """The cache's own file under a second name where the file system can; DVC makes a copy of its own afterwards."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    run(main)
