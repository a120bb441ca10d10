"""What holds for every file of tests, and the one run of the whole DAG that several of them look at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from cola_core.locks import alone
from tests.tiny import environment, project
from tests.watched import Watched, watch

FIRST = ("test_broken_dag.py", "test_study.py")  # the run of `finished`, for which others wait, and the longest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, of these last what waits for the whole DAG: who waits or ends alone is idle."""
    slow = {item.path for item in items if "slow" in item.keywords}
    waiting = {item.path for item in items if "finished" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: (item.path.name not in FIRST, item.path not in slow, item.path in waiting))


@pytest.fixture(scope="module", autouse=True)
def own_environment() -> Iterator[None]:
    """What a file's tests leave in the environment is not the next file's: MLflow keeps its address there."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """The whole DAG by `dvc repro` on the tiny model, without network; the first worker that asks makes it for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    note = folder / "watched.json"
    with alone(folder.with_suffix(".lock")):
        if not note.exists():
            made = watch(folder, project(folder / "project"), environment(str(folder / "cache")), "dvc", "repro")
            note.write_text(json.dumps(asdict(made)))
    found = Watched(**json.loads(note.read_text()))
    assert found.code == 0, found.told
    return found


@pytest.fixture(scope="session")
def run(finished: Watched) -> Path:
    """Its project, which no test may change: `copy_of` is for that."""
    return Path(finished.root)


@pytest.fixture(scope="session")
def cache(finished: Watched) -> str:
    """Its cache of assets."""
    return str(Path(finished.root).parent / "cache")
