"""Resume state of a long stage: in the main checkout, keyed by all that decides the result, held by one process."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from cola_core.files import tree_hash
from tasks.places import home
from tasks.stage import Context, identity

__all__ = ["forget_finished", "resume_folder"]

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def resume_folder(context: Context, inputs: Sequence[Path]) -> Iterator[Path]:
    """Yield `.cola/resume/<hash of stage, parameters, inputs, code>`, and say `done` in it once the block ends well.

    It cannot lie among the outs: DVC deletes those before a stage runs. It stays until a later stage starts, since DVC
    has the out only by then. While another process is at the same work this one waits, and then goes on from where that
    one ended. The caller has read its parameters already.
    """
    folder = home() / "resume" / _key(context, inputs)
    with _lock(folder, f"{context.stage}: another process is at the same work; this one waits for its result"):
        forget_finished()
        yield folder
        (folder / "done").touch()


def forget_finished() -> None:
    """Remove the resume state of stages that ended well, as a stage after them does when it starts."""
    for note in sorted((home() / "resume").glob("*/done")):
        with suppress(FileNotFoundError), (note.parent / "lock").open("r") as lock:
            if _held(lock):
                shutil.rmtree(note.parent, ignore_errors=True)


def _lock(folder: Path, busy: str) -> TextIO:
    """The locked file of `folder`; `busy` is printed once if another process has it.

    `forget_finished` may remove the folder while this process waits: then it is made again, and locked anew.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / "lock").open("w")
        except FileNotFoundError:
            continue
        if not _held(lock):
            print(busy, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _stands(lock):
            return lock
        lock.close()


def _stands(lock: TextIO) -> bool:
    """Whether the path is still this file."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), Path(lock.name).stat())
    except FileNotFoundError:
        return False


def _held(lock: TextIO) -> bool:
    """Whether this process has the lock now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _key(context: Context, inputs: Sequence[Path]) -> str:
    code = sorted([*(ROOT / "cola_core").rglob("*.py"), *(ROOT / "tasks").glob("*.py")])
    parts = [context.stage, json.dumps(context.used, sort_keys=True)]
    parts += [f"{path.as_posix()} {identity(path)}" for path in inputs]
    parts += [f"{path.relative_to(ROOT).as_posix()} {tree_hash(path)}" for path in code]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
