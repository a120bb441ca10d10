"""NOLA against sums over bases that are built whole, with gradients from autograd; its links and its files."""

from __future__ import annotations

import json
import math
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from cola_core.adapter_files import read_adapter, write_adapter
from cola_core.adapters import LoRA, Pair
from cola_core.axes.parametrisations import PARAMETRISATIONS
from cola_core.chain import tie
from cola_core.config.params import check_params
from cola_core.config.values import Nola
from cola_core.draws import draw_a
from cola_core.errors import UserError
from cola_core.export import chain_manifest, flat_adapter, portable_adapter, write_flat
from cola_core.files import write_json
from cola_core.forms import nola
from cola_core.knot import open_chain
from cola_core.links import run_link
from cola_core.models import adaptable
from cola_core.rows import order
from cola_core.seeds import derive
from cola_core.start import first_layers, first_pairs
from cola_core.verify import verify_chain
from tests.lab import (
    FAMILIES,
    FP32,
    FP64,
    base_of,
    chain_of,
    job_of,
    logits_of,
    model_of,
    root_of,
    rows_of,
)
from tests.points import resumes
from tests.test_config import changed
from tests.test_train import prepared

BASES = 6
NOLA = {"kind": "nola", "bases": BASES}
BF16 = FP32.model_copy(update={"dtype": "bf16"})


def bases_of(seed: int, factor: str, count: int, shape: tuple[int, int]) -> Tensor:
    """All bases at once, count x rows x columns, float64."""
    generator = torch.Generator().manual_seed(derive(seed, factor))
    return (2 * torch.rand(count, *shape, generator=generator) - 1).double()


