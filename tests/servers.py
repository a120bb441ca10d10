"""Real servers of Prefect and MLflow on loopback for tests that start, kill and restart them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that leads its own group, with all of it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    kill(process)


def kill(process: subprocess.Popen[Any]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def until(found: Callable[[], Any], seconds: float) -> Any:
    """The first true answer of `found`."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        with suppress(Exception):
            if answer := found():
                return answer
        time.sleep(0.2)
    raise TimeoutError(f"nothing within {seconds} s")


def prefect_server(home: Path, port: int) -> subprocess.Popen[Any]:
    """A server with its database in `home` that answers under http://127.0.0.1:`port`/api."""
    mine = {"PREFECT_HOME": str(home), "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api"}
    words = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    return _started(words, mine, home / "server.log", f"http://127.0.0.1:{port}/api/health")


def mlflow_server(folder: Path, port: int) -> subprocess.Popen[Any]:
    """A server that keeps `folder`/mlflow.db and the artifacts beside it."""
    words = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    mine = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return _started(words, mine, folder / "server.log", f"http://127.0.0.1:{port}/health")


def _started(words: list[str], variables: dict[str, str], log: Path, health: str) -> subprocess.Popen[Any]:
    import httpx

    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", *words], env={**os.environ, **QUIET, **variables}, stdout=log.open("a"),
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        until(lambda: httpx.get(health).status_code == 200, 120)
    except BaseException:
        kill(process)
        raise
    return process
