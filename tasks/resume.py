"""Resume state of a long stage: in the main checkout, keyed by all that decides the result, held by one process."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cola_core.files import tree_hash
from cola_core.locks import alone, try_lock
from tasks.context import Context
from tasks.places import home
from tasks.records import identity

__all__ = ["forget_finished", "resume_folder"]

ROOT = Path(__file__).resolve().parent.parent
HOUR = 3600.0


@contextmanager
def resume_folder(context: Context, inputs: Sequence[Path]) -> Iterator[Path]:
    """Yield `.cola/resume/<hash of stage, parameters, inputs, code>`, and say `done` in it once the block ends well.

    It cannot lie among the outs: DVC deletes those before a stage runs. It stays until a later stage starts, since DVC
    has the out only by then. While another process is at the same work this one waits, and then goes on from where that
    one ended. The caller has read its parameters already.
    """
    folder = home() / "resume" / _key(context, inputs)
    busy = f"{context.stage}: another process is at the same work; this one waits for its result"
    with alone(folder / "lock", lambda: print(busy, flush=True)):
        forget_finished()
        yield folder
        (folder / "done").write_text(str(Path.cwd()), encoding="utf-8")


def forget_finished() -> None:
    """Remove the resume state of stages that ended well, as a stage after them does when it starts.

    In another checkout DVC may still be taking in what they made.
    """
    for note in sorted((home() / "resume").glob("*/done")):
        if lock := try_lock(note.parent / "lock"):
            with lock, suppress(FileNotFoundError):
                mine = note.read_text(encoding="utf-8") in ("", str(Path.cwd()))
                if mine or note.stat().st_mtime < time.time() - HOUR:
                    shutil.rmtree(note.parent, ignore_errors=True)


def _key(context: Context, inputs: Sequence[Path]) -> str:
    code = sorted([*(ROOT / "cola_core").rglob("*.py"), *(ROOT / "tasks").glob("*.py")])
    parts = [context.stage, json.dumps(context.used, sort_keys=True)]
    parts += [f"{path.as_posix()} {identity(path)}" for path in inputs]
    parts += [f"{path.relative_to(ROOT).as_posix()} {tree_hash(path)}" for path in code]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
