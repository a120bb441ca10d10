"""Locks that a killed process cannot leave behind: the kernel drops a flock with the last process that holds it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

__all__ = ["alone", "try_lock"]

LOOK = 0.1  # seconds between two looks


def try_lock(path: Path, patience: float = 0.0) -> TextIO | None:
    """The open, locked file at `path`, or none while another process holds it; closing it lets go.

    Args:
        patience: seconds to wait for a process that is about to end.
    """
    limit = time.monotonic() + patience
    while True:
        file = _opened(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _stands(file, path):
                return file
        except BlockingIOError:
            if time.monotonic() >= limit:
                file.close()
                return None
            time.sleep(LOOK)
        file.close()


@contextmanager
def alone(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock at `path` for the block, however long another process has it; `waiting` is called once if one has.

    Raises:
        OSError: the folder cannot be written.
    """
    held = try_lock(path)
    if held is None:
        waiting()
        held = _wait(path)
    with held:
        yield


def _wait(path: Path) -> TextIO:
    """As `try_lock`, in the kernel's queue: who waits is next."""
    while True:
        file = _opened(path)
        fcntl.flock(file, fcntl.LOCK_EX)
        if _stands(file, path):
            return file
        file.close()


def _opened(path: Path) -> TextIO:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # its last holder has just removed the folder
            return path.open("a+", encoding="utf-8")


def _stands(file: TextIO, path: Path) -> bool:
    """Whether `path` is still this file: its last holder may have removed it, and then the lock is worth nothing."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
