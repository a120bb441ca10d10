"""FLOPs against torch's own counter, product by product; kept bytes against autograd's saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cola_core.adapters import Pair, add_pair, attach
from cola_core.arithmetic.flops import forward, full_step, knot, lora_step, probe
from cola_core.arithmetic.memory import activations, logits_bytes
from cola_core.arithmetic.shape import Shape, Work, walk
from cola_core.config.recipe import MachineConfig
from cola_core.files import read_json
from cola_core.models import adaptable, load_base, place, weight_shape
from cola_core.probe import probe as run_probe
from cola_core.rows import Row
from cola_core.scoring import Objective
from cola_core.targets import select_targets
from flows.timing import work_of
from tests.lab import CANDIDATES, FAMILIES, FP32, KINDS, PROFILE, base_of, rows_of, task_of

TARGETS = ["all", "query_value", "last"]
CLASSIFIER = 3 * 32  # weights of the tiny BERT's head, which the formulas leave out
ROWS = 5


class Case:
    """A tiny model of a family with adapters of different ranks on some of its modules, and a batch of rows."""

    def __init__(self, family: str, targets: str, machine: MachineConfig = FP32, loss: str = "answer") -> None:
        self.model = place(load_base(base_of(family), machine, 3), machine)
        self.objective = Objective(self.model, KINDS[family], task_of(family, loss))
        self.modules = adaptable(self.model)
        shapes = {name: weight_shape(module) for name, module in self.modules.items()}
        self.names = list(shapes)[-3:] if targets == "last" else select_targets(shapes, targets)
        self.ranks = {name: 1 + index % 4 for index, name in enumerate(self.names)}
        # cola.json keeps its modules in alphabetical order
        self.shape = Shape.of(dict(sorted(shapes.items())), KINDS[family], read_json(base_of(family) / "config.json"))
        self.rows = rows_of(family, ROWS)
        self.batch = self.objective.training_batch(self.rows)
        self.work = work_of(self.batch)
        self.unseen = 2 * ROWS * CLASSIFIER if KINDS[family] == "encoder" else 0

    def adapt(self) -> Case:
        attach(self.model, {name: self.pair(name, rank) for name, rank in self.ranks.items()})
        return self

    def pair(self, name: str, rank: int) -> Pair:
        out, inner = self.shape.modules[name]
        return Pair(torch.ones(rank, inner), torch.zeros(out, rank), 1.0)

    def step(self) -> None:
        self.objective(self.batch).backward()


def counted(work: Callable[[], object]) -> int:
    """FLOPs of `work`; attention in its plain form, since the counter knows no kernel of the CPU's own."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_lora_step_are_exact(family: str, targets: str) -> None:
    case = Case(family, targets).adapt()
    with torch.no_grad():
        assert counted(lambda: case.objective(case.batch)) == forward(case.shape, case.work, case.ranks) + case.unseen
    # the frozen classifier passes a gradient on; the one that trains takes its own too
    assert counted(case.step) == lora_step(case.shape, case.work, case.ranks) + 2 * case.unseen


@pytest.mark.parametrize("family", FAMILIES)
def test_full_step_is_exact(family: str) -> None:
    case = Case(family, "all")
    case.objective.requires_grad_(True)
    assert counted(case.step) == full_step(case.shape, case.work) + 3 * case.unseen


@pytest.mark.parametrize("earlier", [0, 3])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_probe_is_exact(family: str, targets: str, earlier: int) -> None:
    case = Case(family, targets)
    before = {name: [case.pair(name, earlier)] if earlier else [] for name in case.names}
    modules = {name: case.modules[name] for name in case.names}
    found = counted(lambda: run_probe(case.objective, case.rows, modules, before, PROFILE, (0, 1)))
    assert found == probe(case.shape, case.work, case.names, PROFILE.sketch, earlier) + 2 * case.unseen


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
    assert 0 <= bound - counted(case.step) <= sum(2 * m.tokens * m.rank * m.out for m in last)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_reads_a_shared_prompt_once(family: str) -> None:
    """Work.of is what the batches are: rows of one prompt length, every candidate of 3, 1 and 2 tokens."""
    case = Case(family, "all")
    rows = [Row(f"test:{i}", list(range(40, 49)), [], 0, "a") for i in range(4)]
    batch = case.objective.scoring_batch(rows)
    assert work_of(batch) == Work.of(KINDS[family], 4, 9, [len(c) for c in CANDIDATES])
    with torch.no_grad():
        found = counted(lambda: case.objective.scores(batch))
    assert found == forward(case.shape, work_of(batch)) + 4 * case.unseen // ROWS


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("targets", ["all", "query_value"])
def test_kept_bytes_are_llamas(targets: str, dtype: Any) -> None:
    case = Case("llama", targets, MachineConfig(device="cpu", threads=1, dtype=dtype)).adapt()
    with saved(case.model) as storages:
        case.objective(case.batch)
    width = 2 if dtype == "bf16" else 4
    expected = activations(case.shape, case.work, case.ranks, width) + logits_bytes(case.shape, case.work) / 4
    rotary, index = 2 * case.work.length * 8 * width, 36 * case.work.outputs  # cos, sin; indices and log-sum-exp
    assert sum(storages.values()) == expected + rotary + index


def test_checkpointing_keeps_one_input_a_block() -> None:
    case = Case("llama", "all").adapt()
    case.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    case.objective.train()
    with saved(case.model) as storages:
        case.objective(case.batch)
    logits = logits_bytes(case.shape, case.work) / 4
    inputs = 2 * case.work.tokens * 32 * 4
    norm = case.work.tokens * 33 * 4
    assert inputs + norm + logits <= sum(storages.values()) <= inputs + norm + logits + 5000  # masks, positions
    one = activations(case.shape, case.work, case.ranks, 4) - norm
    assert activations(case.shape, case.work, case.ranks, 4, checkpointing=True) > inputs + norm + one / 2


@contextmanager
def saved(model: Any) -> Iterator[dict[int, int]]:
    """Storages that autograd keeps, weights and buffers apart: address -> bytes."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages: dict[int, int] = {}
    kept = []  # a freed storage would lend its address to the next

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


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
