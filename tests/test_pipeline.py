"""The whole DAG by real `dvc repro` on a tiny model: hashes, what re-runs, kills, and mistakes in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny import copy_of, environment, hashes, project, repro, stages_run
from tests.watched import Watched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def run(finished: Watched, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run, which these tests change and put back."""
    assert sorted(stages_run(finished.told)) == sorted(
        ["fetch", "prepare", "head", "evaluate_base", "merge", "evaluate", "register"]
        + [f"{stage}@{k}" for stage in ("profile", "allocate", "link") for k in (1, 2)]
    )
    return copy_of(Path(finished.root), tmp_path_factory.mktemp("copy") / "project")


def test_the_run_leaves_what_it_promises(run: Path) -> None:
    for path in (
        "fetch/model/model.safetensors", "fetch/data/train.jsonl", "prepare/manifest.json", "head/head.json",
        "links/1/profile/profile.json", "links/2/ranks.json", "links/2/adapter/adapter_model.safetensors",
        "merge/chain.json", "merge/checkpoint/config.json", "merge/flat_adapter/adapter_config.json",
        "merge/portable_adapter/adapter_config.json", "evaluate/metrics.json", "evaluate/figures/losses.svg",
        "evaluate/figures/ranks.png", "evaluate/report.html", "register/registration.json", "register/README.md",
    ):  # fmt: skip
        assert (run / "artifacts" / path).is_file(), path
    metrics = json.loads((run / "artifacts/evaluate/metrics.json").read_text())
    assert set(metrics["prefixes"]) == {"1", "2"}
    assert metrics["n"] == metrics["base"]["n"] == metrics["majority"]["n"] == 12
    probed = json.loads((run / "artifacts/links/1/profile/profile.json").read_text())["loss"]
    learned = json.loads((run / "artifacts/links/2/adapter/link.json").read_text())["validation_loss"]
    assert learned < 0.8 * probed, "the chain learned nothing"


def test_law_9_every_token_and_parameter_is_accounted_for(run: Path) -> None:
    links = json.loads((run / "artifacts/merge/chain.json").read_text())["links"]
    card = (run / "artifacts/register/README.md").read_text()
    for link in links:
        folder = run / "artifacts/links" / str(link["link"])
        profile, ranks = (json.loads((folder / name).read_text()) for name in ("profile/profile.json", "ranks.json"))
        assert link["probe_tokens"] == profile["tokens"] > 0
        shapes = {name: module["shape"] for name, module in profile["modules"].items()}
        assert (
            link["trainable_parameters"] == ranks["spent"] == sum(r * sum(shapes[m]) for m, r in ranks["ranks"].items())
        )
        assert ranks["budget"] == sum(4 * sum(shape) for shape in shapes.values()), "the uniform rank of these tests"
        assert f"{link['probe_tokens']:,}" in card and f"{link['trainable_parameters']:,}" in card


def test_nothing_changed_nothing_runs(run: Path, cache: str) -> None:
    assert stages_run(repro(run, cache)) == []


