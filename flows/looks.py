"""What the command line shows of data and of the trained chain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cola_core.config.base import read_yaml
from cola_core.config.params import check_params
from cola_core.errors import UserError
from flows.child import quiet

__all__ = ["inspect_path", "verify_final"]


def inspect_path(path: Path, rows: int) -> Iterator[str]:
    """Lines about a data file through params.yaml's template, or about a folder that stage `prepare` wrote.

    Raises:
        UserError: no such path, no fetched model to tokenise with, or whatever `prepare` would refuse in the file.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    params = check_params(read_yaml(Path("params.yaml")))
    model = Path("artifacts/fetch/model")
    if not (model / "cola.json").is_file():
        raise UserError(f"{model}: not there, and its tokenizer is needed; run `dvc repro fetch`")
    quiet()
    from transformers import AutoTokenizer

    from cola_core.data.inspection import inspect_file

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    yield from inspect_file(path, params.prepare, tokenizer, rows, params.fetch.model.kind).lines()


def verify_final() -> Iterator[str]:
    """Lines about every prefix of the trained chain, rebuilt from its files.

    Raises:
        UserError: no chain yet, a file that changed, or a prefix whose scores moved.
    """
    params = check_params(read_yaml(Path("params.yaml")))
    last = Path("artifacts/links") / params.final / "adapter"
    if not last.is_dir():
        raise UserError(f"{last}: no chain here; run `dvc repro merge`, or bring a run's results with `cola adopt`")
    quiet()
    from cola_core.verify import verify_chain

    for verdict in verify_chain(last, Path("artifacts/fetch/model"), Path("artifacts/prepare"), params.machine):
        yield f"links 1..{verdict.link}: {verdict.hash[:12]}, scores moved by {verdict.change:.1e}"
    yield "the chain is what it was"
