"""Quantised weights: codes, bounds and gradients in closed form, LoftQ beside two others, chains that stand on it."""

from __future__ import annotations

import copy
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from scipy.stats import norm
from test_config import PARAMS
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from cola_core.axes.bases import QUANTISERS
from cola_core.axes.initialisers import INITIALISERS, First
from cola_core.chain import moved, tie
from cola_core.config.params import check_params
from cola_core.config.values import Loftq
from cola_core.errors import UserError
from cola_core.export import chain_manifest, flat_adapter
from cola_core.knot import open_chain, tied
from cola_core.lineage import QUANTISED, Link, no_adapter, read_chain
from cola_core.links import run_link
from cola_core.models import adaptable, as_matrix, weight_shape
from cola_core.probe import probe
from cola_core.quantisation import Quantised, QuantisedLinear, pack, quantise, restore
from cola_core.quantised_files import read_quantised, write_quantised
from cola_core.root import seal
from cola_core.sealed import write_sealed
from cola_core.start import first_layers, first_pairs
from cola_core.tensors import load_tensors, save_tensors
from tasks.export import export
from tasks.profile import _metrics
from tests.lab import (
    FAMILIES,
    FP32,
    FP64,
    PROFILE,
    base_of,
    chain_of,
    grow,
    job_of,
    logits_of,
    model_of,
    root_of,
    rows_of,
    start_of,
)
from tests.points import resumes

KIND = pytest.mark.parametrize("kind", QUANTISERS)
LOFTQ: dict[str, Any] = {"initialiser": {"kind": "loftq", "iterations": 3}, "quantise": "nf4"}
# QLoRA, arXiv 2305.14314, appendix E, as its released code (bitsandbytes) keeps them in float32.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 0.02


def unpacked(held: Quantised) -> torch.Tensor:
    """The codes one by one, by other means than the module's table of bytes."""
    bits = QUANTISERS[held.kind].bits
    return torch.tensor(
        [byte >> shift & (1 << bits) - 1 for byte in held.codes.tolist() for shift in range(0, 8, bits)]
    )


def values_of(held: Quantised) -> np.ndarray:
    """Every value that each weight could have been given, weights x levels, in float64; blocks written out."""
    levels, scales = np.array(QUANTISERS[held.kind].levels), held.scales.double().numpy()
    low, span = (scales[:, 0], scales[:, 1] - scales[:, 0]) if held.kind.startswith("uni") else (0, scales[:, 0])
    each = np.outer(span, levels) + np.reshape(low, (-1, 1))
    return np.repeat(each, 64, axis=0)[: math.prod(held.shape)]


MATRICES = st_numpy.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 40)),
    elements=st.floats(-8, 8, width=32, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-6 else 0.0),
)


def test_normal_floats_are_the_published_constants() -> None:
    assert list(QUANTISERS["nf4"].levels) == NF4
    middle = 0.5 * (0.9677083 + 0.5)  # half way from the outermost probability to the one of 0
    assert QUANTISERS["nf2"].levels == pytest.approx([-1, 0, norm.ppf(middle) / norm.ppf(0.9677083), 1], rel=1e-6)
    assert [QUANTISERS[kind].bits for kind in ("nf4", "nf2", "uniform4", "uniform2")] == [4, 2, 4, 2]


@KIND
@settings(deadline=None, max_examples=60)
@given(weight=MATRICES, wide=st.booleans())
def test_every_code_is_the_nearest_level_and_quantising_again_changes_nothing(
    kind: str, weight: np.ndarray, wide: bool
) -> None:
    given_ = torch.from_numpy(weight).to(torch.float64 if wide else torch.float32)
    held = quantise(given_, kind)
    dense, flat, values = held.dense(), weight.reshape(-1).astype("f8"), values_of(held)
    assert held.shape == weight.shape == tuple(dense.shape) and dense.dtype == torch.float32
    codes = unpacked(held)[: flat.size].numpy()
    told = values[np.arange(flat.size), codes]
    slack = 1e-6 * np.abs(values).max(1)
    assert (np.abs(dense.numpy().reshape(-1) - told) <= slack).all()
    assert (np.abs(flat - told) <= np.abs(flat[:, None] - values).min(1) + slack).all()
    step = np.diff(values, axis=1)
    assert (np.abs(flat - told) <= step.max(1) / 2 + slack).all(), "half the widest step, since the ends are levels"
    again = quantise(dense, kind)
    assert torch.equal(again.dense(), dense) and torch.equal(again.scales.abs(), held.scales.abs())


