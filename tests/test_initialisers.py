"""Starts of a link against the closed forms of their papers, and PEFT's own code."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_eva_state_dict, get_peft_model
from peft.tuners.lora import preprocess_loraga
from torch import nn

from cola_core.adapters import Pair, detach
from cola_core.axes.allocators import Question, allocate
from cola_core.axes.initialisers import INITIALISERS, First, Start
from cola_core.chain import earlier_pairs
from cola_core.config.recipe import AllocateConfig
from cola_core.config.values import Cora, LoraGa, Momentum
from cola_core.directions import Moments, activation_directions, gradient_directions, sister_directions
from cola_core.errors import UserError
from cola_core.knot import open_chain
from cola_core.lineage import read_chain
from cola_core.models import adaptable
from cola_core.sealed import write_sealed
from cola_core.start import first_layers, first_pairs
from tests.lab import FAMILIES, FP64, base_of, chain_of, logits_of, root_of, rows_of, start_of, task_of
from tests.points import job_at, walk

DIRECTIONS = {
    "ArB2r": (slice(0, 4), slice(4, 8)),
    "A2rBr": (slice(4, 8), slice(0, 4)),
    "ArBr": (slice(1, 8, 2), slice(0, 8, 2)),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora_ga(
    gradient: torch.Tensor, rank: int, direction: str = "ArB2r", form: str = "paper", gamma: float = 16.0
) -> First:
    options = LoraGa(kind="lora_ga", direction=direction, form=form, gamma=gamma)
    start = start_of(gradient, rank, 2.0, gradient_directions(gradient, 2 * rank, 5))
    return INITIALISERS["lora_ga"](start, options)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("form", ["paper", "peft"])
def test_lora_ga_takes_the_singular_vectors_that_its_paper_names(direction: str, form: str) -> None:
    gradient = random(24, 16) @ torch.diag(0.7 ** torch.arange(16).double())
    left, values, right = np.linalg.svd(gradient.numpy())
    first = lora_ga(gradient, 4, direction, form)
    of_a, of_b = DIRECTIONS[direction]
    size = 24**0.25 / 4
    lengths = np.ones(4) if form == "paper" else values[of_b]
    np.testing.assert_allclose(np.abs(first.b.numpy().T @ left[:, of_b]), np.diag(lengths * size), atol=1e-6)
    a_size = size if form == "paper" else 1.0
    np.testing.assert_allclose(np.abs(first.a.numpy() @ right[of_a].T), np.diag([a_size] * 4), atol=1e-6)
    assert first.kept


def test_lora_gas_first_step_goes_down_the_gradient_better_than_any_random_start() -> None:
    """Its aim: s^2 (B B^T G + G A^T A) is the best approximation of G of rank 2 r, up to a factor."""
    gradient = random(20, 30, seed=3)
    first = lora_ga(gradient, 5)
    step = first.b @ first.b.T @ gradient + gradient @ first.a.T @ first.a
    left, values, right = torch.linalg.svd(gradient)
    best = left[:, :10] @ torch.diag(values[:10]) @ right[:10]
    torch.testing.assert_close(step / step.norm(), best / best.norm(), atol=1e-6, rtol=0)


def test_a_matrix_with_fewer_than_2_r_singular_vectors_still_starts() -> None:
    first = lora_ga(random(3, 16), 2)
    assert first.a.shape == (2, 16) and first.b.shape == (3, 2)
    assert float(torch.linalg.matrix_norm(first.b @ first.a)) > 0.1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pefts_form_is_pefts_own(direction: str) -> None:
    """PEFT's LoRA-GA on one linear map: A, B and the frozen weight up to the sign of each singular pair."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20, bias=False))
    before, inputs = net[0].weight.detach().clone(), torch.randn(6, 12)
    config = LoraConfig(
        r=3, lora_alpha=6, use_rslora=True, target_modules=["0"], init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale="stable", stable_gamma=16),
    )  # fmt: skip
    preprocess_loraga(net, config, lambda: net(inputs).square().sum().backward())
    gradient = net[0]._peft_loraga_grad.double()
    layer = get_peft_model(net, config).base_model.model[0]
    theirs_a, theirs_b = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    ours = lora_ga(gradient, 3, direction, "peft")
    signs = torch.sign((ours.a * theirs_a).sum(1)), torch.sign((ours.b * theirs_b).sum(0))
    torch.testing.assert_close(ours.a * signs[0][:, None], theirs_a, atol=2e-4, rtol=0)
    torch.testing.assert_close(ours.b * signs[1], theirs_b, atol=2e-4 * float(theirs_b.abs().max()), rtol=0)
    moved = before.double() - layer.base_layer.weight.detach().double()
    torch.testing.assert_close(moved, layer.scaling["default"] * theirs_b @ theirs_a, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora_ga", "momentum"])
def test_where_the_weights_give_up_the_start_no_logit_moves(family: str, kind: str, tmp_path: Path) -> None:
    chain = chain_of(family, tmp_path, 1, learning_rate=2e-2)
    options = {"lora_ga": {"kind": "lora_ga", "direction": "ArB2r", "form": "paper", "gamma": 16.0},
               "momentum": {"kind": "momentum", "momentum": 0.5}}  # fmt: skip
    profile = {"probe": "one_batch", "directions": ["gradient"]} if kind == "lora_ga" else {}
    job = job_at(family, chain, {"initialiser": options[kind]}, profile, machine=FP64)
    model, rows = open_chain(base_of(family), chain, task_of(family), FP64).model, rows_of(family, 3, seed=4)
    before = logits_of(model, family, rows)
    layers = first_layers(model, job, first_pairs(model, job))
    assert all(float((layer.B @ layer.A).norm()) > 1e-3 for layer in layers.values()), "nothing was given up"
    for was, now in zip(before, logits_of(model, family, rows), strict=True):
        torch.testing.assert_close(now, was, atol=1e-9, rtol=0)
    merged = detach(model)
    assert all(float((p.b @ p.a).norm()) < 1e-9 for p in merged.values()), "and the file says so too"


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3)])
def test_momentum_takes_what_the_last_link_trained_and_not_what_weights_gave_up_for_it(
    ranks: tuple[int, ...], tmp_path: Path
) -> None:
    chain, link = root_of("llama", tmp_path), {"initialiser": {"kind": "momentum", "momentum": 0.25}}
    for rank in ranks[:2]:
        chain = walk(job_at("llama", chain, link, allocation={"rank": rank}), tmp_path)
    assert set(chain[2].record["given_ranks"].values()) == {ranks[1]} and not chain[1].record["given_ranks"]
    job = job_at("llama", chain, link, allocation={"rank": ranks[2]})
    firsts = first_pairs(open_chain(job.base, chain, job.task, FP64).model, job)
    for name, pair in chain[2].adapter().pairs.items():
        own, most = ranks[1], min(ranks[1:])
        assert pair.rank == 2 * own
        torch.testing.assert_close(firsts[name].a[:most], 0.5 * pair.a[:most].double())
        assert not firsts[name].b[:, most:].any(), "a rank that is new starts as LoRA does"