def test_law_6_a_prefect_flow_in_another_clean_clone_gives_the_same_hashes(
    run: Path, cache: str, tmp_path: Path
) -> None:
    """`cola run` in a clone of its own, with a temporary server; then its one printed command, `cola adopt`."""
    folder = project(tmp_path / "second-and-longer-name")
    quiet = {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    settings = {k: v for k, v in environment(cache).items() if k != "PREFECT_API_URL"} | quiet
    command = [sys.executable, "-m", "flows.cli"]
    done = subprocess.run([*command, "run"], cwd=folder, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "artifacts").exists(), "a run stays out of the checkout"
    name = (done.stdout + done.stderr).rsplit("cola adopt ", 1)[1].split()[0].strip("'\")")
    subprocess.run([*command, "adopt", name], cwd=folder, env=settings, capture_output=True, check=True)
    assert hashes(folder) == hashes(run)
    assert (folder / "artifacts/evaluate/metrics.json").is_file()


STAGE = """
from tasks.context import Done
from tasks.stage import run

def stage(context):
    import torch
    torch.set_num_threads(1)
    torch.ones(64, 64) @ torch.ones(64, 64)
    return Done()

run(stage)
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch computes without MKL")
def test_law_6_no_kernel_splits_a_sum_by_the_load(run: Path, cache: str) -> None:
    """MKL tells of every call: CNR is its mode of static schedules; and the record tells what last digits depend on."""
    settings = environment(cache) | {"MKL_VERBOSE": "1"}
    command = [sys.executable, "-c", STAGE]
    done = subprocess.run(command, cwd=run, env=settings, capture_output=True, text=True, check=True)
    calls = [line for line in done.stdout.splitlines() if "SGEMM" in line]
    assert calls and all("CNR:AUTO" in line for line in calls)
    (record,) = (run / ".cola/records").glob("-c-*.json")
    assert json.loads(record.read_text())["machine"]["threads"] == 1
    record.unlink()


def _python(folder: Path, cache: str, *words: str) -> str:
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment(cache), capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_law_7_killed_in_a_link_it_ends_the_same(run: Path, cache: str, tmp_path: Path) -> None:
    folder, again = copy_of(run, tmp_path / "copy"), ["link@1", "--single-item", "--force", "--no-run-cache"]
    command = [sys.executable, "-m", "dvc", "repro", *again]
    child = subprocess.Popen(
        command, cwd=folder, env=environment(cache), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list((folder / ".cola/resume").glob("*/state.safetensors")):
        assert child.poll() is None, "the link ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (folder / "artifacts/links/1/adapter").exists()
    repro(folder, cache, *again)
    shutil.rmtree(folder / "artifacts/links/1/adapter")  # as DVC does when it starts a stage whose end it has not seen
    told = _python(folder, cache, "-m", "tasks.link", "1")
    assert "link@1: 1/6" not in told and "link@1" not in told, "nothing is trained twice"
    _python(folder, cache, "-c", "from tasks.resume import forget_finished; forget_finished()")
    assert not list((folder / ".cola/resume").iterdir()), "a later stage removes the resume state"
    lock = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]["link@1"]["outs"][0]
    assert lock["md5"] == hashes(run)["artifacts/links/1/adapter"]


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("chain.2.link.learning_rate", 1e-4, ["link@2", "register"]),
        ("chain.2.allocate.rank", 3, ["allocate@2", "register"]),
        ("evaluate.batch", 5, ["evaluate", "evaluate_base"]),
        ("merge.portable_adapter", False, ["merge"]),
    ],
)
def test_a_change_touches_its_own_stages_alone(run: Path, cache: str, key: str, value: Any, changed: list[str]) -> None:
    """`--dry` names the stages whose own parameters changed; what follows depends on what they write."""
    with edited(run, key, value):
        assert sorted(stages_run(repro(run, cache, "--dry"))) == changed


def test_link_2_runs_again_without_its_probe(run: Path, cache: str) -> None:
    with edited(run, "chain.2.link.learning_rate", 1e-4):
        assert stages_run(repro(run, cache, "link@2")) == ["link@2"]
    repro(run, cache, "link@2")  # back as it was, from DVC's own cache


@contextmanager
def edited(folder: Path, key: str, value: Any) -> Iterator[None]:
    """params.yaml with one dotted key set, put back afterwards."""
    params = folder / "params.yaml"
    before = params.read_text()
    raw = place = yaml.safe_load(before)
    *path, last = key.split(".")
    for part in path:
        place = place[part]
    place[last] = value
    params.write_text(yaml.safe_dump(raw))
    try:
        yield
    finally:
        params.write_text(before)


@pytest.mark.parametrize(
    ("change", "command", "line"),
    [
        (lambda f: _edit(f, "seed: 0", "sead: 0"), ["head"], "sead: unknown key; did you mean 'seed'?"),
        (lambda f: _edit(f, "prev: '1'", "prev: '2'"), ["link", "2"], "anything else is a cycle"),
        (lambda f: None, ["link", "7"], "chain has no link '7'; it has 1, 2"),
        (lambda f: (f / "artifacts/prepare/task.json").unlink(), ["head"], "artifacts/prepare/task.json: no such file"),
        (lambda f: _cut(f / "artifacts/prepare/train.arrow"), ["link", "1"], "train.arrow: not a prepared split"),
        (lambda f: _cut(f / "artifacts/links/1/adapter/adapter_model.safetensors"), ["merge"], "changed since"),
        (lambda f: _edit(f, "label: '{{ label }}'", "label: '{{ labell }}'"), ["prepare"], "labell"),
        (lambda f: (f / "artifacts/fetch/data/train.jsonl").write_text(""), ["prepare"], "train.jsonl"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    run: Path, cache: str, tmp_path: Path, change: Any, command: list[str], line: str
) -> None:
    folder = copy_of(run, tmp_path / "copy")
    change(folder)
    before = sorted(str(p) for p in (folder / "artifacts").rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", f"tasks.{command[0]}", *command[1:]],
        cwd=folder, env=environment(cache), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(str(p) for p in (folder / "artifacts").rglob("*")) == before, "nothing is written, nothing is lost"


def _edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "params.yaml").read_text()
    assert old in text
    (folder / "params.yaml").write_text(text.replace(old, new))


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
