"""The disk that studies take beside their results: stages that cells share, and cells that nobody finished."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from cola_core.locks import try_lock

__all__ = ["tidy", "used"]


def used(folder: Path) -> int:
    """Bytes below a folder; a link counts for nothing."""
    files = (path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(each.st_size for each in files)


def tidy(folder: Path, limit: float) -> Iterator[Path]:
    """Remove what stands below `.cola/studies` and was not used since `limit`, unless a study runs; yields each.

    A shared stage that is gone is made again by the next cell that needs it.

    Args:
        folder: `.cola/studies`; limit: seconds since 1970.
    """
    with ExitStack() as locks:
        for path in sorted(folder.glob("*.lock")):
            lock = try_lock(path)
            if lock is None:
                return
            locks.enter_context(lock)
        for path in sorted(folder.glob("*/*")):
            if path.lstat().st_mtime <= limit:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                yield path
