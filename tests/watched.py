"""Commands run without network, under the eyes of watch/sitecustomize.py, which lets nobody unpickle."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["CANARY", "TOLD", "WATCH", "Watched", "leaks", "namespace", "watch", "watched_variables"]

NAMESPACE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
WATCH = Path(__file__).parent / "watch"
CANARY = "kan4r1" + "envogel"  # in two parts, so that this file is no finding in a clone
TOLD = {"HF_TOKEN": CANARY, "PIP_INDEX_URL": f"https://me:{CANARY}@127.0.0.1:9/simple", "SOME_API_KEY": CANARY}

# Who may unpickle, in servers alone: no stage does, and nothing of DVC, MLflow's client, torch or the hub's libraries.
MAY_UNPICKLE = {
    "multiprocessing": "spawn hands a worker of MLflow's and Prefect's servers its start through a pipe of its parent",
    "docket": "the queue inside Prefect's server, in that process's own memory",
}


def namespace() -> list[str]:
    """The command that gives what follows a network of loopback alone; the test is skipped where there is none."""
    if missing := why_no_namespace():
        pytest.skip(missing)
    return NAMESPACE


@functools.cache
def why_no_namespace() -> str:
    if not shutil.which("unshare") or not shutil.which("ip"):
        return "needs unshare (util-linux) and ip (iproute2)"
    tried = subprocess.run([*NAMESPACE, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True)
class Watched:
    """What one watched command left: its words, what the watch noted, and where sockets listened."""

    root: str
    told: str
    code: int
    notes: list[str]
    ports: list[str]

    def stopped(self) -> list[str]:
        """Whoever unpickled without leave, and whoever asked for an address outside."""
        return [note for note in self.notes if note.startswith(("refused", "left"))]

    def processes(self) -> list[str]:
        return [note.removeprefix("active ") for note in self.notes if note.startswith("active ")]


def watched_variables(folder: Path, variables: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(WATCH), variables["PYTHONPATH"]])
    more = {"WATCH_LOG": str(folder / "watch.log"), "WATCH_ALLOWED": " ".join(MAY_UNPICKLE), "PYTHONPATH": path}
    kept = {name: value for name, value in variables.items() if name not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
    return {**kept, **more, **TOLD}


def watch(folder: Path, root: Path, variables: dict[str, str], *command: str) -> Watched:
    """Run `command` in `root`, without network (where that can be) and under the eyes of watch/sitecustomize.py."""
    log, ports = folder / "watch.log", folder / "ports.json"
    away = [] if why_no_namespace() else [*NAMESPACE, sys.executable, str(WATCH / "loopback.py"), str(ports)]
    line, settings = [*away, sys.executable, "-m", *command], watched_variables(folder, variables)
    done = subprocess.run(line, cwd=root, env=settings, capture_output=True, text=True, check=False)
    notes = log.read_text().splitlines() if log.exists() else []
    heard = json.loads(ports.read_text()) if away else []
    return Watched(str(root), done.stdout + done.stderr, done.returncode, notes, heard)


def leaks(folder: Path, *but: str) -> list[str]:
    """Files below `folder` that hold the canary."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in but]
    return [str(path) for path in files if CANARY.encode() in path.read_bytes()]
