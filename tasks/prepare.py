"""Render, split and tokenise the rows: train, validation, test and probe as Arrow, with a manifest for people."""

from __future__ import annotations

from pathlib import Path

from cola_core.config.task import PrepareConfig
from cola_core.errors import UserError
from tasks.context import Context, Done
from tasks.places import ARTIFACTS
from tasks.stage import run

RETRIES = 0
DATA = ARTIFACTS / "fetch" / "data"
MODEL = ARTIFACTS / "fetch" / "model"
OUT = ARTIFACTS / "prepare"


def data_file(stem: str) -> Path | None:
    """The raw file that stage `fetch` left under this name, whatever its ending."""
    found = sorted(DATA.glob(f"{stem}.*"))
    if len(found) > 1:
        raise UserError(f"{DATA}: {len(found)} files are called {stem}; delete it and run the stage `fetch`")
    return found[0] if found else None


def main(context: Context) -> Done:
    """Write artifacts/prepare; nothing of it depends on time, host or the order of a dictionary."""
    from cola_core.checksums import check_files
    from cola_core.data.encode import Codec, encode
    from cola_core.data.examples import read_examples
    from cola_core.data.prepared import write_prepared
    from cola_core.data.splits import split
    from cola_core.files import new_dir

    config, seed = context.section(PrepareConfig, "prepare"), context.value("seed")
    train, test = data_file("train"), data_file("test")
    if train is None:
        raise UserError(f"{DATA}: no train file; run the stage `fetch` first")
    check_files(DATA)
    splits = split(read_examples(train, config), read_examples(test, config) if test else None, config, seed)
    codec = Codec.load(MODEL)
    encoded = {name: encode(part, config, codec) for name, part in splits.parts().items()}
    files = [path for path in (train, test) if path]
    with new_dir(OUT) as folder:
        manifest = write_prepared(folder, encoded, config, codec, files, splits.duplicate_counts())
    counts = {f"{name}.{key}": part[key] for name, part in manifest["splits"].items() for key in ("rows", "truncated")}
    metrics = {name: float(n) for name, n in {**counts, "duplicates.dropped": splits.duplicates.dropped}.items()}
    outputs = [OUT, *sorted(OUT.glob("*.arrow")), OUT / "task.json"]  # later stages read single files
    return Done(metrics, inputs=[MODEL, DATA], outputs=outputs, artifacts=[OUT / "manifest.json"])


if __name__ == "__main__":
    run(main)
