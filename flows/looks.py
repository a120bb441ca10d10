"""What the command line shows of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cola_core.config.params import check_params
from cola_core.config.reading import load_yaml
from cola_core.config.task import PrepareConfig
from cola_core.errors import UserError
from cola_core.files import read_json
from cola_core.root import base_manifest
from flows.child import quiet
from flows.compose import compose

__all__ = ["inspect_path"]

MODEL = Path("artifacts/fetch/model")


def inspect_path(path: Path, rows: int, picks: Mapping[str, str | None], overrides: Sequence[str]) -> Iterator[str]:
    """Lines about a data file through the parameters' template, or about a folder that stage `prepare` wrote.

    Args:
        rows: samples to show.
        picks, overrides: what changes params.yaml for this look, as in `flows.compose.compose`; the file inspected
            needs no other data file beside it.

    Raises:
        UserError: no such path, a wrong choice or parameter, or whatever `prepare` would refuse in the file.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    changes = [*overrides, "fetch.data.train.asset=path:inspected"] if overrides or any(picks.values()) else []
    params = check_params(load_yaml(compose(Path(), picks, changes)))
    if missing := _no_tokenizer(params.fetch.model.asset):
        yield from _texts(path, params.prepare, rows)
        yield missing
        return
    quiet()
    from cola_core.data.inspection import inspect_file
    from cola_core.data.tokens import open_tokenizer

    tokenizer = open_tokenizer(MODEL)
    yield from inspect_file(path, params.prepare, tokenizer, rows, params.fetch.model.kind).lines()


def _no_tokenizer(asset: str) -> str | None:
    """Why no tokens can be counted as the model `asset` would, if so."""
    if not (MODEL / "cola.json").is_file():
        return f"no tokens counted: {MODEL} is not there; token counts and truncations need `dvc repro fetch`"
    if (found := base_manifest(MODEL)["asset"]) != asset:
        return f"no tokens counted: {MODEL} holds {found}, not {asset}; with that in params.yaml, `dvc repro fetch`"
    return None


def _texts(path: Path, config: PrepareConfig, rows: int) -> Iterator[str]:
    """What can be told without a tokenizer: label balance and whole rendered rows, or a prepared folder's counts."""
    from cola_core.data.examples import label_counts, read_examples
    from cola_core.data.inspection import CLOSE, OPEN, Report

    if path.is_dir():
        manifest = read_json(path / "manifest.json")
        yield from Report(str(path), manifest["splits"], manifest["duplicates"], []).lines()
        return
    examples = read_examples(path, config)
    yield from (str(path), f"  {path.stem}: {len(examples)} rows")
    if counts := label_counts((example.reference for example in examples), config):
        yield "    labels: " + ", ".join(f"{k} {n} ({100 * n / len(examples):.1f} %)" for k, n in counts.items())
    for example in examples[:rows]:
        answer = config.answers[example.reference] if config.kind == "choice" else example.reference
        marked = f"{OPEN}{answer}{CLOSE}" if config.kind != "classify" else ""
        yield from ("", f"{example.id} (label or reference: {example.reference.strip()!r})")
        yield from f"{example.prompt}{marked}".split("\n")
