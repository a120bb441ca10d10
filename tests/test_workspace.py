"""A run works in a worktree of a commit object: the user's index, branch and files stay as they are."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import TextIO

import pytest
from miniature import git, make, ran, variables

from cola_core.errors import RetryError, UserError
from cola_core.locks import try_lock
from flows.child import Dvc
from flows.clean import WEEK, clean, trim
from flows.graph import plan
from flows.slots import pool_size, slot
from flows.snapshot import runs, snapshot
from flows.workspace import Workspace, adopt, opened
from tasks.pending import note_synced, state
from tasks.places import main_checkout

TITLE = "cola_gora/r8/seed0"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make(tmp_path)
    for name, value in variables(root).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(root)
    return root


def _params(root: Path, **values: int) -> str:
    text = (root / "params.yaml").read_text()
    for name, value in values.items():
        assert f"\n{name}: 0\n" in text
        text = text.replace(f"\n{name}: 0\n", f"\n{name}: {value}\n")
    return text


def _run_all(workspace: Workspace) -> None:
    _dvc_repro(workspace.path)
    workspace.finish()


def _one_run(root: Path, seed: int = 0) -> str:
    with opened(root, snapshot(root), _params(root, seed=seed), TITLE) as workspace:
        _run_all(workspace)
        return workspace.run


def test_a_workspace_has_what_the_checkout_has_and_the_user_sees_nothing(project: Path) -> None:
    (project / "tasks" / "fetch.py").write_text((project / "tasks" / "fetch.py").read_text() + "# edited\n")
    (project / "new file.txt").write_text("untracked")
    (project / "staged.txt").write_text("staged")
    git(project, "add", "staged.txt")
    (project / "staged.txt").write_text("changed again")
    (project / "secret.txt").write_text("ignored")
    (project / ".dvcignore").unlink()
    index = (project / ".git" / "index").read_bytes()
    seen = [git(project, *words) for words in (("status", "--porcelain"), ("branch", "--all"), ("log", "--all"))]
    with opened(project, snapshot(project), _params(project, seed=5), TITLE) as workspace:
        path = workspace.path
        assert (path / "tasks" / "fetch.py").read_text().endswith("# edited\n")
        assert (path / "new file.txt").read_text() == "untracked"
        assert (path / "staged.txt").read_text() == "changed again"
        assert not (path / "secret.txt").exists() and not (path / ".dvcignore").exists()
        assert "\nseed: 5\n" in (path / "params.yaml").read_text()
        assert git(path, "status", "--porcelain") == b"", "the commit object is the whole run"
        assert path.parent == project / ".cola" / "workspaces"
    assert (project / ".git" / "index").read_bytes() == index
    after = [git(project, *words) for words in (("status", "--porcelain"), ("branch", "--all"), ("log", "--all"))]
    assert after[:2] == seen[:2]
    assert "\nseed: 0\n" in (project / "params.yaml").read_text()


def test_another_runs_worktree_is_never_in_a_snapshot(project: Path) -> None:
    (project / ".gitignore").write_text("/artifacts/\n__pycache__/\n")
    with opened(project, snapshot(project), _params(project), TITLE):
        second = git(project, "ls-tree", "-r", "--name-only", snapshot(project)).decode()
    assert ".cola" not in second


def test_a_committed_run_leaves_edits_out(project: Path) -> None:
    (project / "new.txt").write_text("untracked")
    assert "new.txt" in git(project, "ls-tree", "--name-only", snapshot(project)).decode()
    assert "new.txt" not in git(project, "ls-tree", "--name-only", snapshot(project, committed=True)).decode()


def test_the_cache_is_shared_with_the_checkout_and_between_runs(project: Path) -> None:
    first = _one_run(project)
    work = ran(project)
    assert not (runs(project) / first / ".dvc" / "cache").exists()
    with opened(project, snapshot(project), _params(project, seed=1), TITLE) as workspace:
        assert workspace.run != first
        assert plan(workspace.path)["fetch"] == "run"
    _dvc_repro(project)
    assert ran(project) == [*work, "register"], "all but the uncached out come from the run cache"


def test_an_interrupted_run_goes_on_in_its_place(project: Path) -> None:
    params, tree = _params(project), snapshot(project)
    with opened(project, tree, params, TITLE) as workspace:
        with Dvc(workspace) as dvc:
            dvc.repro("fetch", lambda line: None)
        (workspace.path / "tasks" / "fetch.py").write_text("broken by hand")
        name = workspace.run
    with opened(project, tree, params, TITLE) as workspace:
        assert workspace.run == name
        assert plan(workspace.path)["fetch"] == "keep"
        _run_all(workspace)
    assert ran(project).count("fetch") == 1


def test_a_half_made_workspace_is_made_anew(project: Path) -> None:
    with opened(project, snapshot(project), _params(project), TITLE) as workspace:
        path = workspace.path
    path.with_name(f"{path.name}.lock").write_text("")  # killed before it was whole
    (path / ".dvc" / "config.local").unlink()
    with opened(project, snapshot(project), _params(project), TITLE) as workspace:
        assert (workspace.path / ".dvc" / "config.local").is_file()


def test_a_workspace_whose_removal_was_cut_off_is_made_anew(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its settings it would have a cache of its own, and `cola adopt` would find nothing."""
    path = runs(project) / _one_run(project)

    def cut_off(place: Path, **_: object) -> None:
        (place / ".dvc" / "config.local").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("flows.clean.shutil.rmtree", cut_off)
        clean(project, everything=True)
    with opened(project, snapshot(project), _params(project), TITLE):
        assert (path / ".dvc" / "config.local").is_file()


