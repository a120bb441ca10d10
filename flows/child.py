"""One stage as a child: `python -m dvc repro --single-item STAGE`, its lines handed on, its failure understood."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from cola_core.errors import RetryError, UserError
from flows.workspace import Workspace
from tasks.stage import QUIET

__all__ = ["environment", "quiet", "repro"]

SILENT = {**QUIET, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PYTHONUNBUFFERED": "1"}
SHELL = ": failed to run: "  # DVC's word for a command that failed: the stage's own line says more
ADVICE = ("To track the changes with git", "\tgit add ", "To enable auto staging", "\tdvc config ", "Use `dvc push`")
FAREWELL = ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, None))


def quiet() -> None:
    """Give this process, and all it starts, the environment of a stage; before Prefect or MLflow are imported."""
    os.environ.update(environment())


def environment(**more: str) -> dict[str, str]:
    """This process's environment, silent, with this interpreter's folder first in PATH: stages say just `python`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**SILENT, **os.environ, "PATH": path, **more}


def repro(workspace: Workspace, stage: str, tell: Callable[[str], None]) -> bool:
    """Let DVC bring one stage up to date; returns whether its command ran (else the run cache had the outs).

    DVC ends with 255 whatever its stage said, so the stage leaves its exit code and line in a file (`COLA_FAILURE`).

    Args:
        tell: called with every line of the child's output as it comes.

    Raises:
        UserError: the stage failed; its one clear line, or the last line of a crash.
        RetryError: the stage said that it may succeed later.
    """
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    ran, last = False, ""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "failure.json"
        process = _start(command, workspace, environment(COLA_FAILURE=str(note)))
        try:
            for line in _lines(process):
                ran = ran or line.startswith("Running stage ")
                last = last if not line or SHELL in line else line
                if line and not line.startswith(ADVICE):
                    tell(line)
            if process.wait():
                _raise(note, stage, last)
        finally:
            _end(process)
    return ran


def _raise(note: Path, stage: str, last: str) -> None:
    if not note.is_file():
        raise UserError(f"{stage}: {last}")
    failure = json.loads(note.read_text(encoding="utf-8"))
    raise (RetryError if failure["code"] == RetryError.exit_code else UserError)(failure["line"])


def _start(command: list[str], workspace: Workspace, variables: dict[str, str]) -> subprocess.Popen[str]:
    """A child in a process group of its own, which also holds the workspace's lock for as long as it lives."""
    return subprocess.Popen(
        command,
        cwd=workspace.path,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=[workspace.lock.fileno()],
    )


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.rstrip()


def _end(process: subprocess.Popen[str]) -> None:
    """Leave nothing of the child behind, whatever ended the wait: a cancelled run must not train on."""
    for farewell, patience in FAREWELL:
        if process.poll() is not None:
            return
        with suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, farewell)
            process.wait(patience)
