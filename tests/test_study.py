"""A whole study on a tiny model: real cells, real DVC, real MLflow, a real Prefect server."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers import end, free_port, prefect_server, until

from cola_core.errors import RetryError
from cola_core.files import tree_hash
from cola_core.locks import try_lock
from cola_core.study.design import read_design
from cola_core.study.results import Result, read_results
from cola_core.study.sweep import choose, curves, wanted
from flows.compose import defaults
from flows.study.pool import Pool
from flows.study.winners import winners
from tests.tiny import TOPICS, environment, project

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

ANSWERS = "{" + ", ".join(f'{topic}: " {topic}"' for topic in TOPICS) + "}"
STUDY: dict[str, Any] = {
    "name": "tiny",
    "title": "A tiny study",
    "question": "Does it run?",
    "expected": "Yes.",
    "out": "results",
    "set": [
        "machine.threads=1", "task=custom", "fetch.data.train.asset=path:train.jsonl", f"prepare.answers={ANSWERS}",
        "prepare.train=40", "prepare.validation=12", "prepare.probe=8", "prepare.max_tokens=64",
        "+prepare.held_out={rows: 20}", "prepare.test=null", "evaluate.resamples=100", "allocate.rank=4",
        "allocate.r_min=2", "allocate.r_max=8", "link.batch=4", "link.micro_batch=4", "link.keep=last",
    ],
    "models": {"tiny": {"set": ["model=tiny"]}},
    "tasks": {"topics": {"set": ["prepare.prompt='{{ text }} Topic:'"]}},
    "recipes": {
        "lora": {"set": ["method=lora"]},
        "cola_gora": {"set": ["method=cola_gora", "chain=m2"]},
        "wild": {"set": ["method=lora", "link.clip=null"], "learning_rates": [1.0e4], "control": True},
    },
    "sweep": {"learning_rates": [1.0e-3, 3.0e-3], "seeds": [100], "extend": 0},
    "seeds": [0, 1],
    "budget": {"steps": 10},
    "tests": {"baseline": "lora"},
}  # fmt: skip


def write(root: Path, pinned: bool = True, **changes: Any) -> None:
    path = root / "studies" / "tiny.yaml"
    path.parent.mkdir(exist_ok=True)
    pins = [f"fetch.data.train.sha256={tree_hash(root / 'train.jsonl')}"] if pinned else []
    path.write_text(yaml.safe_dump({**STUDY, "set": [*STUDY["set"], *pins], **changes}, sort_keys=False))


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Path, dict[str, str]]]:
    """A project with a study's file, and an environment with servers of its own."""
    folder, port = Path(tempfile.mkdtemp()), free_port()
    server = prefect_server(folder / "prefect", port)
    root = project(folder / "project")
    variables = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_HOME": str(folder / "prefect")}
    try:
        yield root, {**environment(str(folder / "cache")), **variables, "PYTHONPATH": str(root)}
    finally:
        end(server)
        shutil.rmtree(folder, ignore_errors=True)