def test_momentum_starts_anew_where_the_last_link_did_not_train(tmp_path: Path) -> None:
    link = {"initialiser": {"kind": "momentum", "momentum": 0.25}, "keep_link": "if_better"}
    chain = walk(job_at("llama", root_of("llama", tmp_path), link), tmp_path)
    chain[1].record["kept"] = False
    job = job_at("llama", chain, link)
    firsts = first_pairs(open_chain(job.base, chain, job.task, FP64).model, job)
    assert all(not first.kept and not first.b.any() and first.a.any() for first in firsts.values())


def test_momentum_leaves_a_share_in_the_pair_whatever_the_scales_and_ranks() -> None:
    last = Pair(random(3, 16), random(8, 3, seed=1), 0.5)
    start = replace(start_of(torch.zeros(8, 16), 4, 2.0), last=last)
    first = INITIALISERS["momentum"](start, Momentum(kind="momentum", momentum=0.25))
    torch.testing.assert_close(2.0 * first.b @ first.a, 0.25 * 0.5 * last.b @ last.a)
    torch.testing.assert_close(first.a[:3], 0.5 * last.a)
    assert first.kept and not first.b[:, 3].any() and first.a[3].any(), "a rank that is new starts as LoRA does"
    alone = INITIALISERS["momentum"](start_of(torch.zeros(8, 16), 4, 2.0), Momentum(kind="momentum", momentum=0.25))
    assert not alone.kept and not alone.b.any() and alone.a.any()