def test_what_is_being_written_is_in_no_snapshot(project: Path) -> None:
    before = snapshot(project)
    (project / ".mlflow.db.x.cola-tmp").mkdir()
    (project / ".mlflow.db.x.cola-tmp" / "mlflow.db").write_text("half")
    assert snapshot(project) == before


def test_the_same_run_twice_at_once_is_refused_and_a_killed_one_takes_its_stage_along(project: Path) -> None:
    tree, params = snapshot(project), _params(project)
    with (
        opened(project, tree, params, TITLE),
        pytest.raises(RetryError, match="already going"),
        opened(project, tree, params, TITLE),
    ):
        pass
    (project.parent / "weather" / "fetch.fails").write_text("sleep")
    script = (
        "import sys; from pathlib import Path; from flows.workspace import opened; from flows.child import Dvc\n"
        f"with opened(Path('.'), {tree!r}, Path('params.yaml').read_text(), {TITLE!r}) as w:\n"
        "    Dvc(w).repro('fetch', lambda line: print(line, flush=True))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    for line in parent.stdout:
        if "at work" in line:
            break
    parent.kill()
    parent.wait()
    with opened(project, tree, params, TITLE) as workspace:  # at once
        assert workspace.path.is_dir() and not _standing(project)


def _standing(project: Path) -> list[bytes]:
    """Other processes that stand in this project's workspaces."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(project / ".cola") in str((entry / "cwd").readlink()):
                found.append((entry / "cmdline").read_bytes())
    return found


def test_adopt_brings_the_results_and_nothing_is_left_to_do(project: Path) -> None:
    run = _one_run(project, seed=9)
    written = adopt(project, run)
    assert {str(path) for path in written} == {"params.yaml", "dvc.lock", "artifacts/register"}
    assert (project / "artifacts" / "fetch" / "data").read_text() == "data 9"
    assert "\nseed: 9\n" in (project / "params.yaml").read_text()
    assert set(plan(project).values()) == {"keep"}
    assert adopt(project, run), "once more changes nothing"


@pytest.mark.parametrize("name", ["params.yaml", "dvc.lock"])
def test_adopt_never_overwrites_changes_silently(project: Path, name: str) -> None:
    run = _one_run(project, seed=9)
    (project / name).write_text("schema: '2.0' # mine\n")
    before = {path: path.read_bytes() for path in (project / "params.yaml", project / "dvc.lock") if path.exists()}
    with pytest.raises(UserError, match=f"{name}: has changes that the run did not have"):
        adopt(project, run)
    assert {path: path.read_bytes() for path in before} == before
    assert not (project / "artifacts").exists()
    adopt(project, run, force=True)
    assert "\nseed: 9\n" in (project / "params.yaml").read_text()


def test_adopt_refuses_an_unknown_run_and_a_running_one(project: Path) -> None:
    with pytest.raises(UserError, match="no such workspace"):
        adopt(project, "nothing")
    with (
        opened(project, snapshot(project), _params(project), TITLE) as workspace,
        pytest.raises(RetryError, match="still running"),
    ):
        adopt(project, workspace.run)


def test_adopt_waits_for_a_run_that_is_about_to_end(project: Path) -> None:
    run = _one_run(project, seed=9)
    held = try_lock(runs(project) / f"{run}.lock")
    assert held is not None
    later = Timer(0.5, held.close)
    later.start()
    assert adopt(project, run) and held.closed


def test_adopt_without_the_cache_is_one_line_and_changes_nothing(project: Path) -> None:
    run = _one_run(project, seed=9)
    before = (project / "params.yaml").read_bytes()
    (project / ".dvc" / "cache").rename(project.parent / "away")
    with pytest.raises(UserError) as error:
        adopt(project, run)
    assert "\n" not in str(error.value) and "artifacts" in str(error.value)
    assert (project / "params.yaml").read_bytes() == before and not (project / "dvc.lock").exists()


def test_clean_keeps_interrupted_runs_for_a_week_and_live_ones_always(project: Path) -> None:
    done, tree = _one_run(project, seed=1), snapshot(project)
    with opened(project, tree, _params(project, seed=2), TITLE) as workspace:
        interrupted = workspace.path
    resume = project / ".cola" / "resume" / "abc"
    resume.mkdir(parents=True)
    (resume / "lock").touch()
    leftover = project / "artifacts" / ".prepare.123.cola-tmp"
    leftover.mkdir(parents=True)
    with opened(project, tree, _params(project, seed=3), TITLE) as live:
        assert clean(project) == [runs(project) / done, leftover]
        old = time.time() - WEEK - 60
        for path in (interrupted.with_name(f"{interrupted.name}.lock"), resume / "lock", resume):
            os.utime(path, (old, old))
        held = try_lock(resume / "lock")
        assert held is not None
        assert clean(project) == [interrupted]
        held.close()
        os.utime(resume / "lock", (old, old))
        assert clean(project) == [resume]
        assert clean(project, everything=True) == [] and live.path.is_dir()
    assert clean(project, everything=True) == [live.path]
    assert git(project, "worktree", "list").count(b"\n") == 1


def test_what_could_not_be_removed_is_looked_for_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = runs(project) / _one_run(project)
    with monkeypatch.context() as busy:
        busy.setattr("flows.clean.shutil.rmtree", lambda *_, **__: None)
        assert clean(project) == []
    assert place.is_dir() and clean(project) == [place] and not place.exists()


def test_finished_workspaces_are_bounded_and_come_back_from_the_cache(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.clean.KEPT", 2)  # of which one is the flow's own, held while it trims
    old, older = _one_run(project, seed=1), _one_run(project, seed=2)
    with opened(project, snapshot(project), _params(project, seed=3), TITLE) as interrupted:
        pass
    new = _one_run(project, seed=4)
    record = project / ".cola" / "records" / "evaluate-x.json"
    record.parent.mkdir(exist_ok=True)
    files = [str(runs(project) / old / "artifacts" / "evaluate" / "metrics.json")]
    record.write_text(json.dumps({"artifacts": files}))
    main_checkout.cache_clear()
    assert trim(project) == [runs(project) / older], "not the newest, the interrupted, or one whose files are unposted"
    note_synced(state())
    assert trim(project) == [runs(project) / old]
    assert {path.name for path in runs(project).glob("*/")} == {new, interrupted.run}
    with pytest.raises(UserError, match=f"{old}: no such workspace; if it was cleaned, the same `cola run` restores"):
        adopt(project, old)
    before = ran(project)
    assert _one_run(project, seed=1) == old
    assert ran(project) == [*before, "register"], "all but the uncached out come from the cache"
    assert adopt(project, old)


def test_a_lock_whose_file_was_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between another's opening and locking of the file its last holder may remove it; a third would lock a new one."""
    path, lock = tmp_path / "it.lock", fcntl.flock

    def late(file: TextIO, how: int) -> None:
        if not removed:
            path.unlink()
            removed.append(True)
        lock(file, how)

    removed: list[bool] = []
    monkeypatch.setattr("cola_core.locks.fcntl.flock", late)
    held = try_lock(path)
    assert held is not None and removed and try_lock(path) is None


def test_slots_are_as_many_as_the_cores_allow(tmp_path: Path) -> None:
    assert pool_size(10**6) == 1 and pool_size(1) >= pool_size(2)
    told: list[str] = []
    with slot(tmp_path, 2, lambda: told.append("waits")), slot(tmp_path, 2, lambda: told.append("waits")):
        assert not told
        script = (
            "from pathlib import Path; from flows.slots import slot\n"
            f"with slot(Path({str(tmp_path)!r}), 2, lambda: print('waits', flush=True), 0.05): print('in')"
        )
        third = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert third.stdout is not None and third.stdout.readline() == "waits\n"
    assert third.communicate()[0] == "in\n"


def _dvc_repro(root: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "--quiet"], cwd=root, env={**os.environ, "PATH": path}, check=True
    )
