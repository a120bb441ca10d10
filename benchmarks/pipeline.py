"""What the machinery costs beside the arithmetic: DVC with nothing to do, a stage's start, Prefect over DVC."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.pairs import Pairs, alternate, timed
from benchmarks.results import Row, alone
from benchmarks.trial import Trial, trial

__all__ = ["rows"]

# Every stage once, in the order of the graph: those that load a model, and those that do not.
TORCH = ("evaluate_base", "profile 1", "link 1", "profile 2", "link 2", "merge", "evaluate")
OTHER = ("fetch", "prepare", "head", "allocate 1", "allocate 2", "register")
ORDER = ("fetch", "prepare", "head", "evaluate_base", "profile 1", "allocate 1", "link 1", "profile 2", "allocate 2",
         "link 2", "merge", "evaluate", "register")  # fmt: skip


def rows() -> Iterator[Row]:
    """Measure on a project of its own, with DVC's caches and a Prefect server of its own."""
    yield _torch(3)
    with trial() as project:
        times = _stages(project)
        project.python("-m", "dvc", "commit", "--force", "--quiet")  # the outs are there: nothing is left to run
        yield _slowest("torch-stage", "a stage that loads a model, whole process", times, TORCH, 3.5)
        yield _slowest("other-stage", "any other stage, whole process", times, OTHER, 1.0)
        idle = _idle(project, 5)
        yield alone("dvc-no-op", "`dvc repro` of 13 stages with nothing to do", idle.peer, 1.5)
        extra = [ours - peer for ours, peer in zip(idle.ours, idle.peer, strict=True)]
        told = f"flow {statistics.median(idle.ours):.1f} s, a Prefect server running"
        yield alone("flow-no-op", "`cola run` with nothing to do, beyond `dvc repro`", extra, 3.0, note=told)
        yield _working(project, statistics.median(extra))


def _torch(repeats: int) -> Row:
    """The yardstick: what no stage that loads a model can go below here."""
    command = (sys.executable, "-c", "import torch")
    start = partial(subprocess.run, command, check=True)
    values = [timed(start) for _ in range(repeats + 1)][1:]
    return alone("torch-import", "`python -c 'import torch'`", values, None, note="goals assume 1.8 s")


def _stages(project: Trial) -> dict[str, float]:
    """Wall seconds of `python -m tasks.<stage> [link]`, stage by stage in the graph's order."""
    project.python("-m", "compileall", "-q", "cola_core", "tasks", "flows")
    project.python("-m", "tasks.fetch")  # what fills the asset cache is no part of the figure,
    project.sync()  # nor what makes the tables of a new MLflow store
    times = {}
    for stage in ORDER:
        name, *key = stage.split()
        times[stage] = timed(partial(project.python, "-m", f"tasks.{name}", *key))
    return times


def _slowest(name: str, what: str, times: dict[str, float], stages: Sequence[str], goal: float) -> Row:
    """The slowest stage's figure; the note names all."""
    slowest = max(stages, key=times.__getitem__)
    note = f"the slowest, {slowest}; all: " + ", ".join(f"{stage} {times[stage]:.2f}" for stage in stages)
    return alone(name, what, [times[slowest]], goal, note=note)


def _idle(project: Trial, pairs: int) -> Pairs:
    """Flow and `dvc repro` in turn with nothing to do; the flow's first run makes its workspace and is not counted."""
    if ran := project.dvc():
        raise RuntimeError(f"nothing should be left to do, but {', '.join(ran)} ran")
    return alternate(project.flow, project.dvc, pairs)


def _working(project: Trial, idle: float) -> Row:
    """Both until MLflow knows every stage, less `idle`, what the flow takes beyond with nothing to do.

    Each run has a learning rate of its own, which spares the first half of the stages: the run cache would serve a
    second run of the same.
    """
    rates = (rate * 1e-5 for rate in itertools.count(1))
    ran: list[int] = []

    def flow() -> None:
        project.set("link.learning_rate", next(rates))
        ran.append(len(project.flow()))

    def dvc() -> None:
        project.set("link.learning_rate", next(rates))
        ran.append(len(project.dvc()))
        project.sync()

    found = alternate(flow, dvc, 1, warm_up=0)
    if len(set(ran)) != 1:
        raise RuntimeError(f"the flow and dvc repro ran different numbers of stages: {ran}")
    extra = [(ours - peer - idle) / ran[0] for ours, peer in zip(found.ours, found.peer, strict=True)]
    flows, peers = (", ".join(f"{seconds:.1f}" for seconds in side) for side in (found.ours, found.peer))
    note = f"{ran[0]} stages ran: {flows} s beside {peers} s; the idle flow's {idle:.1f} s taken off"
    return alone(
        "flow-stage", "`cola run` beyond `dvc repro` and `cola sync`, per stage that runs", extra, 0.7, note=note
    )
