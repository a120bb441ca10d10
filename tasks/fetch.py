"""Fetch the base model and the raw data files that the recipe names, each checked by hash."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cola_core.assets.base import base_folder
from cola_core.assets.references import opened
from cola_core.checksums import seal_folder
from cola_core.config.task import AssetConfig, FetchConfig
from cola_core.errors import UserError, suggest
from cola_core.files import new_dir
from tasks.context import Context, Done
from tasks.places import ARTIFACTS
from tasks.stage import run

__all__ = ["RETRIES", "main"]

RETRIES = 3  # an index or a hub may be away for a moment
FORMATS = ("tab", "tsv", "csv", "jsonl", "json", "parquet")


def main(context: Context) -> Done:
    """Write artifacts/fetch/model and artifacts/fetch/data.

    Raises:
        UserError: a reference that names nothing, or something that cannot be used.
        RetryError: the index or the hub cannot be reached.
    """
    fetch = context.section(FetchConfig, "fetch")
    model, data = ARTIFACTS / "fetch" / "model", ARTIFACTS / "fetch" / "data"
    with new_dir(model) as weights, new_dir(data) as tables:
        for name, asset in (("train", fetch.data.train), ("test", fetch.data.test)):
            if asset is not None:
                _copy(asset, tables, name)
        for file in sorted(base_folder(fetch.model.asset, fetch.model.sha256, fetch.model.kind).iterdir()):
            _link(file, weights / file.name)
        seal_folder(tables)
    sizes = {part.name: sum(file.stat().st_size for file in part.iterdir()) for part in (model, data)}
    return Done(metrics={f"{name}_bytes": float(size) for name, size in sizes.items()}, outputs=[model, data])


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
