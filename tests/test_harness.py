"""The canary of tests/chaos: what its runs would report if something were lost, else their silence says nothing."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.checks import Outcome
from tests.chaos.life import Life, misplaced
from tests.chaos.triggers import Trigger

WELL = Outcome({"a": "1"}, [], Counter(FINISHED=13), 1, "")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (replace(WELL, hashes={"a": "2"}), "hash of a differs"),
        (replace(WELL, hashes={}), "hash of a differs"),
        (replace(WELL, left=["x"]), "left over: x"),
        (replace(WELL, runs=Counter(FINISHED=13, RUNNING=1)), "1 MLflow run(s) RUNNING"),
        (replace(WELL, runs=Counter(FINISHED=13, FAILED=2)), "2 MLflow run(s) FAILED"),
        (replace(WELL, runs=Counter(FINISHED=13, twice=1)), "1 MLflow run(s) twice"),
        (replace(WELL, runs=Counter(FINISHED=12)), "12 MLflow runs of 13"),
        (replace(WELL, versions=2), "2 model versions"),
        (replace(WELL, due="link"), "would run again: link"),
    ],
)
def test_every_difference_is_told(found: Outcome, told: str) -> None:
    assert found.differences(WELL) == [told]


def test_a_killed_live_run_or_a_stage_that_ran_twice_is_none() -> None:
    assert replace(WELL, runs=Counter(FINISHED=14, KILLED=2, twice=0)).differences(WELL) == []


@pytest.mark.parametrize(
    ("step", "kept", "right"),
    [
        (4, [3], True), (3, [3], True), (1, [3], False), (5, [3], False), (2, [3], False),
        (1, [], True), (2, [], False),
        (1, [6], True), (6, [6], True), (3, [6], False), (4, [6, 3], True), (1, [6, 3], False),
    ],
)  # fmt: skip
def test_a_link_that_forgot_its_checkpoint_is_told(step: int, kept: list[int], right: bool) -> None:
    assert misplaced(f"Running stage 'link@1':\nlink@1: {step}/6  loss 2.0", kept, 6) == (
        [] if right else [f"link@1 went on with step {step}, its checkpoint was of step {kept}"]
    )


@pytest.mark.parametrize(("command", "killed"), [("echo; sleep 60", True), ("echo; sleep 0.3", False)])
def test_a_command_that_ended_before_its_kill_was_not_killed(tmp_path: Path, command: str, killed: bool) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project/params.yaml").write_text("chain: {'1': {link: {steps: 6}}}")
    life = Life(tmp_path / "project", str(tmp_path / "cache"), random.Random(0))
    assert life._start(["sh", "-c", command], Trigger("late", text="\n", after=1.5)) == killed
    assert len(life.kills) == killed and not life.failures
