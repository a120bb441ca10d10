"""Locks that a killed process cannot leave behind: the kernel drops a flock with the last process that holds it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

__all__ = ["alone", "pool_size", "slot", "try_lock"]


def try_lock(path: Path, patience: float = 0.0) -> TextIO | None:
    """The open, locked file at `path`, or none while another process holds it; closing it lets go.

    Args:
        patience: seconds to wait for a process that is about to end.
    """
    limit = time.monotonic() + patience
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _stands(file, path):
                return file
        except BlockingIOError:
            if time.monotonic() >= limit:
                file.close()
                return None
            time.sleep(0.1)
        file.close()


def _stands(file: TextIO, path: Path) -> bool:
    """Whether `path` is still this file: its last holder may have removed it, and then the lock is worth nothing."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def pool_size(threads: int) -> int:
    """How many workspaces may work at once on this machine: floor(cores / threads), at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock at `path` for the block, however long another process has it."""
    while (held := try_lock(path, 3600.0)) is None:
        pass
    with held:
        yield


@contextmanager
def slot(folder: Path, size: int, waiting: Callable[[], None], poll: float = 1.0) -> Iterator[None]:
    """Hold one of `size` slots; `waiting` is called once if none is free at first.

    Args:
        folder: where the slots' lock files stand, shared by every workspace of the machine.
        poll: seconds between two looks.
    """
    told = False
    while True:
        for number in range(size):
            if held := try_lock(folder / f"{number}.lock"):
                with held:
                    yield
                return
        if not told:
            waiting()
            told = True
        time.sleep(poll)