def layer_of(
    out: int, inner: int, rank: int, bases: int, seed: int = 3, dtype: Any = torch.float64, zero: str = ""
) -> LoRA:
    """A layer around a random linear map; `zero` names the factors whose constant term is zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * (name not in zero)

    base = nn.Linear(inner, out, dtype=dtype)
    base.weight.data = draw("W", out, inner)
    base.requires_grad_(False)
    form = PARAMETRISATIONS["nola"]
    layer = LoRA(base, Pair(draw("A", rank, inner), draw("B", out, rank), 0.7), 0.0, form)
    form.prepare(layer, Nola(kind="nola", bases=bases), seed)
    return layer


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 7), st.integers(0, 99))


@settings(deadline=None)
@given(SIZES)
def test_a_layer_is_the_explicit_sum_and_so_are_its_gradients(sizes: tuple[int, int, int, int, int]) -> None:
    """In float64: y, A and B; da_i = <dL/dA, E_i> / sqrt k and db_j likewise, by hand and by autograd."""
    out, inner, rank, bases, seed = sizes
    layer = layer_of(out, inner, rank, bases, seed)
    a_0, b_0 = (t.clone() for t in layer.form.factors(layer))
    torch.manual_seed(seed)
    with torch.no_grad():
        layer.A.copy_(torch.randn(bases))
        layer.B.copy_(torch.randn(bases))
    x, target = torch.randn(5, inner, dtype=torch.float64), torch.randn(5, out, dtype=torch.float64)
    y = layer(x)
    torch.manual_seed(seed + 1)  # what is drawn elsewhere between forward and backward is nothing to the bases
    (y * target).sum().backward()

    e, f = bases_of(seed, "A", bases, (rank, inner)), bases_of(seed, "B", bases, (out, rank))
    a, b = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B))
    whole_a = a_0.detach() + torch.einsum("k,krc->rc", a, e) / math.sqrt(bases)
    whole_b = b_0.detach() + torch.einsum("k,kor->or", b, f) / math.sqrt(bases)
    whole_a.retain_grad()
    whole_b.retain_grad()
    expected = x @ layer.weight.T + layer.base.bias + 0.7 * x @ whole_a.T @ whole_b.T
    (expected * target).sum().backward()
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    pair = layer.pair()
    torch.testing.assert_close(pair.a, whole_a.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(pair.b, whole_b.detach(), atol=1e-12, rtol=1e-12)
    for found, wanted, gradient, drawn in ((layer.A, a, whole_a.grad, e), (layer.B, b, whole_b.grad, f)):
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-11, rtol=1e-11)
        by_hand = torch.stack([(gradient * basis).sum() for basis in drawn]) / math.sqrt(bases)
        torch.testing.assert_close(found.grad, by_hand, atol=1e-11, rtol=1e-11)
    assert {name for name, _ in layer.named_parameters(recurse=False)} == {"A", "B"}, "the roles stay A and B"
    assert not layer.origin.a.requires_grad and not layer.origin.b.requires_grad, "A_0 and B_0 take no gradient"


def test_autograd_agrees_with_finite_differences() -> None:
    layer = layer_of(4, 5, 2, 3)
    x = torch.randn(2, 5, dtype=torch.float64)

    def run(a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = functional_call(layer, {"A": a, "B": b}, x)
        return result

    assert torch.autograd.gradcheck(run, (torch.randn_like(layer.A, requires_grad=True), layer.B))


@pytest.mark.parametrize(("zero", "still", "moving"), [("B", "A", "B"), ("A", "B", "A")])
def test_a_new_layer_changes_nothing_and_one_factor_alone_has_a_gradient(zero: str, still: str, moving: str) -> None:
    """kaiming: B = 0, so b moves first and a has no gradient yet; random_b: A = 0, the other way round."""
    layer = layer_of(6, 5, 2, 4, zero=zero)
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).square().sum().backward()
    assert not getattr(layer, still).any() and not getattr(layer, moving).any(), "coefficients start at 0"
    assert not getattr(layer, still).grad.any()
    assert getattr(layer, moving).grad.abs().min() > 0


def test_bases_are_uniform_and_the_same_numbers_in_every_dtype() -> None:
    """One coefficient of 1: A - A_0 is a basis itself. Drawn as float32, so float64 has no more digits."""
    drawn = {}
    for dtype in (torch.float32, torch.float64):
        layer = layer_of(70, 300, 60, 1, dtype=dtype, zero="A B")
        with torch.no_grad():
            layer.A.fill_(1)
            layer.B.fill_(1)
        drawn[dtype] = [t.detach().double() for t in layer.form.factors(layer)]
    for narrow, wide in zip(*drawn.values(), strict=True):
        assert torch.equal(narrow, wide)
        assert float(wide.abs().max()) <= 1 and float(wide.abs().max()) > 0.999
        assert abs(float(wide.mean())) < 4 / math.sqrt(3 * wide.numel())
        assert float(wide.square().mean()) == pytest.approx(1 / 3, abs=4 * math.sqrt(4 / 45 / wide.numel()))


def test_the_size_of_a_sum_does_not_grow_with_the_bases() -> None:
    """With coefficients of one size, E |A_ij|^2 = c^2 / 3 for any k: what 1 / sqrt k is for."""
    for bases in (1, 16, 256):
        layer = layer_of(30, 40, 20, bases, zero="A B")
        with torch.no_grad():
            layer.A.fill_(1)
        a, _ = layer.form.factors(layer)
        assert float(a.detach().square().mean()) == pytest.approx(1 / 3, rel=0.25)


def test_factors_modules_links_and_seeds_draw_bases_of_their_own(tmp_path: Path) -> None:
    chain, seen = chain_of("llama", tmp_path, 1, parametrisation=NOLA), []
    for links, seed in ((chain[:1], 7), (chain, 7), (chain[:1], 8)):
        job = job_of("llama", links, parametrisation=NOLA, seed=seed)
        job.ranks.update(dict.fromkeys(job.ranks, 2))  # type: ignore[attr-defined]
        model = open_chain(job.base, links, job.task, job.machine).model
        for name, layer in first_layers(model, job, first_pairs(model, job)).items():
            if not name.endswith(("q_proj", "o_proj")):
                continue
            a_0, b_0 = layer.form.factors(layer)
            layer.A.data.fill_(1)
            layer.B.data.fill_(1)
            a, b = layer.form.factors(layer)
            seen += [(a - a_0).detach().flatten(), (b - b_0).detach().flatten()]
    assert len(seen) == 3 * 2 * 2 * 2 and len({len(t) for t in seen}) == 1, "of one size, or they differ anyway"
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.5


def test_drawing_bases_leaves_the_global_stream_alone() -> None:
    """Law 6: dropout draws from it."""
    layer = layer_of(4, 5, 2, 3)
    before = torch.get_rng_state()
    layer(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    assert torch.equal(before, torch.get_rng_state())


class Live(TorchDispatchMode):
    """Bytes of all tensors that were made inside and still live: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(made) if isinstance(t, Tensor)):
            if storage.data_ptr() not in old | self.known:
                self.known.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.most, self.largest = max(self.most, self.now), max(self.largest, storage.nbytes())
                weakref.finalize(storage, self.gone, storage.data_ptr(), storage.nbytes())
        return made

    def gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_basis_is_kept_for_backward_and_memory_does_not_grow_with_their_number(dtype: Any) -> None:
    """What autograd saves and what lives at once, in bytes, are the same for 2 bases and for 200."""
    out, inner, rank = 40, 50, 20
    saved: dict[int, list[int]] = {2: [], 200: []}
    most = {}
    for bases, sizes in saved.items():
        layer = layer_of(out, inner, rank, bases, dtype=dtype)
        x = torch.randn(3, inner, dtype=dtype)

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Live() as live:
            layer(x).square().sum().backward()
        most[bases] = live.most
        assert live.largest <= max(out, inner) * rank * dtype.itemsize
        a, b = (torch.ones(bases, requires_grad=True) for _ in "AB")
        with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("the sum saves a tensor"), lambda t: t):
            nola.expand(torch.zeros(2, 3), torch.zeros(4, 2), a, b, 0)
    assert saved[2] == saved[200] and sum(saved[2]) > 0
    assert most[2] < most[200] <= most[2] + 3 * 198 * dtype.itemsize, "coefficients, their gradients, and no basis"


