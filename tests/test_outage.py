# ruff: noqa: F811  fixtures come from test_tracking
"""Servers that are away, slow, full or killed: training goes on, and what was missed is logged afterwards, once."""

from __future__ import annotations

import http.server
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from miniature import git, make, ran, variables, weather
from servers import end, free_port, kill, mlflow_server, prefect_server, until
from test_tracking import RAW, checkout, empty_database, history, left, runs  # noqa: F401  fixtures

from cola_core.errors import RetryError
from tasks.context import Context, Done
from tasks.live import Live
from tasks.pending import unsynced
from tasks.records import record
from tasks.sync import sync

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STAGES = ["fetch", "allocate@1", "allocate@2", "evaluate", "register"]
CURVE = [[step, 1.0 / step] for step in range(1, 41)]


def _cola(root: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    settings = variables(root, PREFECT_HOME=str(root.parent / "prefect"), **more)
    command = [sys.executable, "-m", "flows.cli", *words]
    return subprocess.Popen(
        command,
        cwd=root,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _standing(root: Path) -> list[bytes]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(root) in str((entry / "cwd").readlink()):
                found.append((entry / "cmdline").read_bytes())
    return found


@pytest.mark.chaos
def test_a_flow_outlives_prefects_server_and_its_own_death(tmp_path: Path, empty_database: Path) -> None:
    root, port = make(tmp_path), free_port()
    shutil.copy(empty_database, root / "mlflow.db")
    address = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    server = prefect_server(tmp_path / "server", port)
    try:
        (weather(root) / "allocate.fails").write_text("hold")
        flow = _cola(root, "run", **address)
        until(lambda: "allocate@1" in ran(root), 60)
        os.kill(flow.pid, signal.SIGKILL)
        flow.communicate()
        (weather(root) / "allocate.fails").write_text("hold")
        flow = _cola(root, "run", **address)  # at once, and in the same workspace
        until(lambda: ran(root).count("allocate@1") == 2, 60)
        kill(server)
        (weather(root) / "go").touch()
        out, err = flow.communicate(timeout=120)
        assert flow.returncode == 0, out + err
        assert ran(root) == ["fetch", "allocate@1", *STAGES[1:]]
        assert re.fullmatch(r"bring the results to the checkout: cola adopt \S+", out.strip().splitlines()[-1])
        assert err.count("its pages will not tell how this run ended") == 1
        for noise in ("Traceback", "Error logging", "ERROR"):
            assert noise not in err, err
        assert len(list((root / ".cola/records").iterdir())) == 5 and not _standing(root)
        server = prefect_server(tmp_path / "server", port)
        again = _cola(root, "run", **address)
        out, err = again.communicate(timeout=120)
        assert again.returncode == 0 and len(ran(root)) == 6, out + err
    finally:
        end(server)


@pytest.mark.chaos
def test_schedules_outlive_prefects_server(tmp_path: Path, empty_database: Path) -> None:
    root, port = make(tmp_path), free_port()
    shutil.copy(empty_database, root / "mlflow.db")
    mine = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_HOME": str(tmp_path / "prefect")}
    mine |= {"PREFECT_RUNNER_POLL_FREQUENCY": "1", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    command = [sys.executable, "-m", "flows.cli", "serve", "--every", "5"]
    server, log = prefect_server(tmp_path / "server", port), tmp_path / "serve.log"
    with log.open("w") as out:
        serve = subprocess.Popen(
            command, cwd=root, env=variables(root, **mine), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until(lambda: "register" in ran(root), 120)
        kill(server)
        until(lambda: "; waiting for it" in log.read_text(), 120)
        params = root / "params.yaml"
        params.write_text(params.read_text().replace("\nseed: 0\n", "\nseed: 1\n"))
        git(root, "commit", "-aqm", "other")
        server = prefect_server(tmp_path / "server", port)
        until(lambda: ran(root).count("fetch") == 2, 120)
        assert serve.poll() is None and log.read_text().count("; waiting for it") == 1
    finally:
        end(serve)
        end(server)


@pytest.mark.parametrize("kind", ["nobody listens", "nobody answers"])
def test_without_a_server_nothing_starts(tmp_path: Path, kind: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if kind == "nobody answers":
            silent.listen()
        root = make(tmp_path)
        flow = _cola(root, "run", PREFECT_API_URL=f"http://127.0.0.1:{silent.getsockname()[1]}/api")
        err = flow.communicate(timeout=60)[1]
    assert (flow.returncode, err.count("\n")) == (75, 1), err
    assert err.startswith("Prefect's server at http://127.0.0.1:") and "`cola ui`" in err
    assert ran(root) == [] and not (root / ".cola/workspaces").exists()


def test_a_schedule_of_no_machine_is_refused(tmp_path: Path) -> None:
    """What its runs will take counts: the last commit, not the files as they stand."""
    root = make(tmp_path)
    params = root / "params.yaml"
    good = params.read_text()
    params.write_text(good.replace("\n  threads: ", "\n  threads: 0 #"))
    git(root, "commit", "-aqm", "none")
    params.write_text(good)
    err = (serve := _cola(root, "serve", "--every", "5")).communicate(timeout=60)[1]
    assert (serve.returncode, err.count("\n")) == (2, 1) and "params.yaml: machine.threads: " in err, err


@pytest.fixture(scope="module")
def tables(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for MLflow's server, with its tables made."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder


def _link(identity: str = "r1") -> Context:
    return Context(stage="link@1", key="1", raw=RAW, record_id=identity, used={"link": {"steps": len(CURVE)}})


def _finish(context: Context) -> None:
    losses = [[float(step), value] for step, value in CURVE]
    record(context, Done(metrics={"kept_step": 40.0}, series={"loss": losses}), time.time())


def _one_whole_run(identity: str = "r1") -> None:
    (run,) = [run for key, run in runs().items() if key == identity]
    assert run.info.status == "FINISHED" and "cola.posted" in run.data.tags
    assert history(run.info.run_id, "loss") == [(step, value) for step, value in CURVE]


def test_mlflows_server_dies_in_a_link_and_comes_back(
    checkout: Path,
    tables: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = mlflow_server(tables, port)
    try:
        with Live(_link()) as live:
            for step, value in CURVE[:20]:
                live.step(int(step), {"loss": value})
            until(lambda: len(history(runs()["r1"].info.run_id, "loss")) == 20, 60)
            kill(server)
            for step, value in CURVE[20:]:
                live.step(int(step), {"loss": value})
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and told.startswith("link@1: live log: MLflow at http://127.0.0.1")
        _finish(_link())
        with pytest.raises(RetryError, match="the records are kept"):
            sync()
        server = mlflow_server(tables, port)
        assert (sync(), sync()) == (1, 0)
        _one_whole_run()
    finally:
        end(server)


class _Broken(http.server.BaseHTTPRequestHandler):
    def _answer(self) -> None:
        self.send_error(500)

    do_GET = do_POST = do_PUT = do_PATCH = _answer  # noqa: N815  the library's names

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(params=["accepts and says nothing", "HTTP 500"])
def broken(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that is of no use."""
    if request.param == "HTTP 500":
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Broken) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
    else:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            yield f"http://127.0.0.1:{silent.getsockname()[1]}"


def test_a_broken_mlflow_stops_no_link(
    checkout: Path,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", broken)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr("tasks.live.PATIENCE", 0.5)
    with Live(_link()) as live:
        for step, value in CURVE:
            live.step(int(step), {"loss": value})
    _finish(_link())
    with pytest.raises(RetryError, match="the records are kept") as error:
        sync()
    assert "\n" not in str(error.value) and unsynced()
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("link@1: live log: MLflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert (sync(), sync()) == (1, 0)
    _one_whole_run()


def test_a_stop_does_not_wait_for_a_silent_mlflow(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")  # half as long as a link that ends well has patience
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(KeyboardInterrupt), Live(_link()) as live:
            live.step(1, {"loss": 1.0})
            asked, thread = silent.accept()[0], live._thread
            raise KeyboardInterrupt
        assert thread is not None and thread.is_alive(), "it still asks"
        asked.close()
    thread.join(60)


def _own_mounts() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "t", "/mnt"], capture_output=True).returncode == 0


FULL = """
set -e
mount -t tmpfs -o size=2m tmpfs "$STORE"
cp "$EMPTY" "$STORE/mlflow.db"
dd if=/dev/zero of="$STORE/ballast" bs=4096 2>/dev/null || true
"$PYTHON" -c "import test_outage; test_outage._in_a_full_store()"
cp "$STORE/mlflow.db" "$KEPT"
"""


def _in_a_full_store() -> None:
    """What a link and two calls of sync print, the second when there is room again."""
    with Live(_link()) as live:
        for step, value in CURVE:
            live.step(int(step), {"loss": value})
    _finish(_link())
    with pytest.raises(RetryError) as error:
        sync()
    print(error.value, file=sys.stderr)
    Path(os.environ["STORE"], "ballast").unlink()
    print(sync(), sync())


@pytest.mark.skipif(not _own_mounts(), reason="a full disk of its own needs `unshare -Urm` and mount")
def test_a_full_store_is_one_line_and_loses_nothing(checkout: Path, empty_database: Path) -> None:
    store = checkout / "store"
    store.mkdir()
    mine = {"STORE": str(store), "EMPTY": str(empty_database), "PYTHON": sys.executable}
    mine |= {"KEPT": str(checkout / "mlflow.db"), "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"}
    here = Path(__file__).parent
    mine |= {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", FULL], env={**os.environ, **mine}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1 0\n", done.stdout + done.stderr
    told = done.stderr.strip().splitlines()
    assert [line.split("MLflow at ")[0] for line in told] == ["link@1: live log: ", ""], done.stderr
    assert all("disk is full" in line for line in told), done.stderr
    _one_whole_run()


def test_sync_killed_at_any_instant_posts_each_record_once(checkout: Path) -> None:
    for number in range(6):
        _finish(_link(f"r{number}"))
    with Live(_link("r0")) as live:
        live.step(1, {"loss": 1.0})
    sure = random.Random(0)
    context = multiprocessing.get_context("fork")
    killed = 0
    while killed < 5:
        child = context.Process(target=sync)
        child.start()
        child.join(sure.uniform(0.0, 0.4))
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
            killed += 1
        child.join()
        number += 1
        _finish(_link(f"r{number}"))
    sync()
    assert sync() == 0
    assert len(runs()) == number + 1
    for posted in range(number + 1):
        _one_whole_run(f"r{posted}")


MAKE = "from tasks.store import open_store\nwith open_store():\n    pass"


def test_a_store_killed_while_it_is_made_is_made_anew(checkout: Path) -> None:
    """MLflow makes its tables one by one; half of them would be of no use to anybody."""
    (checkout / "mlflow.db").unlink()
    mine = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen([sys.executable, "-c", MAKE], env=mine)
    until(lambda: any(path.stat().st_size > 100_000 for path in checkout.glob(".mlflow.db.*/mlflow.db")), 60)
    child.kill()
    child.wait()
    assert not (checkout / "mlflow.db").exists()
    left("fetch")
    assert sync() == 1 and not list(checkout.glob(".*.cola-tmp"))


def test_the_store_deleted_in_a_link_gets_the_link_all_the_same(checkout: Path) -> None:
    with Live(_link()) as live:
        for step, value in CURVE[:20]:
            live.step(int(step), {"loss": value})
        until(lambda: len(history(runs()["r1"].info.run_id, "loss")) == 20, 60)
        (checkout / "mlflow.db").unlink()
        for step, value in CURVE[20:]:
            live.step(int(step), {"loss": value})
    _finish(_link())
    assert unsynced()
    mine = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for count in (1, 0):
        done = subprocess.run(
            [sys.executable, "-m", "tasks.sync"], env=mine, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"sync: {count} record(s) posted\n"
    with closing(sqlite3.connect(checkout / "mlflow.db")) as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
        assert store.execute("select step, value from metrics where key = 'loss' order by step").fetchall() == list(
            map(tuple, CURVE)
        )


@pytest.mark.chaos
def test_the_store_deleted_while_a_flow_runs_has_all_of_the_flow(tmp_path: Path, empty_database: Path) -> None:
    root = make(tmp_path)
    shutil.copy(empty_database, root / "mlflow.db")
    (weather(root) / "evaluate.fails").write_text("hold")
    flow = _cola(root, "run", PREFECT_API_URL="")
    until(lambda: "evaluate" in ran(root), 120)
    (root / "mlflow.db").unlink()
    (weather(root) / "go").touch()
    out, err = flow.communicate(timeout=120)
    assert flow.returncode == 0, out + err
    with closing(sqlite3.connect(root / "mlflow.db")) as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)] * len(STAGES)


def _hold(path: Path, seconds: float) -> threading.Thread:
    """Another writer, in the middle of a transaction for a while."""
    began = threading.Event()

    def work() -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            began.set()
            time.sleep(seconds)
            other.execute("COMMIT")

    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    return thread


@pytest.mark.chaos
def test_another_writer_is_waited_for_and_then_told_of_in_plain_words(checkout: Path) -> None:
    """MLflow waits for twenty seconds."""
    left("fetch")
    other = _hold(checkout / "mlflow.db", 30.0)
    with pytest.raises(RetryError, match="another process has been writing to it for too long; the records are kept"):
        sync()
    other.join()
    assert sync() == 1


def _log_much(name: str) -> None:
    with Live(_link(name)) as live:
        for step, value in CURVE:
            live.step(int(step), {"loss": value})
            time.sleep(0.01)
    _finish(_link(name))
    sync()


def test_many_writers_of_one_store(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_log_much, args=[f"w{number}"]) for number in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0, 0]
    told = capfd.readouterr()
    assert "lock" not in told.err + told.out, told.err
    for number in range(4):
        _one_whole_run(f"w{number}")
