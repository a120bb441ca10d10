"""The whole DAG on a tiny model and a task of three topics, for tests that need all of it for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from cola_core.config.params import check_params

__all__ = ["copy_of", "environment", "hashes", "project", "repro", "stages_run"]

ROOT = Path(__file__).parent.parent
TOPICS = {"fruit": "apple pear plum cherry", "metal": "iron gold zinc copper", "sport": "tennis chess golf rowing"}


def project(folder: Path) -> Path:
    """A clean clone of the work tree as it stands, with the default recipe on the tiny model and a small task."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    for part, count in (("train", 90), ("test", 30)):
        rows = [_row(index, part) for index in range(count)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump(small(raw)))
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def _row(index: int, part: str) -> dict[str, str]:
    topic = list(TOPICS)[index % 3]
    words = TOPICS[topic].split()
    return {"text": f"{part} {index}: {words[index % 4]} and {words[(index // 3) % 4]}", "label": topic}


def small(raw: dict[str, Any]) -> dict[str, Any]:
    """The committed parameters with a tiny model, 2 x 6 steps and the small task."""
    raw["task"] = "topics"
    raw["fetch"] = {
        "model": {"kind": "causal", "asset": "tiny:llama", "sha256": None},
        "data": {name: {"asset": f"path:{name}.jsonl", "sha256": None} for name in ("train", "test")},
    }
    raw["prepare"] |= {
        "prompt": "{{ text }}\nTopic:", "label": "{{ label }}", "answers": {t: f" {t}" for t in TOPICS},
        "validation": 12, "probe": 8, "train": None, "max_tokens": 96,
    }  # fmt: skip
    raw["allocate"] |= {"r_max": 8, "r_min": 2, "rank": 4}
    raw["profile"]["sketch"] = 8
    raw["link"] |= {"checkpoint_every": 1, "validate_every": 3, "learning_rate": 5e-3}
    raw["schedule"]["horizon"] = 12
    for item in raw["chain"].values():
        item["link"]["steps"] = 6
    raw["evaluate"] |= {"rows": 12, "resamples": 100}
    raw["register"]["name"] = "cola-topics"
    check_params(raw)
    return raw


def environment(cache: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "COLA_CACHE": cache, "PYTHONPATH": "."}


def repro(folder: Path, cache: str, *arguments: str) -> str:
    """`dvc repro`; returns what it printed."""
    command = [sys.executable, "-m", "dvc", "repro", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(cache), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def hashes(folder: Path) -> dict[str, str]:
    """Output path -> hash, from dvc.lock; register's out names a store and stands apart."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    outs = {out["path"]: out["md5"] for stage, entry in lock.items() if stage != "register" for out in entry["outs"]}
    assert len(outs) == 3 + 1 + 2 + 1 + 3 * 2 + 2
    return outs


def copy_of(run: Path, folder: Path) -> Path:
    """A run that a test may spoil: nothing is linked to the first one's cache."""
    shutil.copytree(run, folder, symlinks=True)
    for file in folder.rglob("*"):
        if not file.is_symlink():
            file.chmod(0o755 if file.is_dir() else 0o644)
    return folder