def cola(root: Path, variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *words]
    return subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def studied(place: tuple[Path, dict[str, str]]) -> tuple[Path, dict[str, str], str]:
    """The study run to its end once; what it printed."""
    root, variables = place
    write(root)
    done = cola(root, variables, "study", "studies/tiny.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return root, variables, done.stdout + done.stderr


def results(root: Path, out: str = "results") -> dict[str, Result]:
    return {r.cell.name: r for r in read_results(root / out)}


def test_every_cell_has_a_result_and_the_rate_of_each_group_is_the_sweeps_best(studied: Any) -> None:
    root, _, told = studied
    design, found = read_design(root / "studies/tiny.yaml"), results(root)
    assert not list(wanted(design, found.values()))
    assert len(found) == 2 * 2 + 1 + 3 * 2
    for group, curve in curves(design, found.values()).items():
        chosen = choose(design.sweep, design.rates(group.recipe), curve)
        rates = {r.cell.learning_rate for r in found.values() if r.cell.group == group and r.cell.phase == "test"}
        assert rates == {chosen.rate}
    assert re.search(r"tiny: 0 results are there; the rest takes about [\d.]+ h on \d processes", told)
    assert "11/11" in told


def test_a_sweep_never_sees_the_test_rows_and_every_test_cell_sees_the_same(studied: Any) -> None:
    found = results(studied[0])
    assert all(not r.metrics for name, r in found.items() if name.startswith("sweep"))
    ends = {name: shlex.split(r.content["command"])[-1] for name, r in found.items() if name.startswith("sweep")}
    assert {end for name, end in ends.items() if "cola_gora" in name} == {"link@2"}, "nor does its command"
    assert {end for name, end in ends.items() if "cola_gora" not in name} == {"link@1"}
    rows = {r.content["rows"] for name, r in found.items() if name.startswith("test") and not r.failed}
    assert len(rows) == 1
    assert len(list((studied[0] / "results/rows").iterdir())) == 1


def test_a_recipe_that_diverges_is_an_outcome_with_its_reason(studied: Any) -> None:
    wild = [r for name, r in results(studied[0]).items() if "wild" in name]
    assert len(wild) == 3
    assert all(r.failed and "try a tenth" in r.content["failed"] for r in wild)


def test_a_probe_is_paid_for_with_steps(studied: Any) -> None:
    found = results(studied[0])
    steps = {name: sum(link["steps"] for link in r.content["links"]) for name, r in found.items() if not r.failed}
    assert {s for name, s in steps.items() if "lora-lr" in name} == {10}
    assert {s for name, s in steps.items() if "cola_gora" in name} == {10 - 2 * 3}, "8 rows at 1.5 are 3 batches of 4"


def test_what_cells_share_is_made_once(studied: Any) -> None:
    root = studied[0]
    shared = [path for path in (root / ".cola/studies/shared").iterdir() if path.is_dir()]
    made = [next(iter((path / "artifacts").iterdir())).name for path in shared]
    assert made.count("fetch") == 1
    assert made.count("prepare") == 3, "one for the sweep's seed, one for each fresh one"
    assert made.count("evaluate_base") == 2
    assert not list((root / ".cola/studies/tiny").iterdir()), "a finished cell leaves nothing but its result"
    assert re.search(r"disk: results 0\.\d MiB; what cells share \d+ MiB in", studied[2])


def test_every_cell_is_one_mlflow_run_and_the_report_leads_there(studied: Any) -> None:
    root, variables, _ = studied
    script = (
        "from tasks.store import open_store\nwith open_store() as s:\n"
        "  e = s.client.get_experiment_by_name('study-tiny')\n"
        "  for r in s.client.search_runs([e.experiment_id]): print(r.info.run_id, r.info.run_name, r.info.status)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=variables, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 11, done.stderr
    assert sum(status == "FAILED" for *_, status in lines) == 3
    page = (root / "results/index.html").read_text()
    assert all(run_id in page for run_id, *_ in lines)


def test_the_report_loads_nothing_and_gives_every_command(studied: Any) -> None:
    root = studied[0]
    page, text = ((root / "results" / name).read_text() for name in ("index.html", "README.md"))
    assert not re.search(r"<(script|link|img|iframe)|url\((?!#)|@import", page)
    for result in results(root).values():
        assert result.content["command"] in text
    assert {path.name for path in (root / "results/figures").iterdir()} == set(re.findall(r"figures/([\w.]+)\)", text))


def test_a_further_seed_runs_its_own_cells_alone_and_none_without_time(studied: Any) -> None:
    root, variables, _ = studied
    before = {path: path.stat().st_mtime_ns for path in (root / "results/cells").iterdir()}
    write(root, budget={"steps": 12})
    done = cola(root, variables, "study", "studies/tiny.yaml", "--budget", "0")
    assert "set aside" in done.stderr and not list((root / "results/cells").iterdir()), done.stderr
    assert len(list((root / "results/superseded/cells").iterdir())) == len(before)
    write(root, seeds=[0, 1, 2])
    done = cola(root, variables, "study", "studies/tiny.yaml", "--budget", "0")
    assert done.returncode == 0 and "3 cells are left; the same command goes on" in done.stdout, done.stderr
    assert {path: path.stat().st_mtime_ns for path in (root / "results/cells").iterdir()} == before
    done = cola(root, variables, "study", "studies/tiny.yaml")
    write(root)
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in (root / "results/cells").iterdir()}
    assert before.items() <= after.items()
    assert {path.name.partition("seed")[2].partition("-")[0] for path in after.keys() - before.keys()} == {"2"}
    assert len(after) == len(before) + 3
    for path in after.keys() - before.keys():
        path.unlink()


def test_killed_it_goes_on_and_ends_with_the_same_results(studied: Any) -> None:
    root, variables, _ = studied
    write(root, out="again", recipes={name: STUDY["recipes"][name] for name in ("lora", "cola_gora")}, seeds=[0])
    command = [sys.executable, "-m", "flows.cli", "study", "studies/tiny.yaml"]
    with (root / "killed.log").open("w") as log:
        process = subprocess.Popen(command, cwd=root, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: list((root / "again/cells").glob("*.gz")), 200)
    except TimeoutError:
        raise AssertionError((root / "killed.log").read_text()) from None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not _workers(root), 60)
    done = cola(root, variables, "study", "studies/tiny.yaml")
    write(root)
    assert done.returncode == 0, done.stderr
    undisturbed, again = results(root), results(root, "again")
    assert len(again) == 2 * 2 + 2
    for name, result in again.items():
        mine, theirs = (
            {k: v for k, v in r.content.items() if k not in ("spent", "code")} for r in (undisturbed[name], result)
        )
        assert mine == theirs, name
    assert any(result.interrupted for result in again.values())
    assert not any(result.interrupted for result in undisturbed.values())


