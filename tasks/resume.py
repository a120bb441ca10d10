"""Resume state of a long stage: in the main checkout, keyed by all that decides the result, held by one process."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from cola_core.errors import RetryError
from cola_core.files import tree_hash
from tasks.places import home
from tasks.stage import Context, identity

__all__ = ["forget_finished", "resume_folder"]

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def resume_folder(context: Context, inputs: Sequence[Path]) -> Iterator[Path]:
    """Yield `.cola/resume/<hash of stage, parameters, inputs, code>`, and say `done` in it once the block ends well.

    It cannot lie among the outs: DVC deletes those before a stage runs. It stays until a later stage starts, since DVC
    has the out only by then. The caller has read its parameters already.

    Raises:
        RetryError: another process is at the same work.
    """
    folder = home() / "resume" / _key(context, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        if not _held(lock):
            raise RetryError(f"{context.stage}: another process is at the same work; wait for it")
        forget_finished()
        yield folder
        (folder / "done").touch()


def forget_finished() -> None:
    """Remove the resume state of stages that ended well, as a stage after them does when it starts."""
    for note in sorted((home() / "resume").glob("*/done")):
        with suppress(FileNotFoundError), (note.parent / "lock").open("r") as lock:
            if _held(lock):
                shutil.rmtree(note.parent, ignore_errors=True)


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
