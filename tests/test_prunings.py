"""Rounds that move rank inside a link: BeamLoRA's and ALoRA's, against their definitions."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cola_core.axes.prunings import PRUNINGS
from cola_core.axes.updates import build_optimizer
from cola_core.errors import UserError
from cola_core.forms.gates import softmax_gates
from cola_core.health import Course
from cola_core.knot import open_chain
from cola_core.links import run_link
from cola_core.pruning.alora import moves
from cola_core.pruning.beam import kept_ranks
from cola_core.scoring import mean_loss
from cola_core.start import first_layers, first_pairs
from cola_core.train import Training, trained_parameters
from tests.lab import FP64, root_of
from tests.points import job_at

SOFTMAX = {"kind": "softmax_gated", "temperature": 0.5}
BEAM = {"kind": "beam_lora", "every": 4, "share": 0.6, "schedule": "rising"}
ALORA = {"kind": "alora", "first": 3, "every": 2, "rounds": 2, "ranks": 3}


class Scene:
    """A model with trained layers, the optimizer of one step, and the rounds of a recipe."""

    def __init__(self, folder: Path, pruning: dict[str, Any], form: Any = "plain", steps: int = 12) -> None:
        link = {"parametrisation": form, "pruning": pruning, "steps": steps}
        self.job = job_at("llama", root_of("llama", folder), link, allocation={"rank": 4}, machine=FP64)
        self.objective = open_chain(self.job.base, self.job.chain, self.job.task, FP64)
        model = self.objective.model
        self.layers = first_layers(model, self.job, first_pairs(model, self.job))
        self.optimizer = build_optimizer(trained_parameters(model, self.layers), self.job.config, self.layers)
        course = Course(self.job.config, self.job.schedule, 7, 1)
        self.rounds = PRUNINGS[pruning["kind"]](self.layers, self.optimizer, self.loss, course)

    def loss(self) -> float:
        return mean_loss(self.objective, self.job.validation[:4], self.job.config)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.objective(self.objective.training_batch(self.job.train[:4])).backward()
        self.optimizer.step()


@given(st.lists(st.lists(st.floats(0.01, 5), min_size=1, max_size=5), min_size=1, max_size=4), st.floats(0.3, 1))
def test_the_largest_gates_stay_until_their_sum_exceeds_the_share(own: list[list[float]], share: float) -> None:
    gates = {str(k): torch.tensor(v, dtype=torch.float64) for k, v in enumerate(own)}
    kept = kept_ranks(gates, share)
    flat = sorted((float(g) for gate in gates.values() for g in gate), reverse=True)
    total, mass, floor = sum(flat), 0.0, -math.inf
    for g in flat:
        mass += g
        if mass > share * total * (1 + 1e-12):
            floor = g
            break
    for name, gate in gates.items():
        half = sorted(gate.tolist(), reverse=True)[: math.ceil(len(gate) / 2)]
        for g, stays in zip(gate.tolist(), kept[name].tolist(), strict=True):
            if g > floor * (1 + 1e-9) or g > min(half):
                assert stays
            elif g < floor * (1 - 1e-9) and g < min(half):
                assert not stays
        assert int(kept[name].sum()) >= math.ceil(len(gate) / 2)


def test_beams_rounds_alternate_and_spare_the_last_period(tmp_path: Path) -> None:
    scene = Scene(tmp_path, {**BEAM, "every": 5}, SOFTMAX, steps=17)
    told = [scene.rounds.rounds(step) for step in range(18)]
    # kept for later at 5 - 2 = 3 and 8, pruned at 5 and 10; 12 is the last step that may be pruned after
    assert told == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(("schedule", "shares"), [("rising", [0.7, 1.0]), ("falling", [0.9, 0.6])])
def test_the_share_rises_as_in_the_code_or_falls_as_in_the_note(
    schedule: str, shares: list[float], tmp_path: Path
) -> None:
    scene: Any = Scene(tmp_path, {**BEAM, "schedule": schedule}, SOFTMAX, steps=16).rounds
    assert [scene._share(number) for number in (1, 5)] == pytest.approx(shares)
    cosine = math.cos(math.pi * 8 / 12) * (1 if schedule == "rising" else -1)
    assert scene._share(3) == pytest.approx(1 - 0.4 * (1 + cosine) / 2)


def test_a_pruned_rank_takes_what_a_best_one_was_half_a_period_before(tmp_path: Path) -> None:
    scene = Scene(tmp_path, {**BEAM, "share": 0.01, "schedule": "rising"}, SOFTMAX)
    for _ in range(2):
        scene.step()
    scene.rounds.measured(0)()
    then = {name: layer.A.detach().clone() for name, layer in scene.layers.items()}
    moments = {name: scene.optimizer.state[layer.B]["exp_avg"].clone() for name, layer in scene.layers.items()}
    for _ in range(2):
        scene.step()
    name, layer = next(iter(scene.layers.items()))
    with torch.no_grad():
        layer.score.copy_(torch.tensor([0.4, -0.2, 0.1, -0.3]))
    before, scores = layer.A.detach().clone(), layer.score.detach().clone()
    with torch.no_grad():
        for other in scene.layers.values():
            other.score.copy_(layer.score)
    scene.rounds.measured(1)()
    for name, layer in scene.layers.items():
        taken = {slot: best for slot in (1, 3) for best in (0, 2) if torch.equal(layer.A[slot], then[name][best])}
        assert sorted(taken) == [1, 3] and sorted(taken.values()) == [0, 2]
        for slot, best in taken.items():
            assert torch.equal(scene.optimizer.state[layer.B]["exp_avg"][:, slot], moments[name][:, best])
            mean = (scores[slot] + scores[best]) / 2
            assert layer.score[slot] == layer.score[best] == mean
            assert not scene.optimizer.state[layer.score]["exp_avg"][[slot, best]].any()
    first = next(iter(scene.layers.values()))
    assert torch.equal(first.A[[0, 2]], before[[0, 2]]), "the best stay as they are"


def test_at_first_nothing_is_worse_than_anything_else(tmp_path: Path) -> None:
    scene = Scene(tmp_path, BEAM, SOFTMAX)
    gates = {name: softmax_gates(layer).detach() for name, layer in scene.layers.items()}
    assert all(kept.all() for kept in kept_ranks(gates, 0.5).values())


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.floats(-5, 5), min_size=1, max_size=4), min_size=1),
    st.integers(1, 6),
)
def test_as_many_ranks_grow_as_are_pruned_and_the_lowest_go(scores: dict[str, list[float]], count: int) -> None:
    pruned, grown = moves(scores, count)
    total = sum(map(len, scores.values()))
    gone = [scores[name][rank] for name, ranks in pruned.items() for rank in ranks]
    stay = [s for name, own in scores.items() for rank, s in enumerate(own) if rank not in pruned[name]]
    assert len(gone) == sum(grown.values()) == min(count, total - 1)
    assert not gone or max(gone) <= min(stay)
    free = [name for name in scores if not pruned[name]]
    assert not free or all(name in free for name, n in grown.items() if n)
    means = {name: sum(own) / len(own) for name, own in scores.items()}
    for one in free:
        for other in free:
            if means[one] > means[other]:
                assert grown[one] >= grown[other], "priority to the higher mean"


def test_the_ablation_score_is_the_papers(tmp_path: Path) -> None:
    """IS(i) = S(M_i) - S(M without i), S = -loss, with B taken apart by hand."""
    scene = Scene(tmp_path, ALORA)
    for _ in range(3):
        scene.step()
    found: Any = scene.rounds
    kept = {name: layer.B.detach().clone() for name, layer in scene.layers.items()}
    scores = found._scores()
    name, layer = list(scene.layers.items())[3]
    for rank in range(len(layer.A)):
        with torch.no_grad():
            layer.B[:, rank] = 0
            without = scene.loss()
            for other in scene.layers.values():
                other.B.zero_()
            layer.B[:, rank] = kept[name][:, rank]
            alone = scene.loss()
            for n, other in scene.layers.items():
                other.B.copy_(kept[n])
        assert scores[name][rank] == pytest.approx(without - alone, abs=1e-12)
    assert all(torch.equal(layer.B, kept[n]) for n, layer in scene.layers.items()), "nothing is left changed"


def test_alora_keeps_the_budget_and_the_moments_of_what_stays(tmp_path: Path) -> None:
    scene = Scene(tmp_path, {**ALORA, "ranks": 5})
    for _ in range(3):
        scene.step()
    before = {name: (layer.A.detach().clone(), layer.B.detach().clone()) for name, layer in scene.layers.items()}
    moments = {name: scene.optimizer.state[layer.A]["exp_avg"].clone() for name, layer in scene.layers.items()}
    found: Any = scene.rounds
    pruned, grown = moves(found._scores(), 5)
    scene.rounds.measured(0)()
    assert sum(len(layer.A) for layer in scene.layers.values()) == sum(len(a) for a, _ in before.values())
    assert len({len(layer.A) for layer in scene.layers.values()}) > 1
    for name, layer in scene.layers.items():
        stay = [i for i in range(4) if i not in pruned[name]]
        assert layer.A.shape[0] == layer.B.shape[1] == len(stay) + grown[name]
        assert torch.equal(layer.A[: len(stay)], before[name][0][stay])
        assert torch.equal(layer.B[:, : len(stay)], before[name][1][:, stay])
        assert not layer.B[:, len(stay) :].any(), "a rank that grows changes nothing"
        state = scene.optimizer.state[layer.A]["exp_avg"]
        assert torch.equal(state[: len(stay)], moments[name][stay]) and not state[len(stay) :].any()
        drawn = layer.A[len(stay) :].detach()
        assert not len(drawn) or 0 < float(drawn.abs().max()) <= 1 / math.sqrt(layer.A.shape[1])
    scene.step()  # and goes on


def test_aloras_rounds_have_a_first_a_period_and_an_end() -> None:
    options = SimpleNamespace(config=SimpleNamespace(pruning=SimpleNamespace(first=3, every=2, rounds=2)))
    rounds: Any = PRUNINGS["alora"]
    told = rounds({}, None, None, options)
    assert [told.rounds(step) for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("kind", ["alora", "beam_lora"])
def test_rounds_are_run_once_each_and_never_after_the_last_step(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    pruning, form = (ALORA, "plain") if kind == "alora" else (BEAM, SOFTMAX)
    seen: list[tuple[int, int]] = []
    honest: Any = PRUNINGS[kind]

    class Watched(honest):  # type: ignore[misc]
        def measured(self, number: int) -> Callable[[], None]:
            seen.append((int(next(iter(self.optimizer.state.values()))["step"]), number))
            return cast(Callable[[], None], super().measured(number))

    monkeypatch.setitem(PRUNINGS, kind, Watched)
    link = {"parametrisation": form, "pruning": pruning, "steps": 12, "validate_every": 4}
    run_link(job_at("llama", root_of("llama", tmp_path), link))
    assert seen == ([(3, 0), (5, 1)] if kind == "alora" else [(2, 0), (4, 1), (6, 2), (8, 3)])


def test_a_round_stopped_while_it_measures_ends_with_that_loss_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two losses a rank are many: Ctrl-C need not wait for all, and finds every rank in its place."""
    job = job_at("llama", root_of("llama", tmp_path), {"pruning": ALORA, "steps": 8, "validate_every": 4})
    whole, _, _ = run_link(job)
    loss, zeros, calls = Training._sample_loss, torch.zeros_like, {"loss": 0, "zeros": 0}

    def counted(training: Training) -> float:
        calls["loss"] += 1
        return loss(training)

    def stopped(*asked: Any, **named: Any) -> torch.Tensor:
        calls["zeros"] += calls["loss"] == 3
        if calls["zeros"] == 2:  # while all ranks but one are taken out: of one module they are
            calls["zeros"] += 1
            signal.raise_signal(signal.SIGINT)
        return zeros(*asked, **named)

    monkeypatch.setattr("cola_core.pruning.alora.torch.zeros_like", stopped)
    monkeypatch.setattr(Training, "_sample_loss", counted)
    job = replace(job, checkpoint=tmp_path / "state.safetensors")
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in background
    try:
        with pytest.raises(KeyboardInterrupt):
            run_link(job)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert calls["loss"] == 4
    resumed, _, _ = run_link(job)
    assert whole.pairs.keys() == resumed.pairs.keys() and calls["loss"] > 8
    for name, pair in whole.pairs.items():
        assert torch.equal(pair.a, resumed.pairs[name].a) and torch.equal(pair.b, resumed.pairs[name].b), name


def test_ranks_that_move_are_refused_to_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"^link\.pruning 'alora' with more than one process: the shapes of A and B"):
        PRUNINGS["alora"]({}, None, None, None)  # type: ignore[arg-type]
