"""The one place outside the checkout where fetched things are kept, and the lock that lets workspaces share it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cola_core.locks import alone

__all__ = ["cache_root", "locked"]


def cache_root() -> Path:
    """`$COLA_CACHE`, else `~/.cache/cola`; safe to delete when no stage runs."""
    return Path(os.environ.get("COLA_CACHE") or "~/.cache/cola").expanduser()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path` (a file `path`.lock beside it), waiting for another process that makes the same thing."""
    with alone(path.with_name(path.name + ".lock")):
        yield
