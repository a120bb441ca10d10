"""Every writer on a disk that fills up, or is read-only.

Run as `unshare --mount python -m tests.chaos.full_disk`; prints one JSON object: writer -> what went wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from cola_core.chain import write_link
from cola_core.checkpoints import Progress, save_checkpoint
from cola_core.checksums import seal_folder
from cola_core.errors import RetryError, UserError, of_the_system
from cola_core.evaluation.answers import Answers, write_predictions
from cola_core.files import new_dir, write_json
from cola_core.models import load_base, save_merged
from cola_core.sealed import write_sealed
from cola_core.split_files import write_rows
from cola_core.tensors import save_tensors
from tasks.context import Context, Done
from tasks.records import record
from tests.lab import FP32, base_of, chain_of, rows_of

PAGE, ROOM = 4096, 1 << 26
Writer = Callable[[Path], object]


@contextmanager
def disk(place: Path, size: int) -> Iterator[None]:
    """A tmpfs of `size` bytes at `place`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def writers(work: Path) -> dict[str, Writer]:
    """Whatever writes an artifact, a checkpoint or a record, by name; each is given a folder."""
    chain, rows = chain_of("llama", work, 1, FP32), rows_of("llama", 600)
    named = {"q.A": Parameter(torch.randn(60, 400)), "q.B": Parameter(torch.randn(400, 60))}
    optimizer, answers = (
        torch.optim.AdamW(named.values()),
        Answers(*(["a"] * 600 for _ in range(3)), *([0.5] * 600 for _ in range(2))),
    )

    def split(folder: Path) -> None:
        with new_dir(folder / "prepare") as new:
            write_rows(new / "train.arrow", rows)
            seal_folder(new)

    def sketch(folder: Path) -> None:
        with new_dir(folder / "profile") as new:
            save_tensors(new / "sketch.safetensors", {"q": torch.randn(200, 200)})
            seal_folder(new)

    def merged(folder: Path) -> None:
        with new_dir(folder / "merge") as new:
            save_merged(load_base(base_of("llama"), FP32), FP32, base_of("llama"), [], new / "checkpoint")

    def left(folder: Path) -> None:
        os.chdir(folder)
        raw: dict[str, Any] = {
            "recipe": "x",
            "task": "y",
            "seed": 0,
            "register": {"name": "z"},
            "rows": list(range(9000)),
        }
        record(Context("fetch", None, raw, record_id="0", used=raw), Done(), time.time())

    return {
        "json": lambda folder: write_json(folder / "a.json", list(range(20_000))),
        "sealed": lambda folder: write_sealed(folder / "ranks.json", "ranks", {"ranks": list(range(20_000))}),
        "split": split,
        "sketch": sketch,
        "checkpoint": lambda folder: save_checkpoint(
            folder / "state.safetensors", Progress(random={}), named, optimizer
        ),
        "link": lambda folder: write_link(
            folder / "links/1/adapter", chain[1].adapter(), {"link": 1}, {"x": "y" * 9000}
        ),
        "predictions": lambda folder: write_predictions(folder / "p.arrow", rows, {"base": answers}),
        "merged": merged,
        "record": left,
    }


def attack(write: Writer, place: Path) -> list[str]:
    """What is wrong with a writer when the disk is too small at every size, and when it cannot be written at all."""
    with disk(place, ROOM):
        write(place)
        first = _files(place)
        os.chdir("/")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        wrong = [f"read-only: {line}" for line in _refusal(write, place, UserError, first)]
    needed = sum(-(-len(content) // PAGE) for content in first.values())
    for pages in sorted({1, needed // 5 + 1, needed // 2, needed - 1} - {0}):
        with disk(place, pages * PAGE):
            wrong += [f"{pages} of {needed} pages: {line}" for line in _refusal(write, place, RetryError, {})]
        with disk(place, (needed + pages) * PAGE):
            write(place)
            again = _refusal(write, place, RetryError, _files(place))
            wrong += [f"beside an old one, {pages} of {needed} pages: {line}" for line in again]
    return wrong


def _refusal(write: Writer, place: Path, kind: type[Exception], before: Mapping[str, bytes]) -> list[str]:
    """What is wrong with how a writer was refused: not at all, not in one line, or the files are not as before."""
    wrong = []
    try:
        write(place)
        wrong.append("it was written")
    except Exception as error:
        told = of_the_system(error)
        if not isinstance(told, kind) or "\n" in str(told):
            wrong.append(f"{type(error).__name__}: {error}")
        now = _files(place)
        if other := [name for name in sorted({*now, *before}) if now.get(name) != before.get(name)]:
            wrong.append(f"left, lost or changed {other}")
    finally:
        os.chdir("/")
    return wrong


def _files(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


if __name__ == "__main__":
    os.environ["GIT_CEILING_DIRECTORIES"] = "/"
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "disk"
        target.mkdir()
        found = {kind: attack(write, target) for kind, write in writers(Path(name)).items()}
    json.dump(found, sys.stdout)
