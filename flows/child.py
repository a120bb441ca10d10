"""Stages in a child: `dvc repro --single-item STAGE`, its lines handed on, its failure understood."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

from cola_core.assets.cache import cache_root
from cola_core.errors import RetryError, UserError
from cola_core.files import scratch
from flows import worker
from flows.snapshot import main_checkout
from flows.worker import END
from flows.workspace import Workspace
from tasks.stage import QUIET

__all__ = ["Dvc", "environment", "quiet"]

SILENT = {
    **QUIET,
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # else every event that a server misses is printed in full
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # several at once on a busy machine
    "PYTHONUNBUFFERED": "1",
}
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


class Dvc:
    """DVC as a child for the stages of one run, in a with-block; started by the first stage that needs it."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._process: subprocess.Popen[str] | None = None
        self._burial = Thread()

    def __enter__(self) -> Dvc:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def repro(self, stage: str, tell: Callable[[str], None]) -> bool:
        """Let DVC bring one stage up to date; returns whether its command ran.

        DVC says 255 whatever its stage said, so the stage leaves its exit code and line in a file (`COLA_FAILURE`).

        Args:
            tell: called with every line of the child's output as it comes.

        Raises:
            UserError: the stage failed; its one clear line, or the last line of a crash.
            RetryError: the stage said that it may succeed later.
        """
        ran, last, code, word = False, "", "", secrets.token_hex()
        with scratch(cache_root(), "stage") as folder:
            note = folder / "failure.json"
            try:
                for line in self._lines(f"{stage}\t{note}\t{word}\n"):
                    if line.startswith(f"{END}{word} "):
                        code = line.rpartition(" ")[2]
                        break
                    ran = ran or line.startswith("Running stage ")
                    last = last if not line or SHELL in line else line
                    if line and not line.startswith(ADVICE):
                        tell(line)
            except BaseException:
                self.close()  # a cancelled run must not train on
                raise
            if not code:
                self.close()  # nor may the stage of a DVC that was killed
                last = f"DVC's process was killed{': ' * bool(last)}{last}"
            if code != "0":
                _raise(note, stage, last)
        return ran

    def close(self) -> None:
        """Leave nothing of the child behind, whatever ended the wait."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        _end(process)
        if self._burial.is_alive():  # not yet, where a stop came between the two starts
            self._burial.join()
        process.stdout.close()  # type: ignore[union-attr]

    def _lines(self, order: str) -> Iterator[str]:
        """Hand one order over; what the child prints from then on."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = _start(self._workspace)
            self._burial = Thread(target=_bury, args=[self._process], daemon=True)
            self._burial.start()
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # it has just died: no verdict comes, and that is told
            self._process.stdin.write(order)
            self._process.stdin.flush()
        for line in self._process.stdout:
            yield line.rstrip()


def _raise(note: Path, stage: str, last: str) -> None:
    if not note.is_file():
        raise UserError(f"{stage}: {last}")
    failure = json.loads(note.read_text(encoding="utf-8"))
    raise (RetryError if failure["code"] == RetryError.exit_code else UserError)(failure["line"])


def _start(workspace: Workspace) -> subprocess.Popen[str]:
    """A child in a process group of its own, which also holds the workspace's lock for as long as it lives."""
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(worker.__file__).resolve()), str(os.getpid())],
        cwd=workspace.path,
        env=environment(COLA_CHECKOUT=str(main_checkout(workspace.path))),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=[workspace.lock.fileno()],
    )


def _end(process: subprocess.Popen[str]) -> None:
    for farewell, patience in FAREWELL:
        if process.poll() is not None:
            break
        with suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, farewell)
            process.wait(patience)


def _bury(process: subprocess.Popen[str]) -> None:
    """Once the leader is dead, end whatever of its group outlives it: a stage would train on, and hold the pipe."""
    process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
