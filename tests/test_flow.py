"""The flow against a real Prefect server: tasks, states, retries, artifacts, a schedule that starts runs by itself."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from miniature import make, ran, variables, weather
from servers import end, free_port, prefect_server, until

pytestmark = pytest.mark.timeout(600)
STAGES = ["fetch", "allocate@1", "allocate@2", "evaluate", "register"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """One Prefect server for the session, with a home of its own; yields the address of its API."""
    port = free_port()
    home = tempfile.mkdtemp()
    process = prefect_server(Path(home), port)
    try:
        yield f"http://127.0.0.1:{port}/api"
    finally:
        end(process)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("flow"))


def _variables(root: Path, server: str) -> dict[str, str]:
    return variables(root, PREFECT_API_URL=server, PREFECT_HOME=str(root.parent / "prefect"))


def cola(root: Path, server: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line with a short pause between retries."""
    script = (
        "import flows.pipeline; flows.pipeline.RETRY_SECONDS = 0.2\n"
        f"from flows.cli import main; raise SystemExit(main({[*words]}))"
    )
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=root, env=_variables(root, server), capture_output=True, text=True, check=False)


def _post(server: str, path: str, body: dict[str, Any]) -> Any:
    import httpx

    answer = httpx.post(f"{server}{path}", json=body)
    answer.raise_for_status()
    return answer.json()


def _last_run(server: str) -> dict[str, Any]:
    """The run that started last; those that a schedule has only planned would stand before it."""
    started = {"state": {"type": {"not_any_": ["SCHEDULED"]}}}
    found = _post(server, "/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1, "flow_runs": started})
    return dict(found[0])


def _tasks(server: str, run: str) -> dict[str, dict[str, Any]]:
    """Task runs by name; the events that make them arrive a moment after the run has ended."""
    body = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}

    def settled() -> list[dict[str, Any]] | None:
        tasks = _post(server, "/task_runs/filter", body)
        return tasks if tasks and all(task["state_type"] in ("COMPLETED", "FAILED") for task in tasks) else None

    return {task["name"]: task for task in until(settled, 30)}


def _lines(server: str, task: str) -> str:
    body = {"logs": {"task_run_id": {"any_": [task]}}, "sort": "TIMESTAMP_ASC"}
    return "\n".join(entry["message"] for entry in until(lambda: _post(server, "/logs/filter", body), 30))


