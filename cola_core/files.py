"""Files that are whole or absent: every write goes to a temporary folder beside its target, is fsynced and renamed.

A temporary folder `.name.*.cola-tmp` holds a kernel lock for as long as its process lives. Whoever makes the next one
in the same place removes those without a lock, so a killed process leaves nothing for long.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cola_core.errors import UserError

__all__ = ["SUFFIX", "new_dir", "new_file", "read_json", "scratch", "sweep", "tree_hash", "write_json"]

SUFFIX = ".cola-tmp"


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder in `parent`, named after `name`, and remove it when the block ends.

    Raises:
        OSError: `parent` cannot be written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    folder, lock = _locked_folder(parent, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(parent: Path) -> list[Path]:
    """Remove the temporary folders in `parent` whose process is gone; returns them."""
    return [path for path in sorted(parent.glob(f".*{SUFFIX}")) if _abandoned(path)]


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path of the same name; it takes the place of `path` when the block ends well.

    Raises:
        OSError: the folder cannot be written; nothing is left behind.
    """
    with scratch(path.parent, path.name) as folder:
        yield folder / path.name
        _sync(folder / path.name)
        (folder / path.name).replace(path)
        _sync(path.parent)


@contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it replaces `path` when the block ends well.

    Raises:
        OSError: the folder cannot be written; nothing is left behind.
    """
    with scratch(path.parent, path.name) as folder, scratch(path.parent, path.name) as grave:
        folder.chmod(0o755)
        yield folder
        for file in sorted(folder.rglob("*")):
            _sync(file)
        if path.exists():
            path.replace(grave / path.name)  # at once, where removing file by file could be cut off halfway
        folder.replace(path)
        _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as sorted, indented JSON; the same value gives the same bytes."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; run the stage that writes it, or `dvc checkout`") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error}); restore it with `dvc checkout`") from None


def tree_hash(path: Path) -> str:
    """sha256 of one file, or of the names and contents of every file below a folder, sorted by name.

    Raises:
        UserError: nothing stands at `path`.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    lines = [f"{f.relative_to(path).as_posix()} {tree_hash(f)}\n" for f in sorted(path.rglob("*")) if f.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _locked_folder(parent: Path, name: str) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock: a shared one, all that some network file systems grant."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=SUFFIX, dir=parent))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process swept it before it was locked
            continue
        with suppress(OSError):  # a file system without locks: nobody can take the folder for abandoned either
            fcntl.flock(lock, fcntl.LOCK_SH)
        if folder.exists():
            return folder, lock
        os.close(lock)  # or just then


def _abandoned(folder: Path) -> bool:
    """Remove `folder` if no living process holds it; whether it did."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    except OSError:
        return False
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
