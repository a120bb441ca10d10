"""The probe and GoRA: laws 8 and 10, and a direct float64 computation from whole gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from cola_core.adapters import Pair, attach, detach
from cola_core.axes.allocators import Question, allocate
from cola_core.axes.initialisers import INITIALISERS, draw_a
from cola_core.axes.parametrisations import SCALES
from cola_core.config.recipe import AllocateConfig
from cola_core.config.values import Gora
from cola_core.errors import UserError
from cola_core.gap import frank_wolfe_gap
from cola_core.knot import open_chain
from cola_core.models import adaptable, weight_shape
from cola_core.probe import probe
from cola_core.reduction import IMPORTANCE, Reducer
from cola_core.sampled import SampledGradient
from tests.lab import FAMILIES, FP64, PROFILE, base_of, initial_pairs, job_of, root_of, rows_of, start_of, task_of

ALLOCATE = AllocateConfig(allocator="gora", rank=4, r_min=2, r_max=8, features="sqrt")


def opened(family: str, folder: Path, loss: str = "answer") -> tuple[Any, dict[str, nn.Module]]:
    chain = root_of(family, folder)
    objective = open_chain(base_of(family), chain, task_of(family, loss), FP64)
    return objective, adaptable(objective.model)


def whole_gradients(objective: Any, modules: dict[str, nn.Module], rows: list[Any]) -> dict[str, torch.Tensor]:
    """Every mean gradient at once, out x in, by torch.autograd.grad on the loss of one batch."""
    weights = [module.weight.requires_grad_(True) for module in modules.values()]
    batch = objective.training_batch(rows)
    gradients = torch.autograd.grad(objective(batch) / objective.units(batch), weights)
    return {
        name: gradient.T if isinstance(module, Conv1D) else gradient
        for (name, module), gradient in zip(modules.items(), gradients, strict=True)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("examples", [1, 6])
@pytest.mark.parametrize(
    ("way", "micro_batch"), [("one_batch", 1), ("accumulate", 1), ("accumulate", 4), ("sampled", 4)]
)
def test_law_8_every_example_counts_once(
    family: str, examples: int, way: str, micro_batch: int, tmp_path: Path
) -> None:
    objective, modules = opened(family, tmp_path)
    rows = rows_of(family, examples)
    expected = whole_gradients(objective, modules, rows)
    config = PROFILE.model_copy(update={"probe": way, "micro_batch": micro_batch})
    found = probe(objective, rows, modules, {}, config, (7, 1))
    assert found.examples == examples
    assert list(found.modules) == list(modules), "in model order, though gradients come last layer first"
    for name, gradient in expected.items():
        a = draw_a(7, 1, name, min(8, *gradient.shape), gradient.shape[1])
        # Llama's and T5's norms are taken in float32 whatever the dtype, hence no closer than this.
        assert float((found.directions[name]["sketch"] - gradient @ a.T).norm()) <= 1e-6 * gradient.norm() + 1e-12
        if way != "sampled":  # there the norm is an estimate
            assert found.modules[name]["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampled_probe_with_all_rows_is_exact(family: str, tmp_path: Path) -> None:
    objective, modules = opened(family, tmp_path)
    rows = rows_of(family, 6)
    exact = probe(objective, rows, modules, {}, PROFILE, (7, 1)).modules
    config = PROFILE.model_copy(update={"probe": "sampled", "micro_batch": 4, "row_share": 1.0})
    found = probe(objective, rows, modules, {}, config, (7, 1)).modules
    for name, numbers in exact.items():
        assert found[name]["importance"] == pytest.approx(numbers["importance"], rel=1e-5, abs=1e-12)
        assert found[name]["gap"] == pytest.approx(numbers["gap"], rel=0.4, abs=1e-9)  # an estimate: a sketch of 8


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), share=st.sampled_from([0.125, 0.25, 0.5]))
def test_the_sampled_probe_estimates_importance_and_holds_only_its_rows(seed: int, share: float) -> None:
    """A gradient of low rank with rows of very different sizes, as models have; two micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(48, 64, bias=False)
    x, dy = torch.randn(40, 48, generator=generator), torch.randn(40, 64, generator=generator)
    dy *= torch.logspace(0, -1.5, 64)[torch.randperm(64, generator=generator)]
    config = PROFILE.model_copy(update={"probe": "sampled", "row_share": share})
    sampled = SampledGradient(Reducer({"m": module}, {}, config, (seed, 1)), "m")
    for part in (slice(0, 20), slice(20, 40)):
        sampled.add(x[part], dy[part])
    assert isinstance(sampled.part, torch.Tensor) and sampled.part.shape == (64 * share, 48)
    sampled.finish(1)
    exact = IMPORTANCE["mean_abs_wg"](module.weight.detach(), dy.T @ x)
    assert sampled.reduce.found["m"]["importance"] == pytest.approx(exact, rel=0.15 / math.sqrt(share))
    assert sampled.reduce.found["m"]["gradient_norm"] == pytest.approx(float((dy.T @ x).norm()), rel=0.6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gora_from_whole_gradients_in_float64(family: str, tmp_path: Path) -> None:
    """Ranks, A and B of the pipeline's own path against GoRA's equations on full matrices."""
    objective, modules = opened(family, tmp_path)
    rows = rows_of(family, 6)
    gradients = whole_gradients(objective, modules, rows)
    found = probe(objective, rows, modules, {}, PROFILE, (7, 1))
    importance = {}
    for name, module in modules.items():
        weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        importance[name] = np.abs(weight.numpy() * gradients[name].numpy()).mean()
    shapes = {name: weight_shape(module) for name, module in modules.items()}
    total = sum(importance.values())
    budget = sum(ALLOCATE.rank * math.sqrt(sum(shape)) for shape in shapes.values())
    ranks = {
        name: int(
            np.clip(round(budget * importance[name] / total / math.sqrt(sum(shapes[name]))), 2, min(8, *shapes[name]))
        )
        for name in shapes
    }
    result = allocate(Question(shapes, found.modules, ALLOCATE, 0, 1))
    assert result.ranks == ranks
    assert len(set(ranks.values())) > 1, "equal ranks everywhere would prove nothing"
    job = job_of(
        family,
        root_of(family, tmp_path),
        initialiser={"kind": "gora", "gamma": 0.05},
        scale="rslora",
        ranks=ranks,
        directions=found.directions,
    )
    for name, pair in initial_pairs(objective.model, job).items():
        a, g, r = pair.a.numpy(), gradients[name].numpy(), ranks[name]
        b = -(0.05 * math.sqrt(g.shape[1]) / 16.0) * g @ a.T @ np.linalg.inv(a @ a.T)
        np.testing.assert_allclose(pair.b.numpy(), b, atol=1e-9, rtol=1e-5)
        assert pair.scale == 16.0 / math.sqrt(r)
        projector = a.T @ np.linalg.pinv(a @ a.T) @ a
        step = -0.05 * math.sqrt(g.shape[1] / r) * g @ projector  # law 10
        np.testing.assert_allclose(pair.scale * pair.b.numpy() @ a, step, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_law_10_the_probe_loss_falls_for_small_gamma(family: str, tmp_path: Path) -> None:
    objective, modules = opened(family, tmp_path)
    rows = rows_of(family, 6)
    found = probe(objective, rows, modules, {}, PROFILE, (7, 1))
    for parameter in objective.model.parameters():
        parameter.requires_grad_(False)
    batch = objective.training_batch(rows)
    before = objective(batch).item()
    ranks = dict.fromkeys(modules, 4)
    for gamma in (1e-4, 1e-3):
        job = job_of(
            family, root_of(family, tmp_path), initialiser={"kind": "gora", "gamma": gamma}, scale="rslora",
            ranks=ranks, directions=found.directions,
        )  # fmt: skip
        attach(objective.model, initial_pairs(objective.model, job))
        assert objective(batch).item() < before
        detach(objective.model)
    assert objective(batch).item() == before


@settings(max_examples=40, deadline=None)
@given(out=st.integers(2, 12), columns=st.integers(4, 20), rank=st.integers(1, 4), seed=st.integers(0, 9),
       gamma=st.floats(1e-3, 1), way=st.sampled_from(sorted(SCALES)))  # fmt: skip
def test_law_10_holds_for_every_shape_and_scale(
    out: int, columns: int, rank: int, seed: int, gamma: float, way: str
) -> None:
    gradient = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a_max = draw_a(seed, 1, "m", 4, columns)
    scale = SCALES[way](16.0, rank)
    start = start_of(gradient, rank, scale, {"sketch": gradient @ a_max.T}, seed)
    first = INITIALISERS["gora"](start, Gora(kind="gora", gamma=gamma))
    a, b = first.a, first.b
    projector = a.T @ torch.linalg.solve(a @ a.T, a)
    expected = -gamma * math.sqrt(columns / rank) * gradient @ projector
    torch.testing.assert_close(scale * b @ a, expected, atol=1e-8, rtol=1e-6)


def test_gora_step_has_the_norm_of_gamma_for_gaussian_gradients() -> None:
    """GoRA's own account: ||s B A|| / ||G|| = gamma within 3 %, cos(B A, -G) = sqrt(r / in), for every rank."""
    gradient = torch.randn(256, 512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sketch = gradient @ draw_a(0, 1, "m", 64, 512).T
    for rank in (4, 16, 64):
        start = start_of(gradient, rank, 16 / math.sqrt(rank), {"sketch": sketch})
        first = INITIALISERS["gora"](start, Gora(kind="gora", gamma=0.05))
        step = 16 / math.sqrt(rank) * first.b @ first.a
        assert float(step.norm() / gradient.norm()) == pytest.approx(0.05, rel=0.03)
        cosine = -float((step * gradient).sum() / step.norm() / gradient.norm())
        assert cosine == pytest.approx(math.sqrt(rank / 512), rel=0.03)


def test_kaiming_starts_from_zero_with_bounded_a() -> None:
    first, other = (INITIALISERS["kaiming"](start_of(torch.zeros(8, 16), 4, 2.0, link=k), None) for k in (1, 2))
    assert not first.b.any()
    assert float(first.a.abs().max()) <= 0.25
    assert float(first.a.std()) == pytest.approx(0.25 / math.sqrt(3), rel=0.2)
    assert not torch.equal(first.a, other.a), "every link draws its own A"


def test_adaptive_probe_stops_early_and_says_how_much_it_used(tmp_path: Path) -> None:
    objective, modules = opened("llama", tmp_path)
    rows = rows_of("llama", 1) * 12  # the same row again and again: nothing can move after the first
    config = PROFILE.model_copy(update={"probe": "accumulate", "adaptive": True})
    assert probe(objective, rows, modules, {}, config, (7, 1)).examples == 4


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    objective, modules = opened("llama", tmp_path)
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        modules[name].weight[0, 0] = math.nan
    with pytest.raises(UserError, match="is not finite"):
        probe(objective, rows_of("llama", 2), modules, {}, PROFILE, (7, 1))


@pytest.mark.parametrize("name", sorted(IMPORTANCE))
def test_importance_against_numpy(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w, g = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = {
        "mean_abs_wg": np.abs((w * g).numpy()).mean(),
        "nuclear_wg": np.linalg.norm((w * g).numpy(), "nuc"),
        "nuclear_g": np.linalg.norm(g.numpy(), "nuc"),
    }
    assert IMPORTANCE[name](w, g) == pytest.approx(expected[name])


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 60), columns=st.integers(1, 60), decay=st.floats(0.3, 0.99), seed=st.integers(0, 99))
@example(out=60, columns=60, decay=1.0, seed=0)  # singular values close to each other ask for the most rounds
def test_the_largest_singular_value_is_found_without_a_decomposition(
    out: int, columns: int, decay: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(out, columns, generator=generator) * decay ** torch.arange(columns)
    largest = float(torch.linalg.svdvals(matrix.double())[0])
    assert frank_wolfe_gap(matrix, [], 2.0)["gap"] == pytest.approx(2 * largest, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), radius=st.floats(0.1, 10), links=st.integers(0, 3))
def test_frank_wolfe_gap_is_the_maximum_over_the_ball(seed: int, radius: float, links: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gradient = draw(6, 9)
    pairs = [Pair(draw(2, 9) * 0.1, draw(6, 2) * 0.1, 1.5) for _ in range(links)]
    moved = sum((p.scale * p.b @ p.a for p in pairs), torch.zeros(6, 9, dtype=torch.float64))
    found = frank_wolfe_gap(gradient, pairs, radius)
    u, _, v = torch.linalg.svd(gradient)
    oracle = -radius * torch.outer(u[:, 0], v[0])
    assert found["gap"] == pytest.approx(float((gradient * (moved - oracle)).sum()), rel=1e-9)
    assert found["update_nuclear_norm"] == pytest.approx(float(torch.linalg.svdvals(moved).sum()), abs=1e-9)
    assert found["gap_valid"] == (found["update_nuclear_norm"] <= radius)
    if found["gap_valid"]:
        assert found["gap"] >= 0
    for _ in range(5):  # no other point of the ball does better
        point = draw(6, 9)
        point *= radius / float(torch.linalg.svdvals(point).sum())
        assert float((gradient * (moved - point)).sum()) <= found["gap"] + 1e-9
