"""FLOPs against torch's own counter, product by product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_core import gap
from cola_core.adapters import add_pair
from cola_core.arithmetic.flops import BLOCK, ROUNDS, forward, full_step, knot, lora_step, probe, sampled_probe
from cola_core.arithmetic.memory import activations
from cola_core.arithmetic.shape import Shape, Work, walk
from cola_core.probe import probe as run_probe
from cola_core.rows import Row
from flows.timing import work_of
from tests.cases import ROWS, Case, close, counted
from tests.lab import CANDIDATES, FAMILIES, KINDS, PROFILE

TARGETS = ["all", "query_value", "last"]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spectral norm takes as many rounds as the formula counts, whatever the gradient."""
    monkeypatch.setattr(gap, "ROUNDS", ROUNDS)
    monkeypatch.setattr(gap, "PRECISION", dict.fromkeys(gap.PRECISION, -1.0))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_lora_step_are_exact(family: str, targets: str) -> None:
    check_step(Case(family, targets).adapt())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
def test_padded_rows_count_with_their_padding(family: str) -> None:
    case = Case(family, "all", packed=False)
    assert case.work.tokens == ROWS * case.work.length > Case(family, "all").work.tokens
    check_step(case.adapt())


def check_step(case: Case) -> None:
    with torch.no_grad():
        found = counted(lambda: case.objective(case.batch))
    assert found == close(forward(case.shape, case.work, case.ranks) + case.unseen)
    # the frozen classifier passes a gradient on; the one that trains takes its own too
    assert counted(case.step) == close(lora_step(case.shape, case.work, case.ranks) + 2 * case.unseen)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_step_is_exact(family: str) -> None:
    case = Case(family, "all")
    case.objective.requires_grad_(True)
    assert counted(case.step) == close(full_step(case.shape, case.work) + 3 * case.unseen)


@pytest.mark.parametrize("earlier", [0, 3])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_probes_are_exact(family: str, targets: str, earlier: int, settled: None) -> None:
    case = Case(family, targets)
    before = {name: [case.pair(name, earlier)] if earlier else [] for name in case.names}
    modules = {name: case.modules[name] for name in case.names}
    asked = (case.shape, case.work, case.names, PROFILE.sketch)
    found = counted(lambda: run_probe(case.objective, case.rows, modules, before, PROFILE, (0, 1)))
    assert found == close(probe(*asked, earlier) + 2 * case.unseen)
    config = PROFILE.model_copy(update={"probe": "sampled", "micro_batch": ROWS})
    found = counted(lambda: run_probe(case.objective, case.rows, modules, before, config, (0, 1)))
    assert found == close(sampled_probe(*asked, PROFILE.row_share, earlier) + 2 * case.unseen)


def test_the_gap_is_found_with_as_many_columns() -> None:
    assert gap.BLOCK == BLOCK


@pytest.mark.parametrize("family", FAMILIES)
def test_knot_is_exact(family: str) -> None:
    case = Case(family, "all")
    found = counted(lambda: [add_pair(case.modules[n], case.pair(n, r)) for n, r in case.ranks.items()])
    assert found == knot(case.shape, case.ranks)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
def test_checkpointing_is_an_upper_bound_less_than_a_product_of_each_block_away(family: str) -> None:
    case = Case(family, "all").adapt()
    case.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    case.objective.train()
    bound = lora_step(case.shape, case.work, case.ranks, checkpointing=True) + 2 * case.unseen
    last = [group.maps[0] for group in walk(case.shape, case.work, case.ranks) if group.role == "contract"]
    assert -0.5 < bound - counted(case.step) < sum(2 * m.tokens * m.rank * m.out for m in last) + 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_reads_a_shared_prompt_once(family: str) -> None:
    """Work.of is what the batches are: rows of one prompt length, every candidate of 3, 1 and 2 tokens."""
    case = Case(family, "all")
    rows = [Row(f"test:{i}", list(range(40, 49)), [], 0, "a") for i in range(4)]
    batch = case.objective.scoring_batch(rows)
    said = Work.of(KINDS[family], 4, 9, [len(c) for c in CANDIDATES])
    assert work_of(batch) == replace(said, packed=case.objective.packed)
    with torch.no_grad():
        found = counted(lambda: case.objective.scores(batch))
    assert found == forward(case.shape, said) + 4 * case.unseen // ROWS


def decoder(layers: int, width: int, vocabulary: int = 0) -> Shape:
    """A Llama-like decoder, MLP four times as wide."""
    block = {
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        **{f"mlp.{name}_proj": (4 * width, width) for name in ("gate", "up")},
        "mlp.down_proj": (width, 4 * width),
    }
    modules = {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    return Shape(modules, width, 4, vocabulary)


SIZES = st.integers(1, 64)


@given(layers=st.integers(1, 4), rows=SIZES, length=SIZES, times=st.integers(2, 9), rank=st.integers(1, 8))
def test_a_step_is_linear_in_rows(layers: int, rows: int, length: int, times: int, rank: int) -> None:
    shape = decoder(layers, 64, 100)
    ranks = dict.fromkeys(shape.modules, rank)
    one, many = (lora_step(shape, Work(n, length, n), ranks) for n in (rows, rows * times))
    assert many == times * one
    # in length it is not: six products of T x T x width a block grow with its square
    once, twice = (lora_step(shape, Work(rows, n * length, 0), ranks) for n in (1, 2))
    assert twice - 2 * once == 2 * 6 * rows * 2 * length**2 * 64 * layers


@settings(deadline=None)
@given(rank=st.integers(1, 16), layers=st.integers(40, 80))
def test_lora_costs_two_thirds_of_full_tuning_and_its_adapters(rank: int, layers: int) -> None:
    """2/3 + p/P for short rows and no vocabulary; below it by what the first block's inputs are spared."""
    shape = decoder(layers, 256)
    ranks = dict.fromkeys(shape.modules, rank)
    adapters = sum(rank * sum(shape.modules[name]) for name in ranks)
    work = Work(8, 1, 0)
    ratio, law = lora_step(shape, work, ranks) / full_step(shape, work), 2 / 3 + adapters / shape.linear
    assert law * (1 - 1 / layers) < ratio < law


@given(st.permutations(list(decoder(11, 64).modules)))
def test_the_order_of_names_changes_nothing(names: Sequence[str]) -> None:
    shape = decoder(11, 64, 100)
    shuffled = Shape({name: shape.modules[name] for name in names}, 64, 4, 100)
    ranks = {name: 2 for name in names if "layers.10." in name}
    work = Work(2, 5, 3)
    assert lora_step(shuffled, work, ranks) == lora_step(shape, work, ranks)
    assert activations(shuffled, work, ranks, 4) == activations(shape, work, ranks, 4)


@pytest.mark.parametrize("first", ["w_1", "q_proj", "k_proj", "query", "v_proj"])
@pytest.mark.parametrize("config", [{}, {"hidden_size": None, "vocab_size": 9}, {"d_model": 3, "text_config": {}}])
def test_an_unknown_family_counts_its_linear_maps(first: str, config: dict[str, Any]) -> None:
    shape = Shape.of({f"blocks.0.{first}": (4, 3), "blocks.0.w_2": (3, 4)}, "causal", config)
    assert not shape.complete and forward(shape, Work(2, 5, 10)) == 2 * 10 * shape.linear
    assert lora_step(shape, Work(2, 5, 10), {f"blocks.0.{first}": 1}) > 0
    assert activations(shape, Work(2, 5, 10), {f"blocks.0.{first}": 1}, 4, checkpointing=True) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_here_are_known(family: str) -> None:
    assert Case(family, "all").shape.complete
