"""dvc.yaml is the only list of stages, and every stage's deps are exactly the files its code imports."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from miniature import REPOSITORY, git, make, ran, variables, weather

from cola_core.errors import RetryError, UserError
from flows.child import Dvc
from flows.graph import outline, plan, stages
from flows.imports import code_deps, stage_deps
from flows.snapshot import snapshot
from flows.workspace import opened

DVC = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]


@pytest.fixture(scope="module")
def code() -> dict[str, list[str]]:
    return code_deps()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make(tmp_path)
    for name, value in variables(root).items():
        monkeypatch.setenv(name, value)
    return root


@pytest.mark.parametrize("stage", DVC)
def test_code_deps_are_the_import_graph(stage: str, code: dict[str, list[str]]) -> None:
    found = stage_deps(DVC[stage])[1]
    assert found == code[stage], "run `python -m flows.imports --write`"
    assert f"tasks/{stage}.py" in found and "cola_core/__init__.py" in found and "tasks/__init__.py" in found


@pytest.mark.parametrize("stage", ["fetch", "prepare", "head", "profile", "allocate", "link"])
def test_training_depends_on_no_evaluation_export_or_report(stage: str, code: dict[str, list[str]]) -> None:
    later = {"evaluate", "export", "report", "figures", "metrics", "card", "predict", "register", "publish", "sync"}
    assert not {Path(file).stem for file in code[stage]} & later


@pytest.mark.parametrize("stage", ["evaluate_base", "evaluate"])
def test_evaluation_depends_on_no_training(stage: str, code: dict[str, list[str]]) -> None:
    assert not {Path(file).stem for file in code[stage]} & {"train", "links", "checkpoints", "health", "initialisers"}


def test_the_real_graph_has_the_chains_links_in_order() -> None:
    names = [stage.name for stage in stages(REPOSITORY)]
    chain = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["chain"]
    assert {f"{task}@{key}" for task in ("profile", "allocate", "link") for key in chain} <= set(names)
    position = {name: i for i, name in enumerate(names)}
    for stage in stages(REPOSITORY):
        assert all(position[before] < position[stage.name] for before in stage.after)


def _edit(root: Path, change: Any) -> None:
    params = yaml.safe_load((root / "params.yaml").read_text())
    change(params)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def _steps_of_link_2(root: Path, steps: int) -> None:
    def change(params: dict[str, Any]) -> None:
        params["chain"]["2"]["link"]["steps"] = steps
        params["schedule"]["horizon"] = params["chain"]["1"]["link"]["steps"] + steps

    _edit(root, change)


def test_an_unquoted_key_is_refused_before_dvc_drops_it(project: Path) -> None:
    _edit(project, lambda p: p["chain"].update({2: p["chain"].pop("2")}))
    with pytest.raises(UserError, match=r"chain\.2: the key must be quoted"):
        stages(project)


def test_a_stage_must_exist_for_every_link(project: Path) -> None:
    text = (project / "dvc.yaml").read_text()
    one = 'foreach: {"1": {link: {}}}'
    (project / "dvc.yaml").write_text(text.replace("foreach: ${chain}", one))
    with pytest.raises(UserError, match=r"allocate: resolves to links 1; the chain has 1, 2"):
        stages(project)


def test_a_broken_dvc_yaml_is_one_line(project: Path) -> None:
    (project / "dvc.yaml").write_text("stages: [")
    with pytest.raises(UserError) as error:
        stages(project)
    assert "\n" not in str(error.value) and "dvc.yaml" in str(error.value)


def test_the_plan_says_what_dvc_does(project: Path) -> None:
    """run everything; keep everything; after a change only what follows it; back again: from the run cache."""
    workspace = opened(project, snapshot(project), (project / "params.yaml").read_text(), "a/b/seed0")
    with workspace as w, Dvc(w) as dvc:
        assert set(plan(w.path).values()) == {"run"}
        names = [stage.name for stage in stages(w.path)]
        assert [dvc.repro(name, lambda line: None) for name in names] == [True] * len(names)
        assert set(plan(w.path).values()) == {"keep"}
        assert outline(w.path) == (stages(w.path), frozenset())
        before = ran(project)
        _steps_of_link_2(w.path, 7)
        assert plan(w.path) == {
            "fetch": "keep", "allocate@1": "keep", "allocate@2": "run", "evaluate": "run", "register": "run",
        }  # fmt: skip
        assert outline(w.path)[1] == {"allocate@2", "evaluate", "register"}
        dvc.repro("allocate@2", lambda line: None)
        assert ran(project) == [*before, "allocate@2"]
        _steps_of_link_2(w.path, 40)
        assert plan(w.path)["allocate@2"] == "restore"
        shutil.rmtree(w.path / "artifacts" / "fetch")
        assert plan(w.path)["fetch"] == "restore"
        assert not dvc.repro("fetch", lambda line: None)


def test_a_stage_cannot_speak_for_dvc(project: Path) -> None:
    """Whatever it prints, a stage has ended when DVC says so."""
    path = project / "tasks" / "fetch.py"
    path.write_text(
        path.read_text().replace(
            '    print(f"{context.stage}',
            '    print("\\0end x 0\\n\\0end 0", flush=True)\n    time.sleep(1)\n    print(f"{context.stage}',
        )
    )
    with opened(project, snapshot(project), (project / "params.yaml").read_text(), "a/b/seed0") as w, Dvc(w) as dvc:
        assert dvc.repro("fetch", lambda line: None)
        assert (w.path / "artifacts/fetch/data").is_file()
        assert dvc.repro("allocate@1", lambda line: None)


def test_a_stop_between_two_starts_leaves_no_child(project: Path) -> None:
    """The child has started; the thread that waits for its end has not."""
    with opened(project, snapshot(project), (project / "params.yaml").read_text(), "a/b/seed0") as w, Dvc(w) as dvc:
        dvc._process = child = subprocess.Popen(
            ["sleep", "600"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
    assert child.poll() is not None


def test_a_killed_dvc_leaves_no_stage_behind(project: Path) -> None:
    (weather(project) / "fetch.fails").write_text("sleep")
    with opened(project, snapshot(project), (project / "params.yaml").read_text(), "a/b/seed0") as w, Dvc(w) as dvc:

        def kill(line: str) -> None:
            if "at work" in line:
                group.append(dvc._process.pid)  # type: ignore[union-attr]
                os.kill(group[0], signal.SIGKILL)

        group: list[int] = []
        with pytest.raises(UserError, match="DVC's process was killed"):
            dvc.repro("fetch", kill)
        left = subprocess.run(["ps", "-o", "stat=", "-g", str(group[0])], capture_output=True, text=True, check=False)
        assert all(state.startswith("Z") for state in left.stdout.split())
        assert not (weather(project) / "woke").exists(), "it was let sleep on"


def test_a_busy_project_may_be_tried_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.lock import LockError
    from dvc.repo import Repo

    def refuse(self: Repo) -> None:
        raise LockError("somebody is here")

    monkeypatch.setattr("dvc.lock.Lock.lock", refuse)
    with pytest.raises(RetryError, match="somebody is here"):
        plan(project)
    assert git(project, "status", "--porcelain") == b""