def test_a_run_shows_every_stage_and_the_same_run_again_is_cached(project: Path, server: str) -> None:
    done = cola(project, server, "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ran(project) == STAGES
    run = _last_run(server)
    assert (run["name"], run["state_name"]) == ("cola_gora/r8/seed0", "Completed")
    tasks = _tasks(server, run["id"])
    assert list(tasks) == STAGES
    assert {task["state_name"] for task in tasks.values()} == {"Completed"}
    waits = {name: {one["id"] for one in task["task_inputs"].get("wait_for", [])} for name, task in tasks.items()}
    assert waits["evaluate"] == {tasks["allocate@2"]["id"]} and waits["allocate@1"] == {tasks["fetch"]["id"]}
    assert "allocate@2 at work" in _lines(server, tasks["allocate@2"]["id"])

    adopt = re.findall(r"cola (adopt \S+)", done.stdout)[-1].split()
    again = cola(project, server, "run")
    assert again.returncode == 0, again.stdout + again.stderr
    assert ran(project) == STAGES, "nothing ran twice"
    states = {name: task["state_name"] for name, task in _tasks(server, _last_run(server)["id"]).items()}
    assert states == dict.fromkeys(STAGES, "Cached")
    assert cola(project, server, *adopt).returncode == 0
    assert (project / "artifacts" / "evaluate" / "metrics.json").is_file() and (project / "dvc.lock").is_file()


def test_only_what_changed_runs(project: Path, server: str) -> None:
    before, left = ran(project), project / "artifacts/links/.1.abc.cola-tmp"
    left.mkdir(parents=True)
    done = cola(project, server, "run", "-S", "evaluate.rows=5")
    assert done.returncode == 0, done.stderr
    assert not left.exists(), "what a killed stage of the checkout left goes with the next flow"
    assert ran(project)[len(before) :] == ["evaluate"] or ran(project)[len(before) :] == ["evaluate", "register"]
    states = {name: task["state_name"] for name, task in _tasks(server, _last_run(server)["id"]).items()}
    assert [states[name] for name in STAGES[:4]] == ["Cached", "Cached", "Cached", "Completed"]


def test_artifacts_show_ranks_scores_and_figures(project: Path, server: str) -> None:
    done = cola(project, server, "run", "--seed", "21")
    assert done.returncode == 0, done.stderr
    run = _last_run(server)["id"]
    found = {a["key"]: a for a in _post(server, "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})}
    assert set(found) == {"ranks-1", "ranks-2", "scores", "summary", "losses"}
    assert '"rank": 40' in found["ranks-2"]["data"] and "790 of 800" in found["ranks-2"]["description"]
    assert "| links 1..2 | 0.900 [0.800, 0.950] |" in found["summary"]["data"]
    assert found["losses"]["type"] == "image" and str(found["losses"]["data"]).startswith("data:image/png;base64,iVBOR")


FAILURES = [
    ("fetch", "75 75", 0, ["fetch"] * 3 + STAGES[1:], ""),
    ("fetch", "75 75 75", 75, ["fetch"] * 3, "fetch: no such luck: the net"),
    ("fetch", "2", 2, ["fetch"], "fetch: no such luck: the net"),
    pytest.param("evaluate", "75", 75, STAGES[:4], "evaluate: no such luck: the net", marks=pytest.mark.chaos),
    ("evaluate", "1", 2, STAGES[:4], "evaluate: ZeroDivisionError: no such luck: the net"),
]


@pytest.mark.parametrize(("stage", "fails", "code", "expected", "told"), FAILURES)
def test_only_75_is_tried_again(
    server: str, tmp_path: Path, stage: str, fails: str, code: int, expected: list[str], told: str
) -> None:
    """RETRIES is 2 in fetch and 0 elsewhere; DVC hides every exit code behind 255."""
    root = make(tmp_path)
    (weather(root) / f"{stage}.fails").write_text(fails)
    done = cola(root, server, "run")
    assert (done.returncode, ran(root)) == (code, expected), done.stdout + done.stderr
    run = _last_run(server)
    task = _tasks(server, run["id"])[stage]
    assert task["run_count"] == expected.count(stage)
    if code:
        assert done.stderr.splitlines()[-1] == told
        assert run["state_name"] == "Failed" and run["state"]["message"] == told == task["state"]["message"]
        assert "cola adopt" not in done.stdout
    else:
        assert run["state_name"] == "Completed"


def test_a_mistake_in_a_run_from_the_ui_is_its_message(project: Path, server: str) -> None:
    script = (
        "from flows.pipeline import cola_pipeline\n"
        "state = cola_pipeline(method='gorra', return_state=True)\n"
        "assert state.is_failed() and state.message.endswith(\"did you mean 'gora'?\"), state.message"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=project, env=_variables(project, server), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "farewell",
    [pytest.param(signal.SIGINT, id="by hand", marks=pytest.mark.chaos), pytest.param(signal.SIGTERM, id="by Prefect")],
)
def test_a_stopped_run_leaves_no_stage_behind_and_goes_on(
    server: str, tmp_path: Path, farewell: signal.Signals
) -> None:
    root = make(tmp_path)
    (weather(root) / "evaluate.fails").write_text("sleep")
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "run"],
        cwd=root,
        env=_variables(root, server),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        until(lambda: "evaluate" in ran(root), 90)
        os.kill(process.pid, farewell)
        told = process.communicate(timeout=40)[1]
    finally:
        end(process)
    assert process.returncode == 128 + farewell
    assert told.splitlines()[-1] == "stopped; the same command goes on from here" and "Traceback" not in told
    standing = [entry for entry in Path("/proc").glob("[0-9]*") if _stands_in(entry, root)]
    assert not standing, [(entry / "cmdline").read_bytes() for entry in standing]
    assert cola(root, server, "run").returncode == 0
    assert ran(root) == [*STAGES[:4], "evaluate", "register"]


def _stands_in(process: Path, root: Path) -> bool:
    try:
        return str(root) in str((process / "cwd").readlink())
    except OSError:
        return False


def test_the_form_offers_the_choices_of_conf(server: str) -> None:
    from flows.compose import choices
    from flows.pipeline import PROJECT, cola_pipeline

    fields = cola_pipeline.parameters.properties
    for group in ("method", "task", "model", "chain"):
        assert fields[group]["enum"] == choices(PROJECT, group) and fields[group]["default"] is None
    assert fields["seed"]["type"] == "integer" and fields["committed"]["type"] == "boolean"
    assert not cola_pipeline.parameters.required


def test_prefect_yaml_deploys_to_a_process_pool(project: Path, server: str, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    environment = _variables(project, server)
    for words in (["work-pool", "create", "cola-local", "--type", "process"], ["--no-prompt", "deploy", "--all"]):
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *words],
            cwd=root, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    import httpx

    deployment = httpx.get(f"{server}/deployments/name/cola-pipeline/nightly").json()
    assert deployment["work_pool_name"] == "cola-local"
    assert deployment["parameters"] == {"committed": True, "promote": True}
    assert [one["schedule"]["cron"] for one in deployment["schedules"]] == ["0 2 * * *"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: open Prefect's UI by hand")
def test_the_ui_opens(project: Path, server: str, tmp_path: Path) -> None:
    assert cola(project, server, "run").returncode == 0
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}"]
    flags += ["--window-size=1500,1300", "--virtual-time-budget=20000", "--dump-dom"]
    command = [str(CHROMIUM), *flags, server.replace("/api", f"/runs/flow-run/{_last_run(server)['id']}")]

    def shown() -> bool:
        page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        return "cola_gora/r8/seed0" in page

    assert until(shown, 240)
