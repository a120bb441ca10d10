"""Records handed on to MLflow at the end of a flow, by a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from prefect import get_run_logger

from cola_core.secrets import mask
from flows.child import environment
from tasks.pending import unsynced

__all__ = ["post"]


def post(folder: Path) -> None:
    """Post the stages' records to MLflow; a store that is away fails nothing, the records wait for `cola sync`.

    Args:
        folder: the checkout or workspace whose registration may have to be mended.
    """
    if not unsynced():
        return
    log = get_run_logger()
    command = [sys.executable, "-m", "tasks.sync"]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, errors="replace", check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    if lines:
        (log.warning if done.returncode else log.info)(mask(lines[-1]))
