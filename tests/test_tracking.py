"""Records reach MLflow exactly once, whatever is killed, deleted or out of reach."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from cola_core.errors import RetryError, UserError
from cola_core.locks import try_lock
from cola_core.sealed import write_sealed
from tasks import live as live_log
from tasks import sync as sync_module
from tasks.context import Context, Done
from tasks.pending import orphans, unposted_files, unsynced
from tasks.places import home, main_checkout
from tasks.progress import progress
from tasks.records import record
from tasks.store import Store, locked, open_store
from tasks.sync import sync

REPOSITORY = Path(__file__).parents[1]
RAW: dict[str, Any] = {"recipe": "gora", "task": "r8", "seed": 3, "register": {"name": "cola-r8"}}


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, made once: making them takes MLflow three seconds."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        patch.chdir(path.parent)
        main_checkout.cache_clear()
        with open_store():
            pass
    return path


@pytest.fixture
def checkout(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout of its own with an empty store, and the current folder."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    main_checkout.cache_clear()
    yield tmp_path
    main_checkout.cache_clear()


def test_the_address_of_the_store_may_be_relative(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    left("fetch")
    assert unsynced()
    assert (sync(), sync()) == (1, 0) and not unsynced()


def left(stage: str, *, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = (), **done: Any) -> str:
    """Leave the record of a stage that read and wrote these files; returns its id."""
    context = Context(stage=stage, key=None, raw=RAW, used={"link": {"steps": 4, "betas": [0.9, 0.999]}})
    for name in outputs:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"made by {stage}")
    done |= {"inputs": [Path(name) for name in inputs], "outputs": [Path(name) for name in outputs]}
    record(context, Done(**done), time.time())
    return context.record_id


def runs() -> dict[str, Any]:
    """Every run of the store by its record id; two runs of one record fail here."""
    with open_store() as store:
        found = list(store.client.search_runs([e.experiment_id for e in store.client.search_experiments()]))
    ids = [run.data.tags["cola.record"] for run in found]
    assert len(ids) == len(set(ids)), "a record was posted twice"
    return dict(zip(ids, found, strict=True))


def history(run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of every logged point, in order."""
    with open_store() as store:
        return sorted((m.step, m.value) for m in store.client.get_metric_history(run_id, name))


def test_a_record_becomes_one_whole_run(checkout: Path) -> None:
    (checkout / "loss.png").write_bytes(b"png")
    first = left("prepare", outputs=("artifacts/prepare/task.json",))
    done: dict[str, Any] = {"metrics": {"loss": 0.5, "accuracy": 0.75}, "series": {"loss": [[1, 2.0], [2, 0.6]]}}
    second = left("link@1", inputs=("artifacts/prepare/task.json",), artifacts=[Path("loss.png")], **done)
    assert sync() == 2
    found = runs()
    run, upstream = found[second], found[first]
    assert (run.info.run_name, run.info.status) == ("link@1", "FINISHED")
    shared = {"recipe": "gora", "task": "r8", "seed": "3"}
    assert run.data.params == {**shared, "link.steps": "4", "link.betas": "[0.9, 0.999]"}
    assert run.data.tags["cola.upstream"] == upstream.info.run_id
    name = "artifacts/prepare/task.json"
    assert run.data.tags[f"cola.in.{name}"] == upstream.data.tags[f"cola.out.{name}"]
    assert run.data.metrics == {"loss": 0.5, "accuracy": 0.75}
    assert history(run.info.run_id, "loss") == [(1, 2.0), (2, 0.5), (2, 0.6)]
    with open_store() as store:
        assert {f.path for f in store.client.list_artifacts(run.info.run_id)} == {"figures", "params.yaml"}
        assert store.client.get_experiment(run.info.experiment_id).name == "cola-r8"


def test_a_second_call_posts_nothing(checkout: Path) -> None:
    left("fetch")
    assert (sync(), sync()) == (1, 0)
    left("prepare")
    assert sync() == 1
    assert len(runs()) == 2


