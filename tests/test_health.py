"""A link that goes wrong stops with the way out, one that does not help can be dropped, one that is stopped goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from cola_core.chain import head_of
from cola_core.config.recipe import ScheduleConfig
from cola_core.errors import UserError
from cola_core.export import chain_manifest, flat_adapter
from cola_core.health import FACTOR, MARGIN, RECENT, START, Course, check_divergence
from cola_core.interrupts import uninterrupted
from cola_core.lineage import read_chain
from cola_core.links import run_link
from tests.lab import FP32, LINK, chain_of, grow, job_of, logits_of, model_of, root_of, rows_of

ROOT = Path(__file__).parents[1]
FAST = {"learning_rate": 3.0, "head_learning_rate": 3.0, "warmup": 0.0, "decay": "constant"}


@pytest.fixture(autouse=True)
def _hears_ctrl_c() -> Iterator[None]:
    """A shell's background job starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


NAMED = {"q.A": Parameter(torch.ones(2)), "v.B": Parameter(torch.full((2,), 9.0))}


def course(link: int = 2) -> Course:
    return Course(LINK, ScheduleConfig(kind="cola", learning_rate="restart", horizon=12), 0, link)


def losses(start: float, later: float, steps: int = START + RECENT) -> list[dict[str, Any]]:
    return [{"loss": start}] * START + [{"loss": later}] * (steps - START)


@pytest.mark.parametrize(
    ("start", "later", "steps", "stops"),
    [
        (2.0, FACTOR * 2.0 + 0.01, START + RECENT, True),
        (2.0, FACTOR * 2.0 - 0.01, START + RECENT, False),
        (2.0, 9.0, START + RECENT - 1, False),  # not for long yet
        (0.01, MARGIN, START + RECENT, False),  # a hundred times its start, and still little
        (0.01, MARGIN + 0.02, START + RECENT, True),
        (2.0, 1.0, 200, False),
    ],
)
def test_a_loss_that_stays_above_its_start_stops_the_link(start: float, later: float, steps: int, stops: bool) -> None:
    if not stops:
        check_divergence(losses(start, later, steps), course(), NAMED)
        return
    with pytest.raises(UserError) as told:
        check_divergence(losses(start, later, steps), course(), NAMED)
    for word in ("link 2", f"step {steps}", "diverged", "v.B", "link.learning_rate is 0.005", "try a tenth"):
        assert word in str(told.value)


def test_a_link_that_really_diverges_stops_and_the_chain_before_it_stays(tmp_path: Path) -> None:
    chain = chain_of("bert", tmp_path, 1, FP32)
    fast = {**FAST, "learning_rate": 0.2}  # at 3 it depends on the processor which step is not even finite
    job = job_of("bert", chain, FP32, steps=60, validate_every=60, **fast)
    with pytest.raises(UserError, match=r"link 2, step \d+: diverged"):
        run_link(job)
    assert [link.hash for link in read_chain(chain[-1].folder)] == [link.hash for link in chain]


def test_a_knot_that_would_change_the_model_is_not_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cola_core import knot

    tie_well = knot.add_pair

    def tie_badly(module: Any, pair: Any) -> float:
        return tie_well(module, pair) + tie_well(module, pair)

    monkeypatch.setattr(knot, "add_pair", tie_badly)
    with pytest.raises(UserError, match=r"link 1, after step 6: merging it moves a score .*learning_rate is 0.005"):
        run_link(job_of("llama", root_of("llama", tmp_path), FP32))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_link_that_does_not_help_is_dropped_by_policy(family: str, tmp_path: Path) -> None:
    judged: dict[str, Any] = {"keep_link": "if_better", "validation": rows_of(family, 16)}  # what it trains on
    first = chain_of(family, tmp_path, 1, FP32, **judged)
    assert first[1].kept and first[1].record["validation_loss"] < first[1].record["validation_before"]
    chain = grow(job_of(family, first, FP32, steps=2, **judged, **{**FAST, "learning_rate": 100.0}), tmp_path)
    record = chain[2].record
    assert not chain[2].kept and record["validation_loss"] > record["validation_before"]
    rows = rows_of(family, 4)
    for before, after in zip(
        *(logits_of(model_of(family, c, FP32), family, rows) for c in (first, chain)), strict=True
    ):
        assert torch.equal(before, after), "a dropped link changes nothing"
    assert all(torch.equal(a, b) for a, b in zip(head_of(first).values(), head_of(chain).values(), strict=True))
    manifest = chain_manifest(chain, {1: {"q": 0.1}, 2: {}})
    assert [link["kept"] for link in manifest["links"]] == [True, False]
    one, two = flat_adapter(first), flat_adapter(chain)
    assert (
        all(torch.equal(one.pairs[name].b, two.pairs[name].b) for name in one.pairs)
        and one.pairs.keys() == two.pairs.keys()
    )
    last = grow(job_of(family, chain, FP32), tmp_path)
    assert last[3].kept and last[3].record["parent"]["hash"] == chain[2].hash


