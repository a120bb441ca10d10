"""How many workspaces may work at once on this machine, and the places that they wait for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cola_core.locks import try_lock

__all__ = ["pool_size", "slot"]


def pool_size(threads: int) -> int:
    """How many workspaces may work at once on this machine: floor(cores / threads), at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


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
