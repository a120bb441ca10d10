# ruff: noqa: F811  a fixture is named where it is imported and where it is asked for
"""What a killed DVC leaves half-written is mended, and what is whole or in use is left alone."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from miniature import ran, weather
from test_workspace import TITLE, _dvc_repro, _params, project  # noqa: F401

from cola_core.assets.cache import cache_root
from cola_core.config.reading import load_yaml
from cola_core.files import scratch
from flows.mend import mend
from flows.project import project as opened_project
from flows.snapshot import runs, snapshot
from flows.workspace import opened
from tasks.follow import follow


def test_a_cut_off_lock_file_costs_nothing(project: Path) -> None:
    """DVC's run cache restores what it told of; only `register`, whose out is not cached, runs again."""
    _dvc_repro(project)
    lock, before = project / "dvc.lock", ran(project)
    whole = lock.read_bytes()
    assert mend(project) == []
    for size in (len(whole) // 3, len(whole) // 2 + 3, len(whole) - 30):
        lock.write_bytes(whole[:size])
        mend(project)
        _dvc_repro(project)
        assert _outs(lock.read_text()) == _outs(whole.decode())
        assert set(ran(project)[len(before) :]) <= {"register"}


def _outs(text: str) -> dict[str, str]:
    stages = load_yaml(text)["stages"].values()
    return {out["path"]: out["md5"] for stage in stages for out in stage["outs"]}


def test_a_cut_off_table_of_locks_and_temporaries_are_removed(project: Path) -> None:
    _dvc_repro(project)
    table = project / ".dvc/tmp/rwlock"
    table.write_text('{"write": {"/a')
    for place in ("artifacts/.AbC.tmp", ".dvc/cache/files/md5/.AbC.tmp"):
        (project / place).touch()
    told = mend(project)
    assert len(told) == 3 and all("which a killed DVC had left unfinished" in line for line in told)
    assert not table.exists() and mend(project) == []
    _dvc_repro(project)


def test_an_entry_of_the_run_cache_that_was_not_filled_is_removed(project: Path) -> None:
    """DVC takes any folder there for one that holds a run, and fails the stage of that name."""
    _dvc_repro(project)
    (project / "dvc.lock").unlink()
    made = sorted((project / ".dvc/cache/runs").glob("*/*/"))
    for folder in made:
        for file in folder.iterdir():
            file.unlink()
    (made[0] / ".AbC.tmp").touch()
    with pytest.raises(subprocess.CalledProcessError):
        _dvc_repro(project)
    assert len(mend(project)) == len(made) + 1 and mend(project) == []
    _dvc_repro(project)


def test_a_run_mends_its_own_workspace_beside_others(project: Path) -> None:
    with opened(project, snapshot(project), _params(project), TITLE) as workspace:
        left = workspace.path / "artifacts/links/1/.AbC.tmp"
        left.parent.mkdir(parents=True, exist_ok=True)
        left.touch()
        name = workspace.run
    with (runs(project) / "another.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with opened(project, snapshot(project), _params(project), TITLE) as workspace:
            assert workspace.run == name and not left.exists()


def test_what_no_kill_has_cut_off_is_left_alone_and_the_rest_is_kept_aside(project: Path) -> None:
    _dvc_repro(project)
    lock = project / "dvc.lock"
    whole = lock.read_text()
    lock.write_text("schema: '2.0'\n<<<<<<< HEAD\nstages:\n=======\n>>>>>>> other\n")
    assert mend(project) == [] and "<<<<<<<" in lock.read_text()
    lock.write_text(whole[:-30])
    (told,) = mend(project)
    assert told == "moved dvc.lock, which a killed DVC had left unfinished, to .dvc/tmp/dvc.lock.cut"
    assert (project / ".dvc/tmp/dvc.lock.cut").read_text() == whole[:-30] and not lock.exists()


def test_a_stage_whose_dvc_is_gone_before_it_looks_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setenv("DVC_STAGE", "link")
    monkeypatch.setattr("tasks.follow._driver", lambda module: SimpleNamespace(name=lambda: "systemd"))
    monkeypatch.setattr("tasks.follow.os.kill", lambda *call: sent.append(call))
    follow("link")
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_what_a_killed_flow_left_goes_from_the_cache_and_from_its_workspace(project: Path) -> None:
    with scratch(cache_root(), "stage") as kept:
        stage, model = cache_root() / ".stage.abc.cola-tmp", runs(project) / "its/artifacts/fetch/.model.abc.cola-tmp"
        for left in (stage, model):
            left.mkdir(parents=True)
        mend(project)
        assert kept.exists() and not stage.exists() and not model.exists()


def test_nothing_is_mended_while_another_dvc_works(project: Path) -> None:
    _dvc_repro(project)
    (project / "dvc.lock").write_text("stages:\n  fetch:\n    cm")
    with opened_project(project) as repo, repo.lock:
        assert mend(project) == [] and (project / "dvc.lock").exists()
    assert mend(project) and not (project / "dvc.lock").exists()


@pytest.mark.parametrize("left", ["a zombie", "a number used again"])
def test_a_dead_holder_of_a_lock_does_not_block_for_ever(project: Path, left: str) -> None:
    """DVC looks only whether there is a process of that number."""
    _dvc_repro(project)
    child = subprocess.Popen(["sleep", "0" if left == "a zombie" else "600"])
    if left == "a zombie":
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    table = project / ".dvc/tmp/rwlock"
    holder = {"pid": child.pid, "cmd": "dvc repro"}
    table.write_text(json.dumps({"write": {str(project / "artifacts/fetch"): holder}, "read": {}}))
    os.utime(table, (0, 0)) if left != "a zombie" else None
    assert mend(project) and not table.exists()
    table.write_text(json.dumps({"read": {str(project / "artifacts/fetch"): [{"pid": os.getpid(), "cmd": "dvc"}]}}))
    assert mend(project) == [] and table.exists(), "a living one is waited for"
    child.kill()
    child.wait()


@pytest.mark.parametrize("becomes", ["exec ", ""])
def test_a_stage_ends_with_the_dvc_that_started_it(project: Path, becomes: str) -> None:
    """Nobody would take what it makes, and the next `dvc repro` would start a second one beside it.

    DVC asks a shell, and some become the command that they are given, some wait for it.
    """
    (weather(project) / "evaluate.fails").write_text("sleep")
    shell = project.parent / "shell"
    shell.write_text(f"#!/bin/sh\nfor command; do :; done\n{becomes}$command\n")
    shell.chmod(0o755)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", "repro", "--quiet"]
    mine = {**os.environ, "PATH": path, "SHELL": str(shell)}
    dvc = subprocess.Popen(command, cwd=project, env=mine, start_new_session=True)
    while "evaluate" not in ran(project):
        assert dvc.poll() is None
        time.sleep(0.05)
    (stage,) = [p for p in psutil.Process(dvc.pid).children(recursive=True) if "tasks.evaluate" in p.cmdline()]
    dvc.kill()
    dvc.wait()
    gone, _ = psutil.wait_procs([stage], timeout=30)
    assert gone or stage.status() == psutil.STATUS_ZOMBIE
    assert not (weather(project) / "woke").exists()