@pytest.mark.parametrize("step", ["log", "set_terminated", "log_text", "set_tag"])
def test_killed_anywhere_the_next_call_completes_the_same_run(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    from mlflow import MlflowClient

    identity = left("link@1", metrics={"loss": 0.5}, series={"loss": [[1, 2.0], [2, 1.0]]})
    owner = Store if step == "log" else MlflowClient
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sync()
    before = runs()[identity].info.run_id
    assert sync() == 1
    run = runs()[identity]
    assert (run.info.run_id, run.info.status) == (before, "FINISHED")
    assert history(before, "loss") == [(1, 2.0), (2, 0.5), (2, 1.0)]
    assert sync() == 0


def test_a_deleted_database_is_filled_again(checkout: Path, empty_database: Path) -> None:
    identities = {left("fetch"), left("prepare")}
    sync()
    shutil.copy(empty_database, checkout / "mlflow.db")
    assert runs() == {}
    assert sync() == 2
    assert runs().keys() == identities


def test_what_is_left_to_do_is_told_without_mlflow(checkout: Path, empty_database: Path) -> None:
    left("prepare")
    assert unsynced()
    assert sync() == 1 and not unsynced()
    with live_log.Live(Context(stage="link@1", key="1", raw=RAW)) as live:
        live.step(1, {"loss": 1.0})
        while not any(marker.read_text() for marker in (home() / "live").glob("*.json")):  # locked before it is written
            time.sleep(0.01)
        assert not unsynced(), "it is alive"
    assert unsynced() and sync() == 0 and not unsynced()
    shutil.copy(empty_database, checkout / "another.db")
    (checkout / "another.db").rename(checkout / "mlflow.db")
    assert unsynced(), "the same name, another store"


def test_a_binned_run_stays_in_the_bin(checkout: Path) -> None:
    identity = left("fetch")
    sync()
    with open_store() as store:
        store.client.delete_run(store.run({"id": identity, "stage": "fetch", "experiment": "cola-r8"}, 0).info.run_id)
    assert sync() == 0
    assert runs() == {}


def test_two_calls_at_once_post_each_record_once(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        left(f"link@{number}")

    def slowly(*arguments: Any) -> Any:
        known = look(*arguments)
        time.sleep(0.5)  # time for the other call to read the same old state, if nothing keeps it out
        return known

    look = sync_module._runs
    monkeypatch.setattr(sync_module, "_runs", slowly)
    with ThreadPoolExecutor(2) as pool:
        posted = list(pool.map(lambda _: sync(), range(2)))
    assert sorted(posted) == [0, 4]
    assert len(runs()) == 4


def test_the_command_tells_what_it_did_and_what_to_wait_for(checkout: Path) -> None:
    left("fetch")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    for uri, code, told in (("http://127.0.0.1:9", 75, "records are kept"), ("", 0, "sync: 1 record(s) posted")):
        command = [sys.executable, "-m", "tasks.sync"]
        child = subprocess.run(
            command, env=environment | {"MLFLOW_TRACKING_URI": uri}, capture_output=True, text=True, check=False
        )
        printed = child.stdout + child.stderr
        assert (child.returncode, printed.count("\n")) == (code, 1)
        assert told in printed


def test_a_crash_is_a_failed_run_and_a_crash_only(checkout: Path) -> None:
    context = Context(stage="merge", key=None, raw=RAW)
    record(context, Done(), time.time(), "FAILED")
    sync()
    assert runs()[context.record_id].info.status == "FAILED"


def test_out_of_reach_is_one_line_and_keeps_the_records(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left("fetch")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RetryError) as told:
        sync()
    assert "\n" not in str(told.value) and "127.0.0.1:9" in str(told.value)
    assert "hunter2" not in str(told.value)
    assert len(list((home() / "records").iterdir())) == 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync() == 1


def test_nobody_queues_for_a_server_that_is_away(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def ask() -> None:
        with suppress(RetryError), open_store():
            pass

    asking = Thread(target=ask)
    with locked("store"):  # as another process that is asking
        asking.start()
        asking.join(20)
        assert not asking.is_alive()


def test_a_full_store_is_one_line_and_the_next_call_goes_on(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = left("fetch")
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr("mlflow.MlflowClient.log_text", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(RetryError, match="No space left"):
            sync()
    assert sync() == 1
    assert runs()[identity].info.status == "FINISHED"


def test_a_file_store_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left("fetch")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UserError, match="allowed: sqlite"):
        sync()


def test_a_broken_record_names_its_file(checkout: Path) -> None:
    left("fetch")
    path = next((home() / "records").iterdir())
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match=path.name):
        sync()


DAMAGED = {
    "{}": "a record without artifacts, chain",
    "[]": "expected an object",
    '{"artifacts": 5}': "a record without chain",
    '{"artifacts": [5]}': "a record without chain",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_record_is_one_line_and_never_a_traceback(checkout: Path, text: str) -> None:
    left("fetch")
    path = next((home() / "records").iterdir())
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path.name}.*{DAMAGED[text]}.*or delete the file"):
        sync()
    assert unposted_files() == []


@pytest.mark.parametrize(("key", "damaged"), [("format", "formau"), ("checksum", "checksun")])
def test_a_damaged_record_is_never_taken_for_an_older_one(checkout: Path, key: str, damaged: str) -> None:
    left("fetch")
    path = next((home() / "records").iterdir())
    path.write_text(path.read_text().replace(f'"{key}"', f'"{damaged}"'))
    with pytest.raises(UserError, match=path.name):
        sync()


@pytest.mark.parametrize("text", ['{"id": "ab', "[]", "{}", "5"])
def test_a_damaged_marker_is_removed(checkout: Path, text: str) -> None:
    left("fetch")
    (home() / "live").mkdir()
    (home() / "live/r1.json").write_text(text)
    assert (sync(), sync()) == (1, 0) and not list((home() / "live").iterdir())


def test_no_secret_reaches_the_store(checkout: Path) -> None:
    used = {"fetch": {"asset": "https://me:hunter2@host/x", "hub_token": "hunter2", "list": ["https://a:hunter2@b"]}}
    context = Context(stage="fetch", key=None, raw=RAW, used=used)
    path = record(context, Done(), time.time())
    assert "hunter2" not in path.read_text()
    write_sealed(path, "record", json.loads(path.read_text()) | {"params": used})  # as a stage that masks nothing would
    sync()
    with sqlite3.connect(checkout / "mlflow.db") as database:
        assert "hunter2" not in "\n".join(database.iterdump())
    assert not [f for f in (checkout / "mlartifacts").rglob("*") if f.is_file() and "hunter2" in f.read_text()]


def test_live_and_sync_share_one_run(checkout: Path) -> None:
    context = Context(stage="link@1", key="1", raw=RAW)
    with live_log.Live(context) as live:
        live.step(1, {"loss": 2.0})
        live.step(2, {"loss": 1.0})
    before = runs()[context.record_id]
    assert history(before.info.run_id, "loss") == [(1, 2.0), (2, 1.0)]
    record(context, Done(series={"loss": [[1, 2.0], [2, 1.0], [3, 0.5]]}), time.time())
    assert sync() == 1
    run = runs()[context.record_id]
    assert run.info.run_id == before.info.run_id
    assert history(run.info.run_id, "loss") == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert not list((home() / "live").iterdir())


def test_a_live_run_whose_process_died_does_not_stay_running(checkout: Path) -> None:
    left("fetch")
    program = (
        "import os, time; from tasks.live import Live; from tasks.context import Context\n"
        f"live = Live(Context('link@1', '1', {RAW!r}, record_id='dead'))\n"
        "live.step(1, {'loss': 1.0})\n"
        "while not live._points.empty(): time.sleep(0.05)\n"
        "time.sleep(1.0); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, timeout=60)
    assert runs()["dead"].info.status == "RUNNING"
    sync()
    assert runs()["dead"].info.status == "KILLED"


def test_what_a_killed_mlflow_leaves_is_found_and_removed(checkout: Path, tmp_path: Path) -> None:
    left("fetch")
    (temporary := tmp_path / "tmp").mkdir()
    program = (
        "import os, tempfile; from tasks import sync\n"
        "sync._post = lambda *_: (tempfile.mkdtemp(), os.kill(os.getpid(), 9))\n"
        "sync.sync()"
    )
    mine = {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | mine, timeout=60)
    assert done.returncode == -9 and not list(temporary.iterdir())
    assert list(home().glob(".*.cola-tmp/tmp*")), "it lies where the next one looks"
    assert sync() == 1 and not list(home().glob(".*.cola-tmp"))


def test_sync_leaves_a_living_run_alone(checkout: Path) -> None:
    left("fetch")
    live = live_log.Live(Context(stage="link@1", key="1", raw=RAW, record_id="alive"))
    live.step(1, {"loss": 1.0})
    while "alive" not in runs():
        time.sleep(0.05)
    sync()
    assert runs()["alive"].info.status == "RUNNING"
    live.close("FAILED")
    assert runs()["alive"].info.status == "FAILED"


def test_a_marker_removed_before_it_is_locked_is_made_again(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, removed = fcntl.flock, Event()

    def late(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        for path in orphans():  # as a sync that comes between the marker's making and its locking
            path.unlink()
        removed.set()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    live = live_log.Live(Context(stage="link@1", key="1", raw=RAW, record_id="alive"))
    live.step(1, {"loss": 1.0})
    assert removed.wait(10)
    while "alive" not in runs():
        time.sleep(0.05)
    assert (home() / "live/alive.json").exists() and not list(orphans())
    live.close()


def test_sync_holds_the_marker_that_it_removes(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left("fetch")
    marker = home() / "live/dead.json"
    marker.parent.mkdir()
    marker.touch()
    held = []
    monkeypatch.setattr(sync_module, "_close_orphan", lambda *_: held.append(try_lock(marker) is None))
    sync()
    assert held == [True] and not marker.exists()


def test_live_trouble_is_one_line_and_training_goes_on(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tasks.live.open_store", lambda: (_ for _ in ()).throw(ValueError("https://me:hunter2@host")))
    with live_log.Live(Context(stage="link@1", key="1", raw=RAW)) as live:
        for step in range(5):
            live.step(step, {"loss": 1.0})
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("link@1: live log: ") and "hunter2" not in told


def test_a_live_log_without_room_for_its_marker_stops_no_link(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home().mkdir()
    (home() / "live").write_text("a file where the folder is to be")
    with live_log.Live(Context(stage="link@1", key="1", raw=RAW)) as live:
        for step in range(5):
            live.step(step, {"loss": 1.0})
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("link@1: live log: ") and "File exists" in told


def test_a_stage_without_steps_never_imports_mlflow(checkout: Path) -> None:
    program = (
        "import sys; from tasks.live import Live; from tasks.context import Context\n"
        f"with Live(Context('link@1', '1', {RAW!r})): pass\n"
        "sys.exit('mlflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)


def test_a_short_stage_never_imports_mlflow_and_a_longer_one_loses_no_point(checkout: Path) -> None:
    with live_log.Live(Context(stage="link@1", key="1", raw=RAW), after=1000.0) as live:
        live.step(1, {"loss": 2.0})
        assert live._thread is None and not (home() / "live").exists()
        live._begin = 0.0
        live.step(2, {"loss": 1.0})
    (run,) = runs().values()
    assert history(run.info.run_id, "loss") == [(1, 2.0), (2, 1.0)]


def test_the_marker_tells_sync_what_to_look_for(checkout: Path) -> None:
    live = live_log.Live(Context(stage="link@1", key="1", raw=RAW, record_id="r1"))
    live.step(1, {"loss": 1.0})
    live.close()
    marker = json.loads((home() / "live" / "r1.json").read_text())
    assert marker == {"id": "r1", "stage": "link@1", "experiment": "cola-r8"}


def test_the_time_left_counts_from_the_first_tick(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Neither 16 rows at once nor a link resumed at step 20 is taken for the work of the first tick alone."""
    clock = [100.0]
    monkeypatch.setattr("tasks.progress.time.monotonic", lambda: clock[0])
    with progress("link@1") as tick:
        for done in (21, 22, 23):
            clock[0] += 10.0
            tick(done, 40, 5, "loss 1.0")
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[0] and lines[0].startswith("link@1: 21/40")
    assert lines[1].endswith("180 s left") and lines[2].endswith("170 s left")
