"""The whole DAG, damaged and killed: what is broken is found before it is used, what is interrupted goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from tests.chaos.checks import Outcome, outcome
from tests.chaos.life import STAGES, Life
from tests.chaos.projects import prepare
from tests.tiny import copy_of, environment, hashes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DAMAGED = {
    "adapter": "artifacts/links/1/adapter/adapter_model.safetensors",
    "profile": "artifacts/links/2/profile/directions.safetensors",
    "split": "artifacts/prepare/train.arrow",
    "chain": "artifacts/merge/chain.json",
    "base": "artifacts/fetch/model/model.safetensors",
}


def flip(path: Path) -> None:
    """One bit in the middle of a file, its size and time as they were."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def verify(folder: Path, cache: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "chain", "verify"]
    return subprocess.run(command, cwd=folder, env=environment(cache), capture_output=True, text=True, check=False)


def test_verify_names_every_damaged_file_object_and_checkpoint(run: Path, cache: str, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path / "copy")
    good = verify(folder, cache)
    assert good.returncode == 0 and "the chain is what it was" in good.stdout, good.stdout + good.stderr
    for path in DAMAGED.values():
        flip(folder / path)
    state = folder / ".cola/resume/abc/state.safetensors"
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_bytes(b"cut off")
    cached = max((folder / ".dvc/cache/files/md5").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    oid = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]["evaluate"]["outs"][0]["md5"]
    tree = folder / ".dvc/cache/files/md5" / oid[:2] / oid[2:]  # what a damaged list names cannot be looked at
    for path in (cached, tree):
        flip(path)
    bad = verify(folder, cache)
    assert bad.returncode == 2 and "8 file(s) are not what was written" in bad.stderr, bad.stdout + bad.stderr
    for path in (*DAMAGED.values(), state.relative_to(folder), cached.relative_to(folder), tree.relative_to(folder)):
        assert f"{path}: " in bad.stdout, path


@pytest.mark.parametrize(("path", "command"), [
    (DAMAGED["adapter"], ["merge"]), (DAMAGED["profile"], ["link", "2"]), (DAMAGED["split"], ["link", "1"]),
    (DAMAGED["chain"], ["register"]), (DAMAGED["base"], ["profile", "1"]),
    ("artifacts/links/1/ranks.json", ["link", "1"]), ("artifacts/fetch/data/train.jsonl", ["prepare"]),
    ("artifacts/evaluate/metrics.json", ["register"]),
])  # fmt: skip
def test_a_flipped_bit_stops_the_stage_that_would_use_it(
    run: Path, cache: str, tmp_path: Path, path: str, command: list[str]
) -> None:
    folder = copy_of(run, tmp_path / "copy")
    flip(folder / path)
    done = subprocess.run(
        [sys.executable, "-m", f"tasks.{command[0]}", *command[1:]],
        cwd=folder, env=environment(cache), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stdout + done.stderr
    assert path in done.stderr and "changed since it was written" in done.stderr


@pytest.mark.parametrize("farewell", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.chaos)])
def test_a_link_stopped_by_hand_keeps_its_last_step(
    run: Path, cache: str, tmp_path: Path, farewell: signal.Signals
) -> None:
    """Checkpoints are far apart: the one that is found was written on the way out."""
    folder = copy_of(run, tmp_path / "copy")
    raw = yaml.safe_load((folder / "params.yaml").read_text())
    raw["chain"]["1"]["link"] = {"steps": 4000, "checkpoint_every": 4000, "validate_every": 4000}
    raw["schedule"]["horizon"] = 4006
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    command, kept = [sys.executable, "-m", "tasks.link", "1"], 0
    for _ in range(2):
        with subprocess.Popen(
            command, cwd=folder, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as child:  # fmt: skip
            assert child.stdout is not None
            line = child.stdout.readline()
            while not line.startswith("link@1: "):
                line = child.stdout.readline()
            step = int(line.split()[1].partition("/")[0])
            assert step == kept + 1, "goes on behind the last step"
            child.send_signal(farewell)
            _, told = child.communicate(timeout=60)
        assert child.returncode == 128 + farewell
        assert told.splitlines()[-1] == "link: stopped; the same command goes on from here, a link from its last step"
        (state,) = (folder / ".cola/resume").glob("*/state.safetensors")
        with safe_open(state, framework="pt") as file:
            kept = json.loads(file.metadata()["progress"])["step"]
        assert kept >= step


@pytest.mark.chaos
def test_killed_four_times_it_ends_as_if_nothing_had_been(run: Path, tmp_path: Path) -> None:
    """The harness behind `make chaos`, which kills two hundred times."""
    folder = prepare(tmp_path / "project")
    life = Life(folder, str(tmp_path / "cache"), random.Random(7))
    life.live(4)
    assert not life.failures and len(life.kills) >= 3, life.failures or life.kills
    wanted = Outcome(hashes(run), [], Counter(FINISHED=len(STAGES)), 1, "")
    assert not outcome(folder, life.cache).differences(wanted), life.kills
