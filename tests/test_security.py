"""Nobody in: whole runs watched in a namespace of their own: no pickle, no network, servers on loopback, no secret."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import miniature
import pytest

from tests.watched import CANARY, WATCH, Watched, leaks, namespace, watch, watched_variables

ROOT = Path(__file__).resolve().parents[1]

PATIENT = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "200"}


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """`cola run` of the miniature, with Prefect's own temporary server."""
    folder = tmp_path_factory.mktemp("flow")
    root = miniature.make(folder)
    settings = miniature.variables(root, PREFECT_HOME=str(folder / "prefect"), **PATIENT)
    return watch(folder, root, settings, "flows.cli", "run")


@pytest.mark.parametrize(
    ("program", "what"),
    [
        ("import pickle; pickle.loads(pickle.dumps(1))", "pickle.loads by __main__"),
        ("import pickle, io; pickle.load(io.BytesIO(pickle.dumps(1)))", "pickle.load by __main__"),
        ("import pickle, io; pickle.Unpickler(io.BytesIO(pickle.dumps(1))).load()", "Unpickler.load by __main__"),
        ("import pickle, io; pickle._Unpickler(io.BytesIO(pickle.dumps(1))).load()", "_Unpickler.load by __main__"),
        ("import _pickle, pickle; _pickle.loads(pickle.dumps(int))", "find_class builtins.int by __main__"),
        ("import joblib; joblib.load('x')", "joblib.load by __main__"),
        ("import numpy; numpy.load('x', allow_pickle=True)", "numpy.load by __main__"),
        ("import torch; torch.load('x', weights_only=True)", "torch.load by __main__"),
        ("import socket; socket.create_connection(('203.0.113.1', 80), 0.1)", "left socket.connect 203.0.113.1"),
        ("import urllib.request; urllib.request.urlopen('http://example.org')", "left socket.getaddrinfo example.org"),
    ],
)
def test_the_watch_sees(tmp_path: Path, program: str, what: str) -> None:
    """The canary: without this the runs below would prove nothing."""
    settings = watched_variables(tmp_path, {**os.environ, "PYTHONPATH": "."})
    command = [*namespace(), sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    notes = (tmp_path / "watch.log").read_text()
    assert done.returncode and what in notes and "active -c" in notes, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_dag_unpickles_nothing_and_needs_no_network(finished: Watched) -> None:
    namespace()
    assert finished.code == 0, finished.told
    assert finished.stopped() == [] and not [note for note in finished.notes if note.startswith("unpickled")]
    ran = {name.split()[1] for name in finished.processes() if name.startswith("-m tasks.")}
    stages = {"fetch", "prepare", "head", "profile", "allocate", "link", "merge", "evaluate", "evaluate_base"}
    assert ran == {f"tasks.{stage}" for stage in stages | {"register"}}
    assert finished.ports == [], "no stage listens"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_flow_unpickles_nothing_needs_no_network_and_listens_on_loopback(flow: Watched) -> None:
    namespace()
    assert flow.code == 0, flow.told
    assert flow.stopped() == []
    assert "-m tasks.register" in flow.processes() and flow.ports
    assert all(loopback(port) for port in flow.ports)


def loopback(address: str) -> bool:
    """Whether an address of /proc/net/tcp or tcp6 is 127.0.0.0/8 or ::1."""
    host = address.split(":")[0]
    return host[-2:] == "7F" if len(host) == 8 else host in ("0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cola_ui_listens_on_loopback_and_its_command_lines_tell_nothing(tmp_path: Path) -> None:
    root = miniature.make(tmp_path)
    store = f"sqlite:///file:{tmp_path}/mlflow.db?uri=true&api_key={CANARY}"  # with a secret that SQLite overlooks
    settings = watched_variables(tmp_path, miniature.variables(root, PREFECT_HOME=str(tmp_path / "prefect")))
    ports, script = tmp_path / "ports.json", str(WATCH / "loopback.py")
    line = [*namespace(), sys.executable, script, str(ports), sys.executable, "-m", "flows.cli", "ui"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            line, cwd=root, env={**settings, "MLFLOW_BACKEND_STORE_URI": "", "MLFLOW_TRACKING_URI": store},
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        lines = until_both_listen(process)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child_of(process.pid), signal.SIGTERM)
        process.wait(180)
    seen = json.loads(ports.read_text())
    assert {int(port.split(":")[1], 16) for port in seen} >= {5001, 4200} and all(loopback(port) for port in seen)
    assert any("mlflow" in line for line in lines) and not [line for line in lines if CANARY in line]
    assert not [line for line in lines if "mlflow.server.jobs" in line or "--workers 4" in line], "for one person?"
    assert CANARY not in (tmp_path / "out").read_text()


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def until_both_listen(process: subprocess.Popen[Any]) -> set[str]:
    """The command lines of every process of the namespace, until both servers wait for connections."""
    lines: set[str] = set()
    limit = time.monotonic() + 400
    while time.monotonic() < limit and process.poll() is None:
        text = ""
        with suppress(OSError):
            text = Path(f"/proc/{process.pid}/net/tcp").read_text()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str((entry / "ns" / "net").readlink()) == str(Path(f"/proc/{process.pid}/ns/net").readlink()):
                    lines.add((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        if f":{5001:04X} 00000000:0000 0A" in text and f":{4200:04X} 00000000:0000 0A" in text:
            return lines
        time.sleep(0.1)
    raise AssertionError("a server did not start")


@pytest.mark.slow
def test_a_whole_run_and_a_flow_leave_no_secret_of_their_environment(finished: Watched, flow: Watched) -> None:
    for run in (finished, flow):
        assert CANARY not in run.told and leaks(Path(run.root).parent) == []
    root = Path(finished.root)
    assert (root / "mlflow.db").stat().st_size > 100_000 and list((root / ".cola/records").iterdir())