def test_the_validation_before_the_first_link_is_the_bases(tmp_path: Path) -> None:
    from cola_core.knot import open_chain
    from cola_core.scoring import mean_loss

    root = root_of("llama", tmp_path)
    job = job_of("llama", root, FP32, keep_link="if_better")
    chain = grow(job, tmp_path)
    objective = open_chain(job.base, root, job.task, FP32)
    assert chain[1].record["validation_before"] == mean_loss(objective, job.validation, job.config)
    always = run_link(job_of("llama", root, FP32))[0]
    pairs = chain[1].adapter().pairs
    assert all(torch.equal(pair.b, pairs[name].b) for name, pair in always.pairs.items()), "looking changes nothing"


def test_a_loss_without_the_link_that_is_not_finite_stops_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cola_core import links

    monkeypatch.setattr(links, "mean_loss", lambda *_: float("nan"))
    job, seen = job_of("llama", root_of("llama", tmp_path), FP32, keep_link="if_better"), list[Any]()
    told = r"link 1, step 0: the validation loss of the chain without the link is not finite; link\.learning_rate is"
    with pytest.raises(UserError, match=told):
        run_link(job, seen.append)
    assert not seen


@pytest.mark.parametrize("farewell", [signal.SIGINT, signal.SIGTERM])
def test_stopped_at_any_instant_no_step_is_lost_and_none_is_halved(farewell: signal.Signals, tmp_path: Path) -> None:
    """Real signals at random instants of real steps, validations and checkpoints."""
    root, draw = root_of("llama", tmp_path), random.Random(int(farewell))
    changes: dict[str, Any] = {"dropout": 0.2, "keep": "best", "steps": 30, "validate_every": 2, "checkpoint_every": 7}
    whole, _, undisturbed = run_link(job_of("llama", root, FP32, **changes))
    job = job_of("llama", root, FP32, checkpoint=tmp_path / "state.safetensors", **changes)
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    stops = 0
    try:
        for _ in range(200):
            training = threading.Event()
            delay = draw.uniform(0.0, 0.08)
            killer = threading.Thread(target=_stop_later, args=[training, delay, farewell])
            killer.start()
            try:
                resumed, _, progress = run_link(
                    job, lambda event, started=training: (started.set(), seen.append(event["step"]))
                )
                break
            except KeyboardInterrupt:
                stops += 1
            finally:
                training.set()
                killer.join()
    except KeyboardInterrupt:  # came when the link had ended
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stops >= 3, "it was really stopped"
    assert progress.losses == undisturbed.losses
    assert len(seen) == len(set(seen)), "no step is done twice"
    for name, pair in whole.pairs.items():
        assert torch.equal(pair.a, resumed.pairs[name].a) and torch.equal(pair.b, resumed.pairs[name].b)


def _stop_later(training: threading.Event, delay: float, farewell: signal.Signals) -> None:
    training.wait()
    time.sleep(delay)
    os.kill(os.getpid(), farewell)


SLOW = """
import time
from pathlib import Path
from tasks.stage import run

def stage(context):
    try:
        print("works", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("keeps", flush=True)
        time.sleep(0.5)
        Path("kept").touch()
        raise

run(stage)
"""


def test_a_second_signal_does_not_cut_off_what_the_first_one_saves(tmp_path: Path) -> None:
    """A service manager tells the whole group, and then DVC's end tells the stage once more."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    command, mine = [sys.executable, "-c", SLOW], {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, cwd=tmp_path, env=mine, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "works\n"
    child.terminate()
    assert child.stdout.readline() == "keeps\n"
    for farewell in (signal.SIGTERM, signal.SIGINT):
        child.send_signal(farewell)
    told = child.communicate(timeout=30)[1]
    assert child.returncode == 128 + signal.SIGTERM and (tmp_path / "kept").exists()
    assert told.splitlines() == ["-c: stopped; the same command goes on from here, a link from its last step"]


def test_what_belongs_together_is_done_together() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            done.append("first")
            done.append("second")
        done.append("never")
    assert done == ["first", "second"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    thread = threading.Thread(target=lambda: uninterrupted().__enter__())
    thread.start()
    thread.join()
