"""Many at once: flows, `dvc repro`, links. Nobody sees a lock, another's files or another result than alone."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from miniature import git, make, ran, variables
from servers import end, free_port, prefect_server, until
from test_tracking import empty_database  # noqa: F401  a fixture

from tasks.places import main_checkout
from tasks.resume import forget_finished
from tests.tiny import environment, hashes, project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FORBIDDEN = ("database is locked", "is busy", "blocked by", "index.lock", "Traceback", "Unable to acquire", "ERROR")


def _started(root: Path, command: list[str], **more: str) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {k: v for k, v in {**variables(root), "PATH": path, **more}.items() if v}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=root, env=settings, stdout=pipe, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def _all_well(children: list[subprocess.Popen[str]]) -> list[str]:
    """What each printed, when all have ended well and none has told of a lock."""
    outputs = [child.communicate(timeout=600)[0] for child in children]
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
        assert not [word for word in FORBIDDEN if word in output], output
    return outputs


def _hashes(folder: Path) -> dict[str, Any]:
    lock = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {name: entry.get("outs") for name, entry in lock.items()}


def _workspace(root: Path, output: str) -> Path:
    return root / ".cola/workspaces" / output.rsplit("cola adopt ", 1)[1].split()[0].strip("'\")")


@pytest.mark.chaos
def test_ten_flows_and_dvc_repro_at_once(tmp_path: Path, empty_database: Path) -> None:  # noqa: F811
    root, port = make(tmp_path), free_port()
    shutil.copy(empty_database, root / "mlflow.db")
    serial = make(tmp_path / "serial")
    (serial / "params.yaml").write_text((serial / "params.yaml").read_text().replace("\nseed: 0\n", "\nseed: 1\n"))
    _all_well([_started(serial, ["dvc", "repro"])])
    alone = _hashes(serial)
    before = git(root, "status", "--porcelain"), git(root, "rev-parse", "HEAD")
    server = prefect_server(tmp_path / "server", port)
    mine = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_HOME": str(tmp_path / "prefect")}
    try:
        flows = [_started(root, ["flows.cli", "run", "--seed", str(seed)], **mine) for seed in range(10)]
        repro = _started(root, ["dvc", "repro"])
        outputs = _all_well([*flows, repro])[:10]
    finally:
        end(server)
    places = [_workspace(root, output) for output in outputs]
    assert len(set(places)) == 10
    for seed, place in enumerate(places):
        assert (place / "artifacts/fetch/data").read_text() == f"data {seed}"
    assert _hashes(places[1]) == alone and _hashes(places[0]) == _hashes(root) != alone
    assert (root / "artifacts/fetch/data").read_text() == "data 0"
    (root / "dvc.lock").unlink()
    assert (git(root, "status", "--porcelain"), git(root, "rev-parse", "HEAD")) == before


@pytest.mark.chaos
def test_two_flows_without_a_server(tmp_path: Path, empty_database: Path) -> None:  # noqa: F811
    """Each starts a temporary server of its own, on one database that neither has yet."""
    root = make(tmp_path)
    shutil.copy(empty_database, root / "mlflow.db")
    mine = {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": ""}
    flows = [_started(root, ["flows.cli", "run", "--seed", str(seed)], **mine) for seed in range(2)]
    for seed, output in enumerate(_all_well(flows)):
        assert (_workspace(root, output) / "artifacts/fetch/data").read_text() == f"data {seed}"
    assert ran(root).count("fetch") == 2


@pytest.mark.chaos
def test_a_flow_beside_dvc_repro_on_the_whole_dag(run: Path, cache: str, tmp_path: Path) -> None:
    """Both want the same two links: whoever comes second takes the first one's result."""
    root = project(tmp_path / "project")
    mine = {**environment(cache), "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": ""}
    both = [_started(root, command, **mine) for command in (["flows.cli", "run"], ["dvc", "repro"])]
    flow, _ = _all_well(both)
    assert hashes(root) == hashes(_workspace(root, flow)) == hashes(run)


LINK = """
import sys, time
from pathlib import Path
from tasks.resume import forget_finished, resume_folder
from tasks.context import Context
with resume_folder(Context("link@1", "1", {}), []) as folder:
    steps = folder / "steps"
    done = int(steps.read_text()) if steps.exists() else 0
    print("from", done, flush=True)
    sys.stdin.readline()
    steps.write_text("40")
"""


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    main_checkout.cache_clear()
    yield tmp_path
    main_checkout.cache_clear()


def _same_link(folder: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    mine = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", LINK], cwd=folder, env=mine, stdin=pipe, stdout=pipe, text=True)


def _says(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


WAITS = "link@1: another process is at the same work; this one waits for its result"


def _ends(child: subprocess.Popen[str]) -> None:
    child.communicate("\n", timeout=60)
    assert child.returncode == 0


@pytest.mark.parametrize("killed", [False, True], ids=["ends well", "is killed"])
def test_the_same_link_twice_at_once_waits_and_goes_on(bare: Path, killed: bool) -> None:
    first = _same_link(bare)
    assert _says(first) == "from 0"
    second = _same_link(bare)
    assert _says(second) == WAITS
    if killed:
        (folder,) = (bare / ".cola/resume").iterdir()
        (folder / "steps").write_text("7")
        first.kill()
        first.communicate()
    else:
        _ends(first)
    assert _says(second) == ("from 7" if killed else "from 40")
    _ends(second)


def test_what_another_checkout_has_finished_stays_until_its_dvc_has_it(bare: Path) -> None:
    for name, place in (("mine", str(bare)), ("theirs", "/elsewhere"), ("old", "/elsewhere")):
        note = bare / ".cola/resume" / name / "done"
        note.parent.mkdir(parents=True)
        note.write_text(place)
        os.utime(note, (0, 0) if name == "old" else None)
    forget_finished()
    assert [path.name for path in (bare / ".cola/resume").iterdir()] == ["theirs"]


def test_a_folder_removed_while_a_link_waits_is_locked_anew(bare: Path) -> None:
    """`forget_finished` removes it under the lock; whoever waits must not share the next one's folder."""
    first = _same_link(bare)
    _says(first)
    _ends(first)
    (folder,) = (bare / ".cola/resume").iterdir()
    with (folder / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = _same_link(bare)
        assert _says(second) == WAITS
        queued = f":{os.fstat(held.fileno()).st_ino} "
        until(lambda: any("->" in line and queued in line for line in Path("/proc/locks").read_text().splitlines()), 30)
        shutil.rmtree(folder)
        third = _same_link(bare)
        assert _says(third) == "from 0"
    assert second.stdout and not select.select([second.stdout], [], [], 1.0)[0], "it works beside the third"
    _ends(third)
    assert _says(second) == "from 40"
    _ends(second)
