"""The benchmark compares what it says it compares: same work on both sides, ratios by pair, exact bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory import left_bytes, peak_bytes
from benchmarks.pairs import Pairs, alternate
from benchmarks.peers import against_trainer, floor, peft_model
from benchmarks.probes import Probes
from benchmarks.results import alone, compared, machine, results_file, write_results
from benchmarks.scoring import scoring
from benchmarks.setting import Ours, Setting, setting
from benchmarks.steps import layers, near_floor
from benchmarks.table import table

pytestmark = pytest.mark.slow
WORDS = ("oil", "ship", "grain", "corn", "gold", "wheat")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A tiny Llama on sixty made-up rows of different lengths."""
    folder = tmp_path_factory.mktemp("benchmark")
    lines = [f"{' '.join(WORDS[: 1 + i % 6])} {i},{('neg', 'pos')[i % 2]}" for i in range(60)]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return setting(
        folder / "made", "custom", "tiny", f'fetch.data.train.asset="path:{folder / "rows.csv"}"',
        'prepare.answers={neg: " bad", pos: " good"}', "prepare.test=8", "prepare.validation=4", "prepare.probe=4",
        "link.learning_rate=5e-3",
    )  # fmt: skip


def trained(where: Setting, rate: float | None = None) -> Pairs:
    config = where.link(steps=6)
    objective = where.objective()
    start = where.pairs(objective, "all", 4)
    ours = Ours(where, config, start, objective)
    if rate:
        ours.training.optimizer.param_groups[0]["peak"] = rate
    return against_trainer(where, ours, peft_model(where.model(), start, where), 4)


def test_the_trainer_with_peft_learns_what_we_learn(where: Setting) -> None:
    assert len(trained(where).ratios) == 4


def test_a_side_that_learns_something_else_is_noticed(where: Setting) -> None:
    with pytest.raises(AssertionError, match="losses differ"):
        trained(where, rate=0.1)


def test_pefts_layers_and_the_floor_run_the_same_steps(where: Setting) -> None:
    for row in (
        layers(where, "rows", 3),
        near_floor(where, "x", "all", 1.35, 3),
        near_floor(where, "x", "query_value", 1, 3),
    ):
        assert row.n == 3 and row.ratio_median is not None and row.ratio_median > 0


def test_the_floor_reaches_the_first_adapter_and_no_weight(where: Setting) -> None:
    bare = where.objective()
    names = list(where.pairs(bare, "query_value", 4))
    seen: dict[str, torch.Tensor] = {}
    first = bare.model.get_submodule(names[0])
    with floor(bare, names):
        first.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
        bare(bare.training_batch(where.train[:4])).backward()
    assert seen["y"].grad is not None and bool(seen["y"].grad.any())
    assert not seen["x"].requires_grad, "nothing below the first adapter is asked for a gradient"
    assert all(p.grad is None for p in bare.parameters())


def test_training_computes_no_gradient_below_the_first_adapter(where: Setting) -> None:
    objective = where.objective()
    ours = Ours(where, where.link(steps=2), where.pairs(objective, "all", 4), objective)
    inputs: list[torch.Tensor] = []
    next(iter(ours.layers.values())).register_forward_hook(lambda _, args, out: inputs.append(args[0]))
    ours.step()
    assert inputs and not any(x.requires_grad for x in inputs)


def test_whole_gradients_are_the_probes(where: Setting) -> None:
    probes = Probes(where)
    found, whole = probes.ours().modules, probes.whole()
    probes.lora_ga()
    for name, (importance, _, _) in whole.items():
        assert found[name]["importance"] == pytest.approx(importance, rel=1e-4)
    assert not any(weight.requires_grad or weight.grad is not None for weight in probes.weights.values())


def test_scoring_chooses_as_one_forward_per_candidate_does(where: Setting) -> None:
    assert scoring(where, "x", 1.0, rows=8, pairs=1).unit == "rows/s"


def test_bytes_are_those_held_at_once_and_those_left() -> None:
    def work() -> torch.Tensor:
        first = torch.ones(1000)
        second = first + 1  # both are held
        del first
        torch.ones(500)
        del second
        return torch.ones(250)

    assert peak_bytes(work) == pytest.approx(8000, abs=200)
    assert left_bytes(work) == pytest.approx(1000, abs=200)


@given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=9))
def test_ratios_are_taken_pair_by_pair(times: list[tuple[float, float]]) -> None:
    pairs = Pairs([a for a, _ in times], [b for _, b in times])
    low, high = pairs.spread
    assert min(pairs.ratios) <= low <= pairs.median <= high <= max(pairs.ratios)
    slower = Pairs([7 * a for a in pairs.ours], [7 * b for b in pairs.peer])
    assert slower.ratios == pytest.approx(pairs.ratios), "a machine that is slower for both changes nothing"


def test_both_sides_run_in_turn() -> None:
    order: list[str] = []
    found = alternate(lambda: order.append("a"), lambda: order.append("b"), 3, warm_up=1)
    assert "".join(order) == "abababab" and len(found.ours) == 3


def test_results_say_what_was_met_and_where(tmp_path: Path) -> None:
    rows = [
        compared("fast", "half", Pairs([1, 1, 1], [2, 2, 4]), 0.5),
        compared("slow", "twice", Pairs([2, 2], [1, 1]), 3.0, unit="rows/s", at_least=True),
        alone("start", "a start", [2.0], 1.5, note="why"),
    ]
    assert [row.met for row in rows] == [True, False, False]
    path = tmp_path / results_file(machine(2))
    write_results(path, machine(2), rows, [], {})
    content: dict[str, Any] = json.loads(path.read_text())
    wanted = {"id", "ours", "peer", "ratio_median", "ratio_low", "ratio_high", "goal", "met"}
    assert all(wanted <= set(row) for row in content["rows"])
    assert not {"user", "host", "hostname"} & set(content["machine"]) and str(tmp_path) not in path.read_text()
    shown = table(content)
    assert "| half (`fast`) | 1 s | 2 s | **0.5** (0.3 .. 0.5) | 3 | <= 0.5 | yes |" in shown
    assert ">= 3 | **no**" in shown and "- `start`: why." in shown
    write_results(path, machine(2), [alone("slow", "again", [1.0], None)], [{"id": "curve"}], content)
    again = json.loads(path.read_text())
    assert [row["what"] for row in again["rows"]] == ["half", "again", "a start"] and again["curves"] == [
        {"id": "curve"}
    ]
