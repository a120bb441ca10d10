"""Updates that penalise, threshold or look around, against float64 reimplementations and torch's own AdamW."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import Parameter

from cola_core.adapters import LoRA, Pair
from cola_core.axes.parametrisations import PARAMETRISATIONS
from cola_core.axes.updates import build_optimizer
from cola_core.config.recipe import LinkConfig
from cola_core.links import run_link
from cola_core.optimizers.penalised import hard_masks, soft_threshold
from tests.lab import FP64, LINK, root_of
from tests.points import job_at

Trained = list[tuple[str, str, Parameter]]
values = st.floats(-3, 3, allow_nan=False)


def config_of(update: Any, **more: Any) -> LinkConfig:
    return LinkConfig(**{**LINK.model_dump(), "update": update, "weight_decay": 0.0, **more})


def trained(seed: int = 0) -> Trained:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (2, 5), "B": (4, 2), "gate": (2,), "head": (3,)}
    return [
        (f"m.{role}", role, Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)))
        for role, shape in shapes.items()
    ]


def adam(parameters: Trained, config: LinkConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p], "lr": config.head_learning_rate if role == "head" else config.learning_rate}
        for _, role, p in parameters
    ]
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, betas=betas, eps=config.epsilon, weight_decay=config.weight_decay)


def quadratic(parameters: Trained) -> torch.Tensor:
    return sum(((k + 1) * (p - 0.3 * k) ** 2).sum() for k, (_, _, p) in enumerate(parameters))  # type: ignore[return-value]


def equal(one: Trained, two: Trained) -> None:
    for (name, _, a), (_, _, b) in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0, msg=name)


def test_a_penalty_is_part_of_the_loss_and_passes_through_adam() -> None:
    config = config_of({"kind": "penalised", "l2": 0.7})
    ours, theirs = trained(), trained()
    optimizer, reference = build_optimizer(ours, config), adam(theirs, config)
    for _ in range(5):
        for parameters, step in ((ours, optimizer), (theirs, reference)):
            loss = quadratic(parameters)
            if parameters is theirs:
                loss = loss + 0.35 * sum(p.square().sum() for _, role, p in parameters if role in "AB")
            step.zero_grad()
            loss.backward()
            step.step()
    equal(ours, theirs)
    assert float((ours[1][2] - adam_only()[1][2]).abs().max()) > 1e-4, "the penalty moved nothing"


def adam_only() -> Trained:
    config, parameters = config_of("adamw"), trained()
    optimizer = adam(parameters, config)
    for _ in range(5):
        optimizer.zero_grad()
        quadratic(parameters).backward()
        optimizer.step()
    return parameters


@given(st.lists(values, min_size=1, max_size=6), st.floats(0, 2))
def test_the_soft_threshold_is_the_minimiser_it_stands_for(gates: list[float], threshold: float) -> None:
    g = torch.tensor(gates, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    cost = (grid[None] - g[:, None]) ** 2 / 2 + threshold * grid[None].abs()
    torch.testing.assert_close(soft_threshold(g, threshold), grid[cost.argmin(1)], atol=1.1e-3, rtol=0)


@given(st.lists(values, min_size=1, max_size=6), st.floats(0.01, 2))
def test_the_official_masks_zero_twice_the_threshold_and_shrink_the_rest(gates: list[float], threshold: float) -> None:
    expected = []
    for g in gates:  # the released code, one number at a time
        g = g - threshold if g > threshold else g
        g = g + threshold if g < -threshold else g
        expected.append(0.0 if abs(g) < threshold else g)
    found = hard_masks(torch.tensor(gates, dtype=torch.float64), threshold)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize(("rule", "l1"), [("soft", 0.0), ("official", 6.0)])
def test_gates_alone_are_thresholded_after_adams_step(rule: str, l1: float) -> None:
    config = config_of({"kind": "proximal", "threshold": 0.01, "rule": rule, "l1": l1}, learning_rate=0.05)
    ours, theirs = trained(), trained()
    optimizer, reference = build_optimizer(ours, config), adam(theirs, config)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] / (step + 1)
        for group, told in zip(reference.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = told["lr"]
        optimizer.zero_grad()
        quadratic(ours).backward()
        optimizer.step()
        reference.zero_grad()
        gate = theirs[2][2]
        (quadratic(theirs) + l1 * gate.abs().sum() / 2).backward()
        reference.step()
        with torch.no_grad():
            rate = 0.05 / (step + 1)
            shrunk = gate.sign() * (gate.abs() - rate * 0.01).clamp_min(0)
            gate.copy_(shrunk if rule == "soft" else hard_masks(gate, 0.01))
    equal(ours, theirs)


def layer_of(seed: int = 0, frozen: str = "") -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(6, 4, dtype=torch.float64)
    with torch.no_grad():
        base.weight.copy_(torch.randn(4, 6, generator=generator, dtype=torch.float64))
    base.requires_grad_(False)
    a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 6), (4, 2)))
    layer = LoRA(base, Pair(a, b, 0.5))
    PARAMETRISATIONS[frozen or "plain"].prepare(layer, None, 0)
    return layer


@pytest.mark.parametrize("frozen", ["", "frozen_a", "frozen_b"])
def test_ggpos_noise_follows_weights_and_last_gradients_row_by_row(frozen: str) -> None:
    layer, x = layer_of(frozen=frozen), torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)
    config = config_of({"kind": "lora_ggpo", "sigma": 0.3, "beta": 0.2})
    parameters = [(f"m.{n}", n, p) for n, p in layer.named_parameters(recurse=False) if p.requires_grad]
    optimizer: Any = build_optimizer(parameters, config, {"m": layer})
    with optimizer.around():
        assert layer.noise is None, "no gradient is known before the first step"
        layer(x).square().sum().backward()
    whole = torch.zeros(4, 6, dtype=torch.float64)
    if layer.A.grad is not None:
        whole += 0.5 * layer.B.detach() @ layer.A.grad
    if layer.B.grad is not None:
        whole += 0.5 * layer.B.grad @ layer.A.detach()
    optimizer.step()
    pair = 0.5 * layer.B.detach() @ layer.A.detach()
    rows = layer.weight.norm(dim=1).mean() ** 2 + pair.norm(dim=1) ** 2
    expected = (0.3 * rows.sqrt() + 0.2 * whole.norm(dim=1) ** 2) / math.sqrt(4)
    with optimizer.around():
        torch.testing.assert_close(layer.noise, expected)
        torch.manual_seed(0)
        noisy = torch.stack([layer(x) for _ in range(20000)]).detach()
    assert layer.noise is None, "a validation has no noise"
    clean = layer(x).detach()
    torch.testing.assert_close(noisy.mean(0), clean, atol=0.03 * float(expected.max()) * 3, rtol=0)
    torch.testing.assert_close(noisy.std(0), x.norm(dim=1)[:, None] * expected, rtol=0.03, atol=0)


def test_without_noise_ggpo_is_adamw(tmp_path: Path) -> None:
    chain = root_of("llama", tmp_path)
    silent = {"kind": "lora_ggpo", "sigma": 0.0, "beta": 0.0}
    losses = [
        [event["loss"] for event in run_link(job_at("llama", chain, {"update": update}, machine=FP64))[2].losses]
        for update in ("adamw", silent, {**silent, "sigma": 0.3})
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12) and losses[0][-1] != pytest.approx(losses[2][-1], abs=1e-4)


@pytest.mark.parametrize("rho", [0.0, 0.4])
def test_mgpo_takes_its_gradient_a_step_up_the_momentum(rho: float) -> None:
    config = config_of({"kind": "lora_mgpo", "rho": rho, "smoothing": 0.9}, learning_rate=0.05)
    ours, theirs = trained(), trained()
    optimizer: Any = build_optimizer(ours, config)
    reference, sizes = adam(theirs, config), list[float]()
    for step in range(6):
        before = [p.detach().clone() for _, _, p in ours]
        with optimizer.around():
            optimizer.zero_grad()
            quadratic(ours).backward()
        assert all(torch.equal(old, p) for old, (_, _, p) in zip(before, ours, strict=True)), "put back to the bit"
        optimizer.step()
        held = [p.detach().clone() for _, _, p in theirs]
        if step:
            momenta = [reference.state[p]["exp_avg"] for _, _, p in theirs]
            weights = [0.9 ** (len(sizes) - 1 - k) for k in range(len(sizes))]
            average = sum(w * s for w, s in zip(weights, sizes, strict=True)) / sum(weights)
            length = math.sqrt(sum(float(m.square().sum()) for m in momenta))
            with torch.no_grad():
                for (_, _, p), m in zip(theirs, momenta, strict=True):
                    p.add_(rho * sizes[-1] / average * m / length)
        reference.zero_grad()
        quadratic(theirs).backward()
        sizes.append(math.sqrt(sum(float(p.grad.square().sum()) for _, _, p in theirs)))  # type: ignore[union-attr]
        with torch.no_grad():
            for (_, _, p), old in zip(theirs, held, strict=True):
                p.copy_(old)
        reference.step()
    equal(ours, theirs)


def test_what_stops_mgpo_on_its_way_finds_every_parameter_put_back() -> None:
    """Training keeps a checkpoint of what it then finds (law 7)."""
    ours = trained()
    optimizer: Any = build_optimizer(ours, config_of({"kind": "lora_mgpo", "rho": 0.4, "smoothing": 0.9}))
    quadratic(ours).backward()
    optimizer.step()
    last, before = ours[-1][2], [p.detach().clone() for _, _, p in ours]
    optimizer.state[last]["exp_avg"] = optimizer.state[last]["exp_avg"].new_zeros(2, 3, 5, 7)
    with pytest.raises(RuntimeError, match="must match the size"), optimizer.around():  # it breaks off at the last sum
        pass
    assert len(ours) > 1 and all(torch.equal(old, p) for old, (_, _, p) in zip(before, ours, strict=True))