@settings(max_examples=25, deadline=None)
@given(ranks=st.lists(st.integers(1, 3), min_size=1, max_size=3), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_coras_basis_spans_what_the_earlier_links_changed(ranks: list[int], rank: int, seed: int) -> None:
    pairs = [Pair(random(r, 20, seed=seed + i), random(12, r, seed=seed - i), 1.5 - i / 4) for i, r in enumerate(ranks)]
    start = Start(torch.zeros(12, 20), rank, 2.0, {}, pairs, seed, 2, "m")
    first = INITIALISERS["cora"](start, Cora(kind="cora", sisters="chain"))
    stacked = torch.cat([p.scale * p.b @ p.a for p in pairs], dim=1)
    left, values, _ = torch.linalg.svd(stacked)
    known = min(rank, int((values > 1e-9 * values[0]).sum()))
    torch.testing.assert_close(first.b.T @ first.b, torch.eye(rank, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        first.b[:, :known] @ first.b[:, :known].T, left[:, :known] @ left[:, :known].T, atol=1e-6, rtol=0
    )
    assert not first.a.any()


def test_sisters_share_the_left_singular_vectors_of_all_their_changes() -> None:
    base = {"m": random(10, 14)}
    changes = [random(10, 2, seed=s) @ random(2, 14, seed=s + 9) for s in (1, 2)]
    found = sister_directions(base, [{"m": base["m"] + change} for change in changes], 4)["m"]["common"].double()
    left, _, _ = torch.linalg.svd(torch.cat(changes, dim=1))
    torch.testing.assert_close(found @ found.T, left[:, :4] @ left[:, :4].T, atol=1e-6, rtol=0)
    start = start_of(base["m"], 3, 2.0, {"common": found})
    first = INITIALISERS["cora"](start, Cora(kind="cora", sisters="given"))
    torch.testing.assert_close(first.b @ first.b.T, found[:, :3] @ found[:, :3].T, atol=1e-6, rtol=0)


def test_rac_loras_left_sketch_keeps_the_size_of_what_passes_whatever_the_rank() -> None:
    for rank in (1, 4, 16):
        first = INITIALISERS["random_b"](start_of(torch.zeros(400, 30), rank, 2.0), None)
        assert not first.a.any()
        x = random(rank)
        assert float((first.b @ x).square().sum() / x.square().sum()) == pytest.approx(400 / rank, rel=0.35)


@pytest.mark.parametrize("family", FAMILIES)
def test_principal_axes_of_the_inputs_in_float64(family: str, tmp_path: Path) -> None:
    """Every module's inputs, caught by a hook of the test's own, row by row; centred; numpy's decomposition."""
    chain, rows = root_of(family, tmp_path), rows_of(family, 6, seed=2)
    objective = open_chain(base_of(family), chain, task_of(family), FP64)
    modules = adaptable(objective.model)
    caught: dict[str, list[Any]] = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: caught[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for row in rows:
            objective(objective.training_batch([row]))
    for handle in handles:
        handle.remove()
    found, tokens = activation_directions(objective, rows, modules, 4, 4)
    for name, inputs in caught.items():
        x = torch.cat(inputs).numpy()
        x = x - x.mean(0)
        _, values, axes = np.linalg.svd(x, full_matrices=False)
        shares = values**2 / (values**2).sum()
        np.testing.assert_allclose(found[name]["variance"].numpy(), shares[:4], atol=1e-5)
        ours = found[name]["axes"].double().numpy()
        if shares[3] - shares[4] > 1e-3:
            np.testing.assert_allclose(ours @ ours.T, axes[:4].T @ axes[:4], atol=1e-3)
    assert tokens == sum(objective.training_batch([row]).tokens for row in rows)


def test_eva_finds_the_axes_and_ranks_that_peft_finds() -> None:
    """PEFT's incremental decomposition of the same inputs, which fit into one batch."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    inputs = 6 * torch.randn(64, 16) @ torch.diag(0.3 ** torch.arange(16))
    config = LoraConfig(
        r=3, target_modules=["0", "2"], init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.99)
    )
    theirs = get_eva_state_dict(
        net, [{"input": inputs}] * 2, config, forward_fn=lambda model, batch: model(batch["input"]),
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    found = {}
    for name, x in (("0", inputs), ("2", torch.tanh(net[0](inputs)).detach())):
        moments = Moments(0, torch.zeros(x.shape[1]), torch.zeros(x.shape[1], x.shape[1]))
        moments.add(x)
        found[name] = moments.directions(6)
    numbers = {name: {"variance": axes["variance"].tolist()} for name, axes in found.items()}
    config_ = AllocateConfig(allocator="eva", rank=3, r_min=1, r_max=6, features="sqrt")
    ranks = allocate(Question({"0": (24, 16), "2": (8, 24)}, numbers, config_, 0, 1)).ranks
    assert ranks == {name: len(axes) for name, axes in theirs.items()} and ranks["0"] != ranks["2"]
    for name, axes in theirs.items():
        ours, axes = found[name]["axes"][:, : len(axes)].double(), axes.double()
        torch.testing.assert_close(ours @ ours.T, axes.T @ axes, atol=2e-3, rtol=0)


def test_eva_starts_from_the_axes_and_changes_nothing() -> None:
    right = torch.linalg.qr(random(16, 6)).Q
    first = INITIALISERS["eva"](start_of(torch.zeros(8, 16), 4, 2.0, {"axes": right}), None)
    torch.testing.assert_close(first.a, right[:, :4].T)
    assert not first.b.any() and math.isclose(float(first.a.norm()), 2.0)


def test_given_ranks_that_no_training_wrote_are_no_traceback(tmp_path: Path) -> None:
    chain = walk(job_at("llama", root_of("llama", tmp_path)), tmp_path)
    chain[1].record["given_ranks"] = dict.fromkeys(chain[1].record["ranks"], 99)
    assert all(pair.rank == 0 for pair in earlier_pairs(chain)[1].values())
    write_sealed(chain[1].folder / "link.json", "link", {**chain[1].record, "given_ranks": {"x": -1}})
    with pytest.raises(UserError, match=r"given_ranks\.x: Input should be greater than or equal to 0"):
        read_chain(chain[1].folder)
