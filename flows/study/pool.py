"""Processes that run cells, one at a time each; one that was killed is started again for the next cell."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

from cola_core.errors import RetryError
from flows.child import environment

__all__ = ["Pool"]

FAREWELL = ((signal.SIGINT, 30.0), (signal.SIGKILL, None))  # a link keeps a checkpoint of its last step


class Pool:
    """`size` processes with the code at `code`, in a with-block; `root` is the checkout that owns records and data.

    closed: no cell is run any more.
    """

    def __init__(self, code: Path, root: Path, size: int) -> None:
        self._code, self._root, self.closed = code, root, False
        self._starting = Lock()
        self._free: Queue[subprocess.Popen[str] | None] = Queue()
        self._started: list[subprocess.Popen[str]] = []
        for _ in range(size):
            self._free.put(None)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what runs, whoever waits for it."""
        with self._starting:  # after it nothing starts any more
            self.closed = True
        for farewell, patience in FAREWELL:
            for process in self._started:
                if process.poll() is None:
                    process.send_signal(farewell)
            for process in self._started:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(patience)

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give one cell to a free process, and wait for its answer.

        Raises:
            RetryError: the process was killed; the cell's finished stages and its link's checkpoint stay.
        """
        process = self._free.get()
        try:
            with self._starting:
                if self.closed:
                    raise RetryError("the study was stopped; the same command goes on")
                if process is None or process.poll() is not None:
                    process = self._start()
            return _asked(process, order)
        finally:
            self._free.put(process)

    def _start(self) -> subprocess.Popen[str]:
        variables = environment(PYTHONPATH=str(self._code), COLA_CHECKOUT=str(self._root))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tasks.cell"],
            cwd=self._code,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started = [each for each in self._started if each.poll() is None] + [process]
        return process


def _asked(process: subprocess.Popen[str], order: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError):  # it has just died: no answer comes, and that is told
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line.endswith("\n"):
        raise RetryError(f"a cell's process ended with {process.wait()}: killed, or out of memory")
    answer: dict[str, Any] = json.loads(line)
    return answer
