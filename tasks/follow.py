"""A stage ends with the DVC that started it: nobody would take what it makes, and the next would start beside it."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

import psutil

__all__ = ["alive", "end_with_parent", "follow"]

LOOK = 0.2  # seconds
ADOPTERS = {"init", "systemd", "launchd", "tini", "dumb-init", "docker-init"}  # whose a process is when its parent died


def follow(stage: str) -> None:
    """Send this process SIGTERM once the DVC that runs `stage` is gone; without DVC nothing is followed."""
    if "DVC_STAGE" not in os.environ:
        return
    with suppress(psutil.Error):  # its processes cannot be looked at
        driver = _driver(f"tasks.{stage}")
        if driver is not None and driver.name() in ADOPTERS:
            os.kill(os.getpid(), signal.SIGTERM)
        elif driver is not None:
            threading.Thread(target=_end_with, args=[driver], daemon=True).start()


def end_with_parent() -> None:
    """Send this process SIGTERM once the one that started it is gone."""
    parent = psutil.Process().parent()
    if parent is not None:
        threading.Thread(target=_end_with, args=[parent], daemon=True).start()


def alive(process: psutil.Process) -> bool:
    """Whether it runs and is still the process it was: neither a zombie nor another one under its number."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _driver(module: str) -> psutil.Process | None:
    """The nearest process above that was not given `module` itself: not every shell becomes the command it is given."""
    parent = psutil.Process().parent()
    while parent is not None and any(module in word for word in parent.cmdline()):
        parent = parent.parent()
    return parent


def _end_with(driver: psutil.Process) -> None:
    while alive(driver):
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
