"""Kept bytes against autograd's saved tensors, a probe's peak against the profiler's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks.memory import peak_bytes
from cola_core.arithmetic.memory import activations, logits_bytes, probe_bytes, sampled_bytes
from cola_core.arithmetic.shape import Shape, Work
from cola_core.config.recipe import MachineConfig
from cola_core.probe import probe as run_probe
from cola_core.reduction import Reducer
from cola_core.sampled import SampledGradient, both_ends
from flows.timing import work_of
from tests.cases import Case, close
from tests.lab import PROFILE


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
    said = sampled_bytes(shape, nothing, ["m"], 4, PROFILE.sketch, PROFILE.row_share)
    assert sum(tensor.nbytes for tensor in tensors) == said - 4 * 48 * (64 + 16)  # less what the end takes


def beside(case: Case, width: int) -> float:
    """What the formulas leave out: cos and sin, of every position or packed token; indices and log-sum-exp."""
    positions = case.work.tokens if case.work.packed else case.work.length
    return 2 * positions * 8 * width + 36 * case.work.outputs


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", ["one_batch", "accumulate", "sampled"])
def test_a_probes_peak_is_the_formulas(way: Any, dtype: Any) -> None:
    """But for the sketches, which stay on a CPU, without oneDNN's packed copies where it knows bf16."""
    case = Case("llama", "all", MachineConfig(device="cpu", threads=1, dtype=dtype))
    config = PROFILE.model_copy(update={"probe": way, "micro_batch": 1})
    probed = (case.objective, case.rows, {name: case.modules[name] for name in case.names}, {}, config, (0, 1))
    with torch.backends.mkldnn.flags(enabled=False):
        run_probe(*probed)
        found = peak_bytes(lambda: run_probe(*probed))
    batch = case.rows if way == "one_batch" else [max(case.rows, key=lambda row: len(row.prompt) + len(row.answer))]
    work = work_of(case.objective.training_batch(batch))
    asked = (case.shape, work, case.names, 2 if dtype == "bf16" else 4)
    sampled = way == "sampled"
    said = sampled_bytes(*asked, 8, 0.25) if sampled else probe_bytes(*asked, False, way == "accumulate")
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
