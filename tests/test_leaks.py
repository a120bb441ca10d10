"""No stage and no command tells a secret, whatever fails: not in its output, nor in what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniature
import pytest
import yaml
from test_assets import params_for

from tasks.context import Context, Done
from tasks.records import record
from tests.watched import CANARY, TOLD, leaks

ROOT = Path(__file__).resolve().parents[1]


def stage_with(
    folder: Path, change: Callable[[dict[str, Any]], Any], **variables: str
) -> subprocess.CompletedProcess[str]:
    """The real stage fetch in `folder` with parameters that `change` has spoilt."""
    params = params_for(folder, "path:rows.csv")
    (folder / "rows.csv").write_text("a\n1\n")
    change(params)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    settings = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "COLA_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "tasks.fetch"]
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)


def asset(name: str, sha256: str | None = None) -> Callable[[dict[str, Any]], Any]:
    return lambda params: params["fetch"]["data"]["train"].update(asset=name, sha256=sha256)


PIP = {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1", "PIP_NO_INDEX": "", "PIP_FIND_LINKS": "", **TOLD}
STAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, str], int, str]] = {
    "pip": (asset("pypi:tiny-data==1.0/x", "0" * 64), PIP, 75, "no package index can be reached"),
    "pip, a wrong address": (
        asset("pypi:tiny-data==1.0/x", "0" * 64), PIP | {"PIP_INDEX_URL": f"htps://me:{CANARY}@host/simple"}, 2, "tiny",
    ),
    "the hub": (
        asset("hub:org/name@main"), {"HF_ENDPOINT": f"http://me:{CANARY}@127.0.0.1:9", "HF_TOKEN": CANARY}, 75, "hub",
    ),
    "a reference": (asset(f"https://me:{CANARY}@host/x.csv"), {}, 2, "fetch.data.train.asset: holds a password"),
    "an unknown key": (lambda params: params["fetch"].update(api_key=CANARY), {}, 2, "fetch.api_key: unknown key"),
    "a wrong value": (lambda params: params["fetch"].update(model={"token": CANARY}), {}, 2, "fetch.model.token: "),
    "a wrong type": (
        lambda params: params["fetch"]["model"].update(sha256={"api_key": CANARY}), {}, 2, "fetch.model.sha256: ",
    ),
    "a name in the way": (lambda params: params.update(seed=f"https://me:{CANARY}@host"), {}, 2, "seed: "),
}  # fmt: skip


@pytest.mark.parametrize("case", STAGES)
def test_a_stage_tells_no_secret(tmp_path: Path, case: str) -> None:
    change, variables, code, line = STAGES[case]
    done = stage_with(tmp_path, change, **variables)
    assert done.returncode == code and line in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert CANARY not in done.stdout + done.stderr and leaks(tmp_path, "params.yaml") == []


def test_a_failure_told_to_the_flow_holds_no_secret(tmp_path: Path) -> None:
    note = tmp_path / "failure.json"
    stage_with(tmp_path, asset(f"https://me:{CANARY}@host/x.csv"), COLA_FAILURE=str(note))
    assert json.loads(note.read_text())["code"] == 2 and CANARY not in note.read_text()


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.make(tmp_path_factory.mktemp("mini"))


def cola(root: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = miniature.variables(root, PREFECT_HOME=str(root.parent / "prefect"), **variables)
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=root, env=settings, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.parametrize(
    "override",
    [
        f"fetch.hub_token={CANARY}",
        f"+fetch.hub_token={CANARY}",
        f"fetch.hub_token=[{CANARY} {CANARY}",
        f"fetch.model.asset='https://me:{CANARY}@host/x'",
        f"register.name=@{{x}} https://me:{CANARY}@host",
    ],
)
def test_an_override_tells_no_secret(mini: Path, override: str) -> None:
    done = cola(mini, "flows.cli", "run", "-S", override)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert CANARY not in done.stdout + done.stderr and leaks(mini.parent) == []


@pytest.mark.parametrize("words", [["tasks.sync"], ["flows.cli", "sync"]])
def test_a_store_that_is_away_tells_no_password(mini: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr("tasks.records.home", lambda: mini / ".cola")
    raw = {"register": {"name": "x"}, "recipe": "r", "task": "t", "seed": 0}
    used = {"fetch": {"hub_token": CANARY, "from": f"https://me:{CANARY}@host"}}
    record(Context("fetch", None, raw, used=used), Done(), time.time())
    done = cola(mini, *words, MLFLOW_TRACKING_URI=f"http://me:{CANARY}@127.0.0.1:9")
    assert done.returncode == 75 and "MLflow at http://***@127.0.0.1:9" in done.stderr, done.stderr
    assert CANARY not in done.stdout + done.stderr and leaks(mini.parent) == []


@pytest.mark.slow
def test_a_prefect_server_that_is_away_tells_no_password(mini: Path) -> None:
    address = f"http://me:{CANARY}@127.0.0.1:9/api"
    done = cola(mini, "flows.cli", "run", PREFECT_API_URL=address, PREFECT_CLIENT_MAX_RETRIES="0")
    assert done.returncode and "127.0.0.1:9" in done.stdout + done.stderr
    assert CANARY not in done.stdout + done.stderr and leaks(mini.parent) == []


CRASHES = {
    "a stage": "from tasks.stage import run; run(lambda context: crash())",
    "the command line": "import flows.cli; flows.cli.main = crash; flows.cli.app()",
    "sync": "import tasks.sync; tasks.sync.sync = crash; tasks.sync._main()",
}


@pytest.mark.parametrize("where", CRASHES)
def test_a_traceback_tells_no_secret(tmp_path: Path, where: str) -> None:
    """Whatever a library puts into an error that nobody expected."""
    params_for(tmp_path, "path:rows.csv")
    program = f"import os\ndef crash(): raise OSError('no way to ' + os.environ['ADDRESS'])\n{CRASHES[where]}"
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "ADDRESS": f"ftp://me:{CANARY}@host"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "OSError: no way to ftp://***@host" in done.stderr, done.stderr
    assert CANARY not in done.stderr and leaks(tmp_path) == []