def test_a_stop_waits_for_no_cell_and_leaves_no_process(studied: Any) -> None:
    root, variables, _ = studied
    write(root, out="stopped", recipes={"lora": STUDY["recipes"]["lora"]}, budget={"steps": 1_000_000})
    shutil.rmtree(root / ".cola/resume", ignore_errors=True)
    with (root / "stopped.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "study", "studies/tiny.yaml"],
            cwd=root,
            env=variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
        try:
            until(lambda: list((root / ".cola/resume").rglob("*.safetensors")), 200)  # a link trains
            process.send_signal(signal.SIGINT)
            assert process.wait(100) == 130
        finally:
            process.kill()
            write(root)
    assert "stopped; the same command goes on from here" in (root / "stopped.log").read_text()
    assert not _workers(root) and not (root / "stopped/cells").exists()


def _workers(root: Path) -> list[str]:
    """Processes of cells that outlive the study that started them."""
    found = subprocess.run(["pgrep", "-af", "tasks.cell"], capture_output=True, text=True, check=False).stdout
    mine = []
    for line in found.splitlines():
        pid = line.split()[0]
        try:
            where = str(Path(f"/proc/{pid}/cwd").readlink())
        except OSError:
            continue
        if where.startswith(str(root)):
            mine.append(line)
    return mine


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipes": {"lora": {"set": ["method=lorra"]}}}, "conf/method has no 'lorra'; did you mean 'lora'"),
        ({"pinned": False}, "fetch.data.train.sha256: missing; a study pins its files, path:train.jsonl too"),
    ],
)
def test_mistakes_are_one_line(studied: Any, changes: dict[str, Any], told: str) -> None:
    root, variables, _ = studied
    write(root, out="mistake", **changes)
    done = cola(root, variables, "study", "studies/tiny.yaml")
    write(root)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert not (root / "mistake").exists()


def test_a_report_alone_needs_no_server(studied: Any) -> None:
    root, variables, _ = studied
    (root / "results/index.html").unlink()
    alone = {name: value for name, value in variables.items() if name != "PREFECT_API_URL"}
    done = cola(root, alone, "study", "studies/tiny.yaml", "--report")
    assert done.returncode == 0, done.stderr
    assert (root / "results/index.html").is_file()
    write(root, budget={"steps": 12})
    done = cola(root, alone, "study", "studies/tiny.yaml", "--report")
    write(root)
    assert done.returncode == 2 and "no results yet" in done.stderr, "those there are another study's"


def test_a_pool_that_was_closed_starts_nothing_any_more(tmp_path: Path) -> None:
    with Pool(tmp_path, tmp_path, 1) as pool:
        pool.close()
        with pytest.raises(RetryError, match="the study was stopped"):
            pool.run({})


def test_clean_removes_what_cells_share_once_it_is_old_and_no_study_runs(studied: Any) -> None:
    root, variables, _ = studied
    folder = root / ".cola/studies"
    old = next(path for path in (folder / "shared").iterdir() if path.is_dir())
    before = {path for path in folder.glob("*/*") if path != old}
    os.utime(old, (0, 0))
    with try_lock(folder / "tiny.lock") or pytest.fail("no study runs"):
        assert cola(root, variables, "clean").returncode == 0 and old.is_dir()
    assert f"removed {old}" in cola(root, variables, "clean").stdout
    assert set(folder.glob("*/*")) == before


def test_the_command_of_a_cell_gives_the_same_adapters_under_dvc_and_a_winner_is_registered(studied: Any) -> None:
    """The command of the winner's cell as its record prints it; then `--register`, for which DVC has nearly all."""
    root, variables, _ = studied
    (best,) = winners(read_design(root / "studies/tiny.yaml"), list(results(root).values()))
    (root / "params.yaml").write_text(defaults(root))
    words = shlex.split(best.content["command"])
    assert words[:3] == ["dvc", "exp", "run"]
    done = subprocess.run([sys.executable, "-m", *words], cwd=root, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for number, link in enumerate(best.content["links"], start=1):
        folder = root / "artifacts/links" / str(number) / "adapter"
        assert tree_hash(folder / "adapter_model.safetensors") == link["adapter"]
        assert tree_hash(folder / "link.json") == link["chain"]
    (root / "params.yaml").write_text(defaults(root))  # DVC leaves an experiment's parameters there
    done = cola(root, variables, "study", "studies/tiny.yaml", "--register")
    assert done.returncode == 0, done.stdout + done.stderr
    script = (
        "from tasks.store import open_store\nwith open_store() as s:\n"
        "  v = s.client.get_model_version_by_alias('cola-custom', 'challenger')\n"
        "  print(v.tags['cola.recipe'], v.tags['cola.seed'], v.tags['cola.accuracy'])"
    )
    told = subprocess.run([sys.executable, "-c", script], cwd=root, env=variables, capture_output=True, text=True)
    assert told.stdout.split()[:2] == [best.cell.group.recipe, str(best.cell.seed)], told.stderr
    assert float(told.stdout.split()[2]) == pytest.approx(best.metrics["accuracy"])
    (links,) = (root / ".cola/workspaces").glob("*/artifacts/links")
    adapters = [link["adapter"] for link in best.content["links"]]
    found = [tree_hash(links / str(k) / "adapter/adapter_model.safetensors") for k in range(1, len(adapters) + 1)]
    assert found == adapters