def reference(job: Any, family: str) -> tuple[list[float], dict[str, tuple[Tensor, Tensor]]]:
    """A link by torch alone: bases built whole, one row at a time, W + s B A, its own AdamW and warm-up."""
    model: Any = open_chain(job.base, job.chain, job.task, job.machine).model
    config, link = job.config, len(job.chain)
    modules, made = adaptable(model), {}
    for name, rank in job.ranks.items():
        weight: Any = modules[name].weight
        rows, columns = weight.T.shape if isinstance(modules[name], Conv1D) else weight.shape
        seed = derive(job.seed, link, "form", name)
        a_0 = draw_a(job.seed, link, name, rank, columns)
        made[name] = (a_0, bases_of(seed, "A", BASES, (rank, columns)), bases_of(seed, "B", BASES, (rows, rank)))
    trained = {name: [torch.zeros(BASES, dtype=torch.float64, requires_grad=True) for _ in "ab"] for name in made}
    parameters = [p for pair in trained.values() for p in pair]
    adam = torch.optim.AdamW(
        parameters, betas=tuple(config.betas), eps=config.epsilon, weight_decay=config.weight_decay
    )
    losses, root = [], math.sqrt(BASES)
    for step, indices in enumerate(order(len(job.train), config.batch, config.steps, derive(job.seed, link, "data"))):
        weights = {}
        for name, (a_0, e, f) in made.items():
            a, b = trained[name]
            big_a, big_b = a_0 + torch.tensordot(a, e, 1) / root, torch.tensordot(b, f, 1) / root
            delta = config.alpha / math.sqrt(len(a_0)) * big_b @ big_a
            module: Any = modules[name]
            weights[f"{name}.weight"] = module.weight + (delta.T if isinstance(module, Conv1D) else delta)
        total, units = torch.zeros((), dtype=torch.float64), 0
        for row in (job.train[i] for i in indices):
            ids = torch.tensor([row.prompt + row.answer])
            logits = functional_call(model, weights, kwargs={"input_ids": ids}).logits[0].log_softmax(-1)
            picked = [logits[len(row.prompt) - 1 + j, t] for j, t in enumerate(row.answer)]
            total, units = total - torch.stack(picked).sum(), units + len(picked)
        warm = math.ceil(config.warmup * config.steps)
        factor = (step + 1) / warm if step < warm else 1 - (step - warm) / (config.steps - warm)
        adam.param_groups[0]["lr"] = config.learning_rate * factor
        adam.zero_grad()
        (total / units).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        adam.step()
        losses.append(float(total.detach()) / units)
    return losses, {name: (a.detach(), b.detach()) for name, (a, b) in trained.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_law_1_a_second_link_follows_a_plain_loop_over_whole_bases(family: str, tmp_path: Path) -> None:
    settings = {"parametrisation": NOLA, "scale": "rslora", "learning_rate": 5e-2, "steps": 12}
    job = job_of(family, chain_of(family, tmp_path, 1, FP64, **settings), FP64, **settings)
    adapter, _, progress = run_link(job)
    losses, trained = reference(job, family)
    assert [e["loss"] for e in progress.losses] == pytest.approx(losses, abs=1e-10)
    assert adapter.drawn is not None
    for name, found in adapter.drawn.coefficients.items():
        for one, other in zip(found, trained[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
            assert other.abs().min() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_of_two_links_learns_and_is_rebuilt_from_coefficients_bit_for_bit(family: str, tmp_path: Path) -> None:
    settings = {"parametrisation": NOLA, "scale": "rslora", "learning_rate": 5e-2, "steps": 12, "keep": "best"}
    root = root_of(family, tmp_path)
    adapter, _, progress = run_link(job_of(family, root, FP32, **settings))  # law 2: it raises where scores move
    chain = chain_of(family, tmp_path, 2, FP32, **settings)
    start = progress.losses[0]["loss"]
    assert min(e["loss"] for e in progress.losses[-4:]) < 0.95 * start
    read = chain[1].adapter()
    for name, pair in adapter.pairs.items():
        assert torch.equal(pair.a, read.pairs[name].a) and torch.equal(pair.b, read.pairs[name].b), name
        assert (pair.scale, pair.a.dtype) == (read.pairs[name].scale, torch.float32) and pair.b.any()
        assert pair.a.shape == (job_of(family, root).ranks[name], read.pairs[name].a.shape[1])
    for link in chain[1:]:
        assert link.record["trainable_parameters"] == 2 * BASES * len(link.record["ranks"])
    verdicts = list(verify_chain(chain[2].folder, base_of(family), prepared(tmp_path / "prepared", family), FP32))
    assert [v.change for v in verdicts] == [0.0, 0.0]
    errors = dict(tie(model_of(family, chain[:1], FP32), chain))
    assert [set(e["ranks"]) for e in chain_manifest(chain, errors)["links"]] == 2 * [set(adapter.pairs)]
    again = tmp_path / "again"
    again.mkdir()
    write_adapter(again, read)
    for file in again.iterdir():
        assert file.read_bytes() == (chain[1].folder / file.name).read_bytes()


def test_law_7_a_link_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"dropout": 0.2, "keep": "best", "parametrisation": NOLA, "steps": 8}
    resumes(job_of("t5", root_of("t5", tmp_path), FP32, **settings), tmp_path, monkeypatch)
    assert (tmp_path / "state.safetensors").stat().st_size < 100_000, "neither bases nor A and B stand in it"


@pytest.mark.parametrize("start", ["kaiming", "random_b"])
def test_activation_checkpointing_and_either_start_work(start: str, tmp_path: Path) -> None:
    chain, found = root_of("llama", tmp_path), []
    for on in (False, True):
        job = job_of(
            "llama", chain, FP64, parametrisation=NOLA, initialiser=start, activation_checkpointing=on, epsilon=1e-3
        )
        found.append(run_link(job)[0])
    for name, pair in found[0].pairs.items():
        torch.testing.assert_close(found[1].pairs[name].b, pair.b, atol=1e-8, rtol=0)
        assert pair.a.any() and pair.b.any()
    write_adapter(tmp_path, found[0])
    read = read_adapter(tmp_path)
    for name, pair in found[0].pairs.items():
        assert torch.equal(pair.a, read.pairs[name].a) and torch.equal(pair.b, read.pairs[name].b)


@pytest.mark.parametrize("machine", [BF16, FP64], ids=["bf16", "fp64"])
def test_biases_train_beside_coefficients_and_every_store_works(machine: Any, tmp_path: Path) -> None:
    bias = "none" if machine is BF16 else "lora"
    settings = {"parametrisation": NOLA, "bias": bias, "update": {"kind": "lora_plus", "ratio": 4.0}}
    chain = chain_of("opt", tmp_path, 2, machine, **settings)
    pairs = chain[2].adapter().pairs
    assert all((pair.bias is not None) == (bias == "lora") for pair in pairs.values())
    biases = sum(len(pair.bias) for pair in pairs.values() if pair.bias is not None)
    assert chain[2].record["trainable_parameters"] == 2 * BASES * len(pairs) + biases


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("form", ["plain", "frozen_a", "frozen_b"])
def test_a_link_records_what_trained(family: str, form: str, tmp_path: Path) -> None:
    start = "random_b" if form == "frozen_b" else "kaiming"
    (link,) = chain_of(family, tmp_path, 1, FP32, parametrisation=form, initialiser=start, steps=1)[1:]
    pairs = link.adapter().pairs.values()
    counts = {"frozen_a": [p.b for p in pairs], "frozen_b": [p.a for p in pairs]}
    trained = counts.get(form) or [t for p in pairs for t in (p.a, p.b)]
    assert link.record["trainable_parameters"] == sum(t.numel() for t in trained)


def payload(path: Path) -> int:
    """Bytes of tensors in a safetensors file, without its header."""
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    return path.stat().st_size - 8 - int(header)


def test_a_file_grows_with_modules_and_bases_alone(tmp_path: Path) -> None:
    sizes = {}
    for family, rank, bases in (("llama", 1, 6), ("llama", 5, 6), ("llama", 1, 20), ("gpt2", 1, 6)):
        job = job_of(
            family, root_of(family, tmp_path / family), FP32, steps=1, parametrisation={**NOLA, "bases": bases}
        )
        job.ranks.update(dict.fromkeys(job.ranks, rank))  # type: ignore[attr-defined]
        folder = tmp_path / f"{family}-{rank}-{bases}"
        folder.mkdir()
        write_adapter(folder, run_link(job)[0])
        sizes[family, rank, bases] = payload(folder / "adapter_model.safetensors")
        assert sizes[family, rank, bases] == len(job.ranks) * 2 * bases * 4
        assert all(t.shape == (bases,) for t in load_file(folder / "adapter_model.safetensors").values())
    assert sizes["llama", 1, 6] == sizes["llama", 5, 6] < sizes["llama", 1, 20]


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_refuses_a_links_own_file_and_loads_the_flat_one(family: str, tmp_path: Path) -> None:
    settings = {"parametrisation": NOLA, "scale": "rslora", "learning_rate": 5e-2}
    chain = chain_of(family, tmp_path, 2, FP32, **settings)
    with pytest.raises((KeyError, ValueError), match="NOLA"):
        PeftModel.from_pretrained(model_of(family, chain[:1], FP32), str(chain[1].folder))
    forms = {"flat": flat_adapter(chain)}
    forms |= {} if family == "bert" else {"portable": portable_adapter(forms["flat"])}
    rows = rows_of(family, 4, seed=3)
    merged = logits_of(model_of(family, chain, FP32), family, rows)
    plain = logits_of(model_of(family, chain[:1], FP32), family, rows)
    for form, adapter in forms.items():
        write_flat(tmp_path / form, adapter)
        loaded = PeftModel.from_pretrained(model_of(family, chain[:1], FP32), str(tmp_path / form)).eval()
        for ours, theirs, base in zip(merged, logits_of(loaded, family, rows), plain, strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(ours.abs().max()))
            assert float((ours - base).abs().max()) > 1e-2, "the chain learned nothing: the test would pass empty"


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A link of NOLA's."""
    return chain_of("llama", tmp_path_factory.mktemp("link"), 1, FP32, steps=1, parametrisation=NOLA)[1].folder


FIRST = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{FIRST}.nola_A"
Forge = Callable[[dict[str, Any], dict[str, Tensor]], object]
FORGED: dict[str, tuple[Forge, str]] = {
    "bases": (lambda c, t: c["nola"].update(bases=10**12), r"1,?000,?000,?000,?000"),
    "one base more": (lambda c, t: c["nola"].update(bases=BASES + 1), "no coefficients of 7 bases"),
    "no base": (lambda c, t: c["nola"].update(bases=0), r"nola\.bases"),
    "negative rank": (lambda c, t: c.update(r=-1, rank_pattern={}), r"\.json: r: "),
    "rank": (lambda c, t: c.update(r=10**12, rank_pattern={}), "rank 1000000000000 of a matrix of"),
    "rank above both": (lambda c, t: c.update(r=33, rank_pattern={}), "rank 33 of a matrix of"),
    "shape": (lambda c, t: c["nola"]["shapes"].update({FIRST: [10**12, 10**12]}), "numbers, more than 67,108,864"),
    "shape of one": (lambda c, t: c["nola"]["shapes"].update({FIRST: [4]}), r"nola\.shapes"),
    "shape of zero": (lambda c, t: c["nola"]["shapes"].update({FIRST: [0, 4]}), r"nola\.shapes"),
    "no shape": (lambda c, t: c["nola"]["shapes"].pop(FIRST), "is not in target_modules, or has no shape"),
    "strange shape": (lambda c, t: c["nola"]["shapes"].update(x=[4, 4]), "x: is not in target_modules"),
    "shapes": (lambda c, t: c["nola"].update(shapes=[]), r"nola\.shapes"),
    "seed": (lambda c, t: c["nola"].update(seed=10**30), r"nola\.seed"),
    "no seed": (lambda c, t: c["nola"].pop("seed"), r"nola\.seed: missing"),
    "link": (lambda c, t: c["nola"].update(link=0), r"nola\.link"),
    "start": (lambda c, t: c["nola"].update(initialiser="gora"), r"nola\.initialiser: 'gora' is not a value"),
    "unknown": (lambda c, t: c["nola"].update(sed=1), r"nola\.sed: unknown key; did you mean 'seed'"),
    "no streams": (lambda c, t: c.pop("nola"), "peft_type 'NOLA' and nola do not fit"),
    "another type": (lambda c, t: c.update(peft_type="LORA"), "peft_type 'LORA' and nola do not fit"),
    "no such type": (lambda c, t: c.update(peft_type="VERA"), "peft_type: 'VERA' is not a value"),
    "type of a list": (lambda c, t: c.update(peft_type=[]), "peft_type"),
    "missing": (lambda c, t: t.pop(KEY), "its coefficients are missing"),
    "strange": (lambda c, t: t.update({"x.nola_A": torch.ones(BASES)}), "adapter_config.json does not name it"),
    "both": (lambda c, t: t.update({KEY.replace("nola_A", "lora_A.weight"): torch.ones(2)}), "stands beside coeffic"),
    "longer": (lambda c, t: t.update({KEY: torch.ones(BASES + 1)}), "no coefficients of 6 bases"),
    "none": (lambda c, t: t.update({KEY: torch.ones(0)}), "no coefficients of 6 bases"),
    "a matrix": (lambda c, t: t.update({KEY: torch.ones(BASES, 1)}), "no coefficients of 6 bases"),
    "a number": (lambda c, t: t.update({KEY: torch.ones(())}), "no coefficients of 6 bases"),
    "integers": (lambda c, t: t.update({KEY: torch.ones(BASES, dtype=torch.int64)}), "no coefficients of 6 bases"),
    "eight bits": (lambda c, t: t.update({KEY: torch.ones(BASES).to(torch.float8_e4m3fn)}), "no coefficients of 6"),
    "another dtype": (lambda c, t: t.update({KEY: torch.ones(BASES).double()}), "no coefficients of 6 bases"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_one_line(case: str, link: Path, tmp_path: Path) -> None:
    config = json.loads((link / "adapter_config.json").read_text())
    tensors = load_file(link / "adapter_model.safetensors")
    change, line = FORGED[case]
    change(config, tensors)
    write_json(tmp_path / "adapter_config.json", config)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=line) as told:
        read_adapter(tmp_path)
    assert "\n" not in str(told.value) and str(tmp_path) in str(told.value)


def test_what_no_reader_would_take_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: Any) -> None:
    assert nola.excess([(16, 4096, 4096)] * 224, 64) is None, "a Llama of 7 billion weights at rank 16"
    assert "2,080,000,000 numbers" in str(nola.excess([(1000, 2**20, 2**20 - 16 * 1072)], 1))
    assert "512 bases draw 15,032,385,536 numbers" in str(nola.excess([(16, 4096, 4096)] * 224, 512))
    monkeypatch.setattr(nola, "MOST_DRAWS", 1000)
    with pytest.raises(UserError, match=r"^link\.parametrisation 'nola': 6 bases draw .*, more than 1,000: lower "):
        run_link(job_of("llama", root_of("llama", tmp_path), parametrisation=NOLA))


@pytest.mark.parametrize("start", ["kaiming", "random_b", {"kind": "gora", "gamma": 0.05}])
def test_starts_that_no_seed_brings_back_are_refused(start: Any) -> None:
    raw = changed("link.parametrisation", NOLA)
    raw["link"]["initialiser"] = start
    if isinstance(start, str):
        check_params(raw)
        return
    with pytest.raises(UserError, match=r"link\.initialiser 'gora' with link\.parametrisation 'nola': .*from a seed"):
        check_params(raw)


@pytest.mark.parametrize("bases", [0, -1, 10**12, 1.5, "many"])
def test_a_number_of_bases_that_cannot_be_is_refused(bases: Any) -> None:
    with pytest.raises(UserError, match=r"^params\.yaml: link\.parametrisation\.bases: "):
        check_params(changed("link.parametrisation", {"kind": "nola", "bases": bases}))
