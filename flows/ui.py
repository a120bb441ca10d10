"""MLflow's and Prefect's servers on loopback, started and stopped together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

from cola_core.errors import UserError
from flows.child import environment

__all__ = ["HOST", "MLFLOW", "serve_uis"]

HOST = "127.0.0.1"
MLFLOW, PREFECT = 5001, 4200
# MLflow else starts fifteen processes and takes 2.4 GB, most of it for jobs that judge chats; so two and 0.4 GB do.
LEAN = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_WORKERS": "1"}


def serve_uis(mlflow: int = MLFLOW, prefect: int = PREFECT) -> None:
    """Serve both until one ends or this process is told to stop; then neither runs on.

    Raises:
        RetryError: the store is out of reach.
        UserError: a port is taken, or a server ended by itself.
    """
    from tasks.store import open_store, tracking_uri

    for port in (mlflow, prefect):
        _check_free(port)
    with open_store():  # makes a new database, which a server that is killed meanwhile would leave in pieces
        pass
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    address = ("--host", HOST, "--port")
    commands = {
        f"MLflow   http://{HOST}:{mlflow}": ["mlflow", "server", *address, str(mlflow)],
        f"Prefect  http://{HOST}:{prefect}": ["prefect", "server", "start", *address, str(prefect)],
    }
    # Prefect's pages ask port 4200 whatever port serves them, unless they are told.
    pages = f"http://{HOST}:{prefect}/api"
    # Command lines are everybody's to read and the store's address may hold a password, so a variable tells it.
    variables = LEAN | environment(PREFECT_SERVER_UI_API_URL=pages, MLFLOW_BACKEND_STORE_URI=tracking_uri())
    children = {name: _start(command, variables) for name, command in commands.items()}
    try:
        print("\n".join([*commands, "stop both with Ctrl-C"]), flush=True)
        _watch(children)
    except KeyboardInterrupt:
        print("stopped")
    finally:
        for child in children.values():
            _stop(child)


def _watch(children: Mapping[str, subprocess.Popen[bytes]]) -> None:
    while True:
        for name, child in children.items():
            if child.poll() is not None:
                raise UserError(f"{name.split()[0]}'s server ended by itself with exit code {child.returncode}")
        time.sleep(0.5)


def _start(command: list[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """One server, of this environment's own bin folder, in a process group of its own."""
    return subprocess.Popen([sys.executable, "-m", *command], env=variables, start_new_session=True)


def _stop(child: subprocess.Popen[bytes]) -> None:
    for farewell, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(child.pid, farewell)
            child.wait(patience)
            return


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise UserError(f"port {port} on {HOST} is taken; stop what listens there") from None
