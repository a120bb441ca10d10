"""FLOPs against torch's own counter, product by product; kept bytes against autograd's saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_bytes
from cola_core import gap
from cola_core.adapters import Pair, add_pair, attach
from cola_core.arithmetic.flops import BLOCK, ROUNDS, forward, full_step, knot, lora_step, probe, sampled_probe
from cola_core.arithmetic.memory import activations, logits_bytes, probe_bytes, sampled_bytes
from cola_core.arithmetic.shape import Shape, Work, walk
from cola_core.config.recipe import MachineConfig
from cola_core.files import read_json
from cola_core.models import adaptable, load_base, place, weight_shape
from cola_core.probe import probe as run_probe
from cola_core.reduction import Reducer
from cola_core.rows import Row
from cola_core.sampled import SampledGradient, both_ends
from cola_core.scoring import Objective
from cola_core.targets import select_targets
from flows.timing import work_of
from tests.lab import CANDIDATES, FAMILIES, FP32, KINDS, PROFILE, base_of, rows_of, task_of

TARGETS = ["all", "query_value", "last"]
CLASSIFIER = 3 * 32  # weights of the tiny BERT's head, which the formulas leave out
ROWS = 5


class Case:
    """A tiny model of a family with adapters of different ranks on some of its modules, and a batch of rows."""

    def __init__(self, family: str, targets: str, machine: MachineConfig = FP32, packed: bool = True) -> None:
        self.model = place(load_base(base_of(family), machine, 3), machine)
        self.objective = Objective(self.model, KINDS[family], task_of(family))
        self.objective.packed &= packed
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


def close(expected: float) -> Any:
    """Packed rows count as a broken number of rows of a broken length."""
    return pytest.approx(expected, rel=1e-9)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spectral norm takes as many rounds as the formula counts, whatever the gradient."""
    monkeypatch.setattr(gap, "ROUNDS", ROUNDS)
    monkeypatch.setattr(gap, "PRECISION", dict.fromkeys(gap.PRECISION, -1.0))


def counted(work: Callable[[], object]) -> int:
    """FLOPs of `work`; attention in its plain form, since the counter knows no kernel of the CPU's own."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


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


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("targets", ["all", "query_value"])
def test_kept_bytes_are_llamas(targets: str, dtype: Any, packed: bool) -> None:
    case = Case("llama", targets, MachineConfig(device="cpu", threads=1, dtype=dtype), packed).adapt()
    with saved(case.model) as storages:
        case.objective(case.batch)
    width = 2 if dtype == "bf16" else 4
    expected = activations(case.shape, case.work, case.ranks, width) + logits_bytes(case.shape, case.work) / 4
    assert sum(storages.values()) == close(expected + beside(case, width))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("targets", ["all", "query_value"])
def test_a_sampled_probe_keeps_the_inputs_that_weight_gradients_would(targets: str, packed: bool) -> None:
    case = Case("llama", targets, packed=packed)
    with saved(case.model) as storages, both_ends({n: case.modules[n] for n in case.names}, lambda *_: None):
        for name in case.names:
            case.modules[name].register_forward_pre_hook(lambda _, args: storages.update(storage(args[0])))
        case.objective.requires_grad_(False)
        case.objective(case.batch)
    kept = activations(case.shape, case.work, {}, 4, case.names) + logits_bytes(case.shape, case.work) / 4
    assert sum(storages.values()) == close(kept + beside(case, 4))


def test_a_sampled_gradient_holds_its_rows_and_sketches() -> None:
    module = torch.nn.Linear(48, 64, bias=False)
    config = PROFILE.model_copy(update={"probe": "sampled"})
    held = SampledGradient(Reducer({"m": module}, {}, config, (0, 1)), "m")
    held.add(torch.ones(5, 48), torch.ones(5, 64))
    tensors = [value for value in (held.part, held.sketch, held.a_max) if isinstance(value, torch.Tensor)]
    shape, nothing = Shape({"m": (64, 48)}), Work(0, 0, 0)
    said = sampled_bytes(shape, nothing, ["m"], 4, False, PROFILE.sketch, PROFILE.row_share)
    assert sum(tensor.nbytes for tensor in tensors) == said - 4 * 48 * (64 + 16)  # less what the end takes


def beside(case: Case, width: int) -> float:
    """What the formulas leave out: cos and sin, of every position or packed token; indices and log-sum-exp."""
    positions = case.work.tokens if case.work.packed else case.work.length
    return 2 * positions * 8 * width + 36 * case.work.outputs


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", ["one_batch", "accumulate", "sampled"])
def test_a_probes_peak_is_the_formulas(way: Any, dtype: Any) -> None:
    """But for the sketches, which stay on a CPU."""
    case = Case("llama", "all", MachineConfig(device="cpu", threads=1, dtype=dtype))
    config = PROFILE.model_copy(update={"probe": way, "micro_batch": 1})
    probed = (case.objective, case.rows, {name: case.modules[name] for name in case.names}, {}, config, (0, 1))
    run_probe(*probed)
    found = peak_bytes(lambda: run_probe(*probed))
    batch = case.rows if way == "one_batch" else [max(case.rows, key=lambda row: len(row.prompt) + len(row.answer))]
    work = work_of(case.objective.training_batch(batch))
    asked = (case.shape, work, case.names, 2 if dtype == "bf16" else 4, False)
    sampled = way == "sampled"
    said = sampled_bytes(*asked, 8, 0.25) if sampled else probe_bytes(*asked, way == "accumulate")
    sketches = 4 * sum(out * min(8, out, inner) for out, inner in case.shape.modules.values())
    assert -0.5 < found - said < sketches


def test_checkpointing_keeps_one_input_a_block() -> None:
    case = Case("llama", "all").adapt()
    case.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    case.objective.train()
    with saved(case.model) as storages:
        case.objective(case.batch)
    logits = logits_bytes(case.shape, case.work) / 4
    inputs = 2 * case.work.tokens * 32 * 4
    norm = case.work.tokens * 33 * 4
    assert -0.5 < sum(storages.values()) - (inputs + norm + logits) < 5000  # masks, positions
    one = activations(case.shape, case.work, case.ranks, 4) - norm
    assert activations(case.shape, case.work, case.ranks, 4, checkpointing=True) > inputs + norm + one / 2


@contextmanager
def saved(model: Any) -> Iterator[dict[int, int]]:
    """Storages that autograd keeps, weights and buffers apart: address -> bytes."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages: dict[int, int] = {}
    kept = []  # a freed storage would lend its address to the next

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not own & set(storage(tensor)):
            storages.update(storage(tensor))
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def storage(tensor: torch.Tensor) -> dict[int, int]:
    """Address -> bytes."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}


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