@KIND
def test_a_block_is_64_weights_of_a_row_with_one_scale(kind: str) -> None:
    weight = torch.ones(4, 128)
    weight[0, :64] *= draw(64)  # small beside the rest: with one scale for all it would be lost
    held = quantise(weight, kind)
    assert held.scales.shape == (8, 2 if kind.startswith("uniform") else 1)
    error = (held.dense() - weight).norm(dim=1)
    assert error[1:].max() == 0
    assert 0 < error[0] < 0.8 * weight[0, :64].norm()


@KIND
@given(data=st.data())
def test_packing_loses_no_code_whatever_their_number(kind: str, data: st.DataObject) -> None:
    bits = QUANTISERS[kind].bits
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=99))
    full = codes + [0] * (-len(codes) % (8 // bits))
    packed = pack(torch.tensor(full, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8 and len(packed) == len(full) * bits // 8
    held = Quantised(packed, torch.ones(1, 1), (1, 1), kind)
    assert unpacked(held)[: len(codes)].tolist() == codes, "the first code stands in the lowest bits"


@KIND
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (7, 33), (65, 129)])
def test_a_module_holds_codes_and_scales_and_nothing_else(kind: str, shape: tuple[int, int]) -> None:
    out, columns = shape
    module = QuantisedLinear(nn.Linear(columns, out, bias=False), quantise(draw(*shape), kind))
    blocks, bits = math.ceil(out * columns / 64), QUANTISERS[kind].bits
    held = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    assert held == blocks * (64 * bits // 8 + 4 * (2 if kind.startswith("uniform") else 1))


def both(made: Any, kind: str) -> tuple[Any, Any]:
    """A quantised module and a plain one of the dequantised weight, with a bias that trains."""
    plain = made.double()
    with torch.no_grad():
        plain.bias.copy_(draw(len(plain.bias), seed=3))
    quantised = QuantisedLinear(copy.deepcopy(plain), quantise(as_matrix(plain), kind))
    with torch.no_grad():
        plain.weight.copy_(quantised.weight)
    plain.weight.requires_grad_(False)
    return quantised, plain


MADE = {"linear": lambda: nn.Linear(5, 7), "conv1d": lambda: Conv1D(7, 5)}


@KIND
@pytest.mark.parametrize("made", MADE)
def test_forward_and_gradients_are_those_of_the_dequantised_weight(kind: str, made: str) -> None:
    quantised, plain = both(MADE[made](), kind)
    assert quantised.weight.shape == plain.weight.shape and as_matrix(quantised).shape == weight_shape(quantised)
    assert weight_shape(quantised) == (7, 5) == weight_shape(plain)
    x, dy = draw(2, 3, 5, dtype=torch.float64), draw(2, 3, 7, seed=1, dtype=torch.float64)
    found = []
    for module in (quantised, plain):
        mine = x.clone().requires_grad_()
        y = module(mine)
        y.backward(dy)
        found.append([y.detach(), mine.grad, module.bias.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(quantised, (x.clone().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_cast_reaches_the_weight_and_never_the_scales(dtype: torch.dtype) -> None:
    held = quantise(draw(16, 64), "nf4")
    module = QuantisedLinear(nn.Linear(64, 16), held).to(dtype)
    assert module.scales.dtype == torch.float32 and torch.equal(module.scales, held.scales)
    assert module.weight.dtype == module.bias.dtype == dtype
    x = draw(3, 64, seed=1).to(dtype)
    assert torch.equal(module.weight, held.dense().to(dtype))
    torch.testing.assert_close(
        module(x), functional.linear(x, held.dense().to(dtype), module.bias), rtol=0.02, atol=1e-3
    )
    assert module(x).dtype == dtype


def test_between_forward_and_backward_no_weight_is_kept() -> None:
    module = QuantisedLinear(nn.Linear(256, 128), quantise(draw(128, 256), "nf4"))
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        x = draw(2, 256).requires_grad_()
        y = module(x)
    assert sum(tensor.nbytes for tensor in kept) == 128 * 256 // 2 + 128 * 256 // 64 * 4
    y.sum().backward()
    assert x.grad is not None
    kept.clear()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        module(draw(2, 256))  # the first layer's input needs no gradient
    assert sum(t.nbytes for t in kept) == 0


@KIND
def test_restoring_gives_the_weight_in_the_modules_own_layout(kind: str) -> None:
    for made in MADE.values():
        module = made()
        held = quantise(as_matrix(module), kind)
        restore(module, held)
        assert torch.equal(as_matrix(module), held.dense())


def loftq(weight: torch.Tensor, rank: int, scale: float, iterations: int, kind: str) -> First:
    return INITIALISERS["loftq"](
        type(start := start_of(weight, rank, scale))(**{**vars(start), "store": kind}),
        Loftq(kind="loftq", iterations=iterations),
    )


def by_hand(weight: np.ndarray, rank: int, iterations: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """LoftQ's Algorithm 1 in numpy: Q and L, one block and one weight at a time, singular vectors by LAPACK's SVD."""
    low = np.zeros_like(weight)
    for _ in range(iterations):
        flat, found = (weight - low).reshape(-1), []
        for first in range(0, flat.size, 64):
            block = flat[first : first + 64]
            if kind.startswith("nf"):
                scale = np.abs(block).max().astype("f4").astype("f8")
                levels = scale * np.array(NF4 if kind == "nf4" else QUANTISERS["nf2"].levels)
            else:
                ends = (block.min().astype("f4").astype("f8"), block.max().astype("f4").astype("f8"))
                levels = np.linspace(*ends, 2 ** int(kind[-1]))
            found += [levels[np.abs(levels - value).argmin()] for value in block]
        dense = np.array(found).reshape(weight.shape)
        u, s, vt = np.linalg.svd(weight - dense, full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return dense, low


@KIND
@pytest.mark.parametrize(("shape", "rank"), [((24, 40), 3), ((40, 24), 5), ((9, 7), 7)])
@pytest.mark.parametrize(("iterations", "scale"), [(1, 1.0), (2, 0.25), (5, 3.0)])
def test_loftq_is_its_algorithm_for_every_scale(
    kind: str, shape: tuple[int, int], rank: int, iterations: int, scale: float
) -> None:
    weight = draw(*shape, seed=iterations, dtype=torch.float64)
    first = loftq(weight, rank, scale, iterations, kind)
    assert first.base is not None
    dense, low = by_hand(weight.numpy(), rank, iterations, kind)
    np.testing.assert_allclose(first.base.dense().double().numpy(), dense, atol=1e-6 * np.abs(weight.numpy()).max())
    np.testing.assert_allclose((scale * first.b @ first.a).numpy(), low, atol=1e-6 * np.abs(weight.numpy()).max())
    sizes = [first.b.norm(dim=0), first.a.norm(dim=1)]
    torch.testing.assert_close(*sizes)  # the singular values are shared out evenly, as in the paper
    assert sizes[0].tolist() == sorted(sizes[0].tolist(), reverse=True)


@KIND
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), out=st.integers(2, 40), columns=st.integers(2, 40), scale=st.floats(0.05, 20))
def test_the_pair_always_makes_up_for_some_of_what_quantising_takes(
    kind: str, seed: int, out: int, columns: int, scale: float
) -> None:
    """||W - Q - s B A|| < ||W - Q||, by as much as the residual's first singular values say."""
    weight, rank = draw(out, columns, seed=seed, dtype=torch.float64), 1 + seed % 2
    first = loftq(weight, rank, scale, 1 + seed % 5, kind)
    assert first.base is not None
    missing = weight - first.base.dense().double()
    left = torch.linalg.svdvals(missing)[rank:].norm()
    assert float((missing - scale * first.b @ first.a).norm()) == pytest.approx(float(left), rel=1e-6, abs=1e-9)
    assert float(left) < float(missing.norm()) or float(missing.norm()) < 1e-9


@KIND
def test_more_iterations_help_with_four_bits_and_two_iterations_with_two(kind: str) -> None:
    """The SVD is a minimiser, the quantiser none: its scale is the block's extremes, whatever that costs.

    So the error may rise, and with two bits it does, on average, after the third iteration.
    """
    errors = []
    for seed in range(12):
        weight = draw(48, 64, seed=seed, dtype=torch.float64)
        firsts = [loftq(weight, 8, 1.0, iterations, kind) for iterations in range(1, 6)]
        missing = [weight - f.base.dense().double() - f.b @ f.a for f in firsts if f.base is not None]
        errors.append([float(m.norm() / weight.norm()) for m in missing])
    falls = np.diff(np.array(errors).mean(0)) < 0
    assert falls[0]
    assert falls.all() == kind.endswith("4")


def test_nothing_is_made_up_for_where_nothing_is_missing() -> None:
    first = loftq(torch.zeros(6, 9), 2, 2.0, 3, "nf4")
    assert not first.a.any() and not first.b.any() and first.base is not None and not first.base.dense().any()


def test_pefts_loftq_gives_the_same_split() -> None:
    """PEFT's own function on the CPU, where its code says cuda; needs bitsandbytes, which the project does not."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="PEFT's LoftQ quantises by bitsandbytes")
    from peft.utils.loftq_utils import loftq_init

    assert bitsandbytes.functional.get_4bit_type("nf4", device="cpu").tolist()[:16] == NF4
    inner: Any = loftq_init.__wrapped__
    consts = tuple("cpu" if const == "cuda" else const for const in inner.__code__.co_consts)
    on_cpu = types.FunctionType(inner.__code__.replace(co_consts=consts), inner.__globals__)
    for seed, iterations in enumerate((1, 2, 5)):
        weight = draw(96, 128, seed=seed)
        with torch.no_grad():
            dense, a, b = on_cpu(weight, num_bits=4, reduced_rank=8, num_iter=iterations)
        first = loftq(weight, 8, 1.0, iterations, "nf4")
        assert first.base is not None
        torch.testing.assert_close(first.base.dense(), dense, rtol=0, atol=1e-6 * float(weight.abs().max()))
        torch.testing.assert_close(first.b @ first.a, (b @ a).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(first.a.abs(), a.double().abs(), rtol=0, atol=1e-4)  # singular vectors have a sign


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_stands_on_its_quantised_weights(family: str, tmp_path: Path) -> None:
    """Two links in float64: each trains, and the files alone give W_k = Q_k + s B A of every adapted module."""
    chain = chain_of(family, tmp_path, 2, **LOFTQ, steps=12, learning_rate=2e-2)
    job = job_of(family, chain[:1], **LOFTQ, steps=12, learning_rate=2e-2, train=rows_of(family, 4))
    losses = [event["loss"] for event in run_link(job)[2].losses]
    assert losses[-1] < losses[0] - 0.1
    before = adaptable(tied(job.base, chain[:1], job.task, FP64))
    for link in chain[1:]:
        after = adaptable(tied(job.base, chain[: link.number + 1], job.task, FP64))
        adapter = link.adapter()
        assert adapter.bases.keys() == adapter.pairs.keys() and QUANTISED in link.record["files"]
        errors = []
        for name, pair in adapter.pairs.items():
            dense = adapter.bases[name].dense().double()
            assert torch.equal(as_matrix(after[name]), dense + pair.scale * (pair.b @ pair.a))
            dense_, low = by_hand(as_matrix(before[name]).numpy(), pair.rank, 3, "nf4")
            np.testing.assert_allclose(dense.numpy(), dense_, atol=1e-7)
            whole = as_matrix(before[name]).numpy()
            errors.append(np.linalg.norm(whole - dense_ - low) / np.linalg.norm(whole))
        told = link.record["start_error"]
        assert [told["max"], told["mean"]] == pytest.approx([max(errors), np.mean(errors)], rel=1e-4)
        assert 0.001 < max(errors) < 0.2
        before = after


@pytest.mark.parametrize("store", ["nf2", "uniform4", "uniform2"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_store_ties_its_knots_and_is_quantised_from_the_fp32_master(
    family: str, store: str, tmp_path: Path
) -> None:
    found = []
    for dtype in ("fp32", "bf16"):  # run_link raises where a score moves
        machine = FP32.model_copy(update={"dtype": dtype})
        found.append(chain_of(family, tmp_path / dtype, 1, machine, **{**LOFTQ, "quantise": store})[1].adapter().bases)
    for name, held in found[0].items():
        other = found[1][name]
        assert held.kind == other.kind == store
        assert torch.equal(held.codes, other.codes) and torch.equal(held.scales, other.scales)


def test_the_knot_changes_no_logit(tmp_path: Path) -> None:
    for family in FAMILIES:
        chain = root_of(family, tmp_path / family)
        job = job_of(family, chain, **LOFTQ, learning_rate=2e-2)
        model: Any = tied(job.base, chain, job.task, FP64)
        firsts = first_pairs(model, job)
        layers = first_layers(model, job, firsts)
        adapter, _, _ = run_link(job)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.A.copy_(adapter.pairs[name].a)
                layer.B.copy_(adapter.pairs[name].b)
            for name, value in adapter.head.items():
                model.get_parameter(name).copy_(value)
        rows, longer = rows_of(family, 4, seed=3), grow(job, tmp_path / family)
        for ours, theirs in zip(
            logits_of(model, family, rows), logits_of(model_of(family, longer), family, rows), strict=True
        ):
            assert float((ours - theirs).abs().max()) <= 1e-10 * max(1.0, float(ours.abs().max()))


def test_any_initialiser_starts_on_a_quantised_store(tmp_path: Path) -> None:
    """QLoRA: Q is W's own; QGoRA: so it is, and the step is the one of the full-precision gradient."""
    chain = root_of("llama", tmp_path)
    model: Any = tied(base_of("llama"), chain, job_of("llama", chain).task, FP64)
    modules = adaptable(model)
    directions = {n: {"sketch": draw(weight_shape(m)[0], 4, dtype=torch.float64)} for n, m in modules.items()}
    for initialiser in ("kaiming", "random_b", {"kind": "gora", "gamma": 0.05}):
        changes: dict[str, Any] = {"initialiser": initialiser, "directions": directions}
        plain = first_pairs(model, job_of("llama", chain, **changes))
        stored = first_pairs(model, job_of("llama", chain, **changes, quantise="uniform2"))
        for name, first in stored.items():
            assert torch.equal(first.a, plain[name].a) and torch.equal(first.b, plain[name].b)
            weight = as_matrix(modules[name])
            assert first.base is not None and plain[name].base is None and plain[name].error == 0.0
            assert torch.equal(first.base.dense(), quantise(weight, "uniform2").dense())
            missing = float((weight - first.base.dense()).norm() / weight.norm())
            assert first.error == pytest.approx(missing, rel=1e-9) and missing > 0.1
    job = job_of("llama", chain, initialiser="kaiming", quantise="nf4")
    layers = first_layers(model, job, first_pairs(model, job))
    assert all(isinstance(layer.base, QuantisedLinear) for layer in layers.values())
    assert not [n for n, p in model.named_parameters() if any(n.startswith(f"{m}.base.weight") for m in layers)]


def test_a_module_of_rank_0_keeps_its_weight(tmp_path: Path) -> None:
    chain = root_of("llama", tmp_path)
    ranks = job_of("llama", chain).ranks
    name = next(iter(ranks))
    chain = grow(job_of("llama", chain, **LOFTQ, ranks={**ranks, name: 0}), tmp_path)
    assert name not in chain[1].adapter().bases
    before, after = (model_of("llama", chain[:n]).get_submodule(name).weight for n in (1, 2))
    assert torch.equal(before, after)


def test_a_quantised_link_drops_out_whole(tmp_path: Path) -> None:
    """Not kept: neither its pair nor its weights are part of the model."""
    chain = chain_of(
        "llama", tmp_path, 1, **LOFTQ, keep_link="if_better", learning_rate=1e-9, steps=1, validate_every=1
    )
    assert not chain[1].kept and not chain[1].replaces_weights
    for one, other in zip(
        model_of("llama", chain).parameters(), model_of("llama", chain[:1]).parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_law_7_a_quantised_link_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {**LOFTQ, "dropout": 0.2, "keep": "best", "steps": 8}
    assert resumes(job_of("gpt2", root_of("gpt2", tmp_path), FP32, **changes), tmp_path, monkeypatch).bases


@KIND
def test_files_give_back_what_was_written(kind: str, tmp_path: Path) -> None:
    bases = {"a.b": quantise(draw(3, 5), kind), "a.c": quantise(draw(65, 64, seed=1), kind)}
    write_quantised(tmp_path, bases)
    found = read_quantised(tmp_path)
    assert found.keys() == bases.keys()
    for name, held in bases.items():
        assert (found[name].shape, found[name].kind) == (held.shape, held.kind)
        assert torch.equal(found[name].codes, held.codes) and torch.equal(found[name].scales, held.scales)
    write_quantised(tmp_path / "none", {})
    assert not (tmp_path / "none").exists() and read_quantised(tmp_path / "none") == {}


def forged(**changes: Any) -> dict[str, torch.Tensor]:
    """A file's tensors; `changes` by part, None takes it away."""
    held = quantise(draw(8, 64), "nf4")
    parts: dict[str, Any] = {"codes": held.codes, "scales": held.scales, "shape": torch.tensor([8, 64]), **changes}
    return {part if "." in part else f"m.nf4.{part}": value for part, value in parts.items() if value is not None}


FORGED: dict[str, dict[str, Any]] = {
    "no codes": {"codes": None}, "no shape": {"shape": None}, "short": {"codes": torch.zeros(3, dtype=torch.uint8)},
    "floats": {"codes": torch.zeros(256)}, "flat": {"scales": torch.ones(8)},
    "double": {"scales": torch.ones(8, 1).double()}, "affine": {"scales": torch.ones(8, 2)},
    "nan": {"scales": torch.full((8, 1), math.nan)}, "infinite": {"scales": torch.full((8, 1), math.inf)},
    "negative": {"shape": torch.tensor([-8, -64])}, "zero": {"shape": torch.tensor([0, 64])},
    "huge": {"shape": torch.tensor([2**62, 2**62])}, "line": {"shape": torch.tensor([512])},
    "scalar": {"shape": torch.tensor(512)}, "none": {"shape": torch.zeros(0, dtype=torch.int64)},
    "fraction": {"shape": torch.tensor([8.0, 64.0])}, "kind": {"m.nf8.codes": torch.zeros(1)},
    "twice": {"m.nf2.codes": torch.zeros(1)}, "word": {".": torch.zeros(1)}, "bare": {"x.": torch.zeros(1)},
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_one_line(case: str, tmp_path: Path) -> None:
    save_tensors(tmp_path / QUANTISED, forged())
    assert read_quantised(tmp_path)["m"].shape == (8, 64)
    save_tensors(tmp_path / QUANTISED, forged(**FORGED[case]))
    with pytest.raises(UserError, match=r"quantised\.safetensors: .*`dvc checkout`") as told:
        read_quantised(tmp_path)
    assert "\n" not in str(told.value)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_truncated_file_is_one_line(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cut")
    save_tensors(folder / QUANTISED, forged())
    content = (folder / QUANTISED).read_bytes()
    (folder / QUANTISED).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError, match=r"quantised\.safetensors: "):
        read_quantised(folder)


def resealed(link: Link, **record: Any) -> Link:
    """The link with its files as they stand, named and sealed."""
    (link.folder / "link.json").unlink()
    seal(link.folder, {**{k: v for k, v in link.record.items() if k != "files"}, **record})
    return read_chain(link.folder)[-1]


def test_a_chain_commits_to_its_quantised_weights(tmp_path: Path) -> None:
    chain = chain_of("llama", tmp_path, 1, FP32, **LOFTQ)
    path = chain[1].folder / QUANTISED
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"quantised\.safetensors: changed"):
        read_chain(chain[1].folder)
    path.unlink()
    with pytest.raises(UserError, match=r"quantised\.safetensors: missing"):
        read_chain(chain[1].folder)
    with pytest.raises(UserError, match=r"files: does not name quantised\.safetensors"):
        resealed(chain[1])  # a link that says it was quantised, without its weights
    path.write_bytes(content)
    whole = resealed(chain[1])
    left = {name: digest for name, digest in whole.record["files"].items() if name != QUANTISED}
    for section in (whole.record["link_section"], {**whole.record["link_section"], "quantise": "none"}):
        record = {**whole.record, "link_section": section, "files": left}
        write_sealed(whole.folder / "link.json", "link", record)
        with pytest.raises(UserError, match=r"files: does not name quantised\.safetensors"):
            read_chain(whole.folder)


def test_weights_of_another_base_are_refused(tmp_path: Path) -> None:
    chain = chain_of("llama", tmp_path, 1, FP32, **LOFTQ)
    tensors = load_tensors(chain[1].folder / QUANTISED)
    save_tensors(chain[1].folder / QUANTISED, {**tensors, **{f"x{k[1:]}": v for k, v in forged().items()}})
    resealed(chain[1])
    with pytest.raises(UserError, match=r"x: \[8, 64\] does not fit: the base has none of that name"):
        model_of("llama", read_chain(chain[1].folder), FP32)


def test_no_adapter_is_exported_of_replaced_weights(tmp_path: Path) -> None:
    chain = grow(job_of("llama", chain_of("llama", tmp_path, 1, FP32, **LOFTQ), FP32), tmp_path)
    with pytest.raises(UserError, match=r"trained on quantised weights.*merged checkpoint only"):
        flat_adapter(chain)
    told = chain_manifest(chain, dict(tie(tied(base_of("llama"), chain[:1], job_of("llama", chain).task, FP32), chain)))
    assert [link["replaces_weights"] for link in told["links"]] == [True, False]
    assert "trained on quantised weights" in str(no_adapter(told["links"]))
    plain = chain_of("llama", tmp_path / "plain", 1, FP32)
    assert no_adapter([{"kept": link.kept, "replaces_weights": link.replaces_weights} for link in plain[1:]]) is None
    assert flat_adapter(plain)


def test_export_says_why_there_is_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("artifacts/merge").mkdir(parents=True)
    monkeypatch.setattr("tasks.export.chain_json", lambda: {"links": [{"kept": True, "replaces_weights": True}]})
    for form in ("flat_adapter", "portable_adapter"):
        with pytest.raises(UserError, match=rf"{form}: not there: .*export --form checkpoint"):
            export(Path("out"), form)


@pytest.mark.parametrize("kind", ["one_batch", "sampled"])
def test_a_probe_after_a_replaced_weight_gives_no_gap(kind: str, tmp_path: Path) -> None:
    chain = root_of("llama", tmp_path)
    ranks = job_of("llama", chain).ranks
    name = next(iter(ranks))  # of rank 0 in the quantised link: its gap is still known
    chain = grow(job_of("llama", chain, **LOFTQ, ranks={**ranks, name: 0}), tmp_path)
    chain = grow(job_of("llama", chain), tmp_path)
    task = job_of("llama", chain).task
    objective = open_chain(base_of("llama"), chain, task, FP64)
    config = PROFILE.model_copy(update={"probe": kind, "micro_batch": 4})
    known = moved(chain)
    assert len(known[name] or []) == 1 and set(known) == set(ranks)
    found = probe(objective, rows_of("llama", 4), adaptable(objective.model), known, config, (7, 3)).modules
    for module, numbers in found.items():
        if module == name:
            assert numbers["gap"] is not None and numbers["update_nuclear_norm"] > 0
        else:
            told = (numbers["gap"], numbers["update_nuclear_norm"], numbers["gap_valid"])
            assert told == (None, None, False)
    metrics = _metrics({"probe": kind, "loss": 1.0, "examples": 4, "tokens": 9, "modules": found})
    assert "frank_wolfe_gap" not in metrics and 0 < metrics["gap_valid_share"] <= 1 / len(found)


def settings_of(**changes: Any) -> dict[str, Any]:
    raw = copy.deepcopy(PARAMS)
    for key, value in changes.items():
        section, name = key.split("__")
        raw[section][name] = value
    return raw


def test_what_cannot_be_quantised_is_refused_and_what_can_is_not() -> None:
    mine = {"kind": "loftq", "iterations": 5}
    for kind in QUANTISERS:
        check_params(settings_of(link__quantise=kind))
        check_params(settings_of(link__quantise=kind, link__initialiser=mine))
    with pytest.raises(UserError, match=r"link\.initialiser 'loftq' with link\.quantise 'none': .*here nothing"):
        check_params(settings_of(link__initialiser=mine))
    with pytest.raises(UserError, match=r"link\.quantise 'nf4' with merge\.checkpoint false: .*nothing would be left"):
        check_params(settings_of(link__quantise="nf4", merge__checkpoint=False))
    with pytest.raises(UserError, match=r"link\.initialiser\.iterations: Input should be greater"):
        check_params(settings_of(link__quantise="nf4", link__initialiser={"kind": "loftq", "iterations": 0}))
    with pytest.raises(UserError, match=r"link\.quantise: 'nf3' is not a value; did you mean 'nf4'"):
        check_params(settings_of(link__quantise="nf3"))


def test_without_a_quantised_store_the_start_has_no_error(tmp_path: Path) -> None:
    chain = root_of("llama", tmp_path)
    assert run_link(job_of("llama", chain))[1]["start_error"] == {"max": 0.0, "mean": 0.0}
    assert run_link(job_of("llama", chain, initialiser="kaiming", quantise="nf2"))[1]["start_error"]["mean"] > 0.1
