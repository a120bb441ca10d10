"""The pipeline and then the gate, on a schedule: what one night decides the next one does not ask again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import end, free_port, prefect_server, until

from tests.tiny import copy_of, environment

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

TAGS = """
import json
from tasks.store import open_store
with open_store() as store:
    versions = store.client.search_model_versions("name = 'cola-topics'")
    uses = store.client.get_registered_model("cola-topics").tags.get("cola.uses")
    print(json.dumps([[dict(v.tags) for v in versions], uses]))
"""


def test_every_night_runs_the_pipeline_and_then_the_gate(run: Path, cache: str, tmp_path: Path) -> None:
    import httpx

    root, port = copy_of(run, tmp_path / "project"), free_port()
    (root / "params.yaml").write_text(
        "broken: by hand, and not committed"
    )  # the run takes the last commit, and the gate what the run took
    server = prefect_server(tmp_path / "prefect", port)
    api = f"http://127.0.0.1:{port}/api"
    variables = {**environment(cache), "PREFECT_API_URL": api, "PREFECT_HOME": str(tmp_path / "prefect")}
    variables |= {"PYTHONPATH": str(root), "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    command = [sys.executable, "-m", "flows.cli", "serve", "--promote", "--every", "20"]
    log = (tmp_path / "serve.log").open("w")
    process = subprocess.Popen(command, cwd=root, env=variables, start_new_session=True, stdout=log, stderr=log)

    def gates() -> list[dict[str, Any]]:
        wanted = {"task_runs": {"name": {"any_": ["gate"]}, "state": {"type": {"any_": ["COMPLETED"]}}}}
        found: list[dict[str, Any]] = httpx.post(f"{api}/task_runs/filter", json=wanted).json()
        return sorted(found, key=lambda each: str(each["end_time"]))

    def scheduled() -> list[Any]:
        """Runs that the schedule started; with SQLAlchemy 2.1 nothing is ever scheduled, while the UI says Ready."""
        wanted = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
        return [run for run in httpx.post(f"{api}/flow_runs/filter", json=wanted).json() if run["auto_scheduled"]]

    try:
        nights = until(lambda: found if len(found := gates()) > 1 else None, 400)
        runs = until(scheduled, 60)
    except TimeoutError:
        pytest.fail((tmp_path / "serve.log").read_text()[-3000:])
    finally:
        end(process)
        end(server)
    assert runs[0]["name"] == "cola_gora/topics/seed0"
    assert nights[0]["state"]["message"].startswith("cola-topics version ")
    assert [night["state"]["name"] for night in nights[:2]] == ["Completed", "Cached"]
    done = subprocess.run([sys.executable, "-c", TAGS], cwd=root, env=variables, capture_output=True, text=True)
    tags, uses = json.loads(done.stdout)
    judged = [each["cola.judged"] for each in tags if "cola.judged" in each]
    assert len(judged) == 1
    assert [each["uses"] for each in json.loads(uses).values()] == [1], "the second night spent nothing"
