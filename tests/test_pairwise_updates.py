"""LoRA-Pro and LoRA-RITE, which step A and B of a module together, against closed forms and their invariances."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.linalg import eigvalsh, lstsq, matrix_norm, pinv
from torch.nn import Parameter

from cola_core.axes.updates import build_optimizer
from cola_core.chain import write_link
from cola_core.config.params import check_params
from cola_core.config.recipe import LinkConfig
from cola_core.config.training_values import LoraPro
from cola_core.errors import UserError
from cola_core.lineage import read_chain
from cola_core.links import run_link
from cola_core.optimizers.lora_pro import MODES, directions, equivalent
from cola_core.optimizers.lora_rite import escaped, transported
from tests.lab import FAMILIES, FP32, LINK, job_of, root_of
from tests.points import resumes

PRO = {mode: {"kind": "lora_pro", "mode": mode} for mode in ("efficient", "full")}
RITE = {"kind": "lora_rite", "skip": 1.0, "clip": 1.0, "cutoff": 0.01, "escape": False}
EVERY = {
    "efficient": {"update": PRO["efficient"]},
    "full": {"update": PRO["full"], "learning_rate": 1e-3},
    "rite": {"update": RITE, "learning_rate": 1e-3, "clip": None, "epsilon": 1e-6},
    "rite, escape": {"update": {**RITE, "escape": True}, "learning_rate": 1e-3, "clip": None, "epsilon": 1e-6},
}
SEEDS = st.integers(0, 10**6)
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)).map(lambda n: (n[0], n[1], min(n)))
SCALES = st.floats(0.1, 8.0)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tame(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """A random matrix of full rank whose singular values lie in [0.5, 2]: no test of rounding."""
    u, _, v = torch.linalg.svd(normal(generator, rows, columns), full_matrices=False)
    spread = 0.5 + 1.5 * torch.rand(len(v), generator=generator, dtype=torch.float64)
    return u * spread @ v


def drawn(size: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """A (r x in), B (out x r), G (out x in)."""
    (out, into, rank), generator = size, torch.Generator().manual_seed(seed)
    return tame(generator, rank, into), tame(generator, out, rank), normal(generator, out, into), generator


def walk(
    pairs: dict[str, tuple[Tensor, Tensor, float]], gradients: list[dict[str, Tensor]], order: int = 1, **changes: Any
) -> tuple[dict[str, list[Tensor]], dict[str, tuple[Parameter, Parameter]]]:
    """Steps of the project's optimizer at module -> (A, B, s), each with gradients G of W that it does not see.

    Returns:
        module -> s B A after every step; module -> A and B.
    """
    mine = {n: (Parameter(a.clone()), Parameter(b.clone())) for n, (a, b, _) in pairs.items()}
    config = LinkConfig(**{**LINK.model_dump(), "weight_decay": 0.0, "learning_rate": 0.01, **changes})
    twice = config.model_copy(update={"learning_rate": 2 * config.learning_rate})
    named = [(f"{n}.{role}", role, p) for n, both in mine.items() for role, p in zip("AB", both, strict=True)]
    layers: Any = {n: SimpleNamespace(scale=s) for n, (_, _, s) in pairs.items()}
    optimizer = build_optimizer(named[::order], twice, layers)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] / 2  # as the trainer does, whose schedule changes it
    path: dict[str, list[Tensor]] = {n: [] for n in pairs}
    for step in gradients:
        for name, g in step.items():
            (a, b), s = mine[name], pairs[name][2]
            a.grad, b.grad = s * b.detach().T @ g.to(b.dtype), s * g.to(a.dtype) @ a.detach().T
        optimizer.step()
        optimizer.zero_grad()
        for name, (a, b) in mine.items():
            path[name].append((pairs[name][2] * b @ a).detach())
    return path, mine


def steps_of(gradients: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"m": g} for g in gradients]


@given(SIZES, SCALES, SEEDS)
@settings(deadline=None)
def test_the_equivalent_gradient_is_a_projection_of_the_gradient_whatever_x_is(
    size: tuple[int, int, int], scale: float, seed: int
) -> None:
    a, b, g, generator = drawn(size, seed)
    p_b, p_a = b @ pinv(b), pinv(a) @ a
    wanted = p_b @ g + g @ p_a - p_b @ g @ p_a
    for nearest in (False, True):
        h_a, h_b = directions(a, b, scale * b.T @ g, scale * g @ a.T, scale, nearest, ridge=0.0)
        x = normal(generator, len(a), len(a))
        for more in (0.0, 1.0):
            found = equivalent(a, b, h_a + more * x @ a, h_b - more * b @ x, scale)
            torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
    ridged = directions(a, b, scale * b.T @ g, scale * g @ a.T, scale)
    assert matrix_norm(equivalent(a, b, *ridged, scale) - wanted) <= 1e-4 * matrix_norm(g)


@given(SIZES, SCALES, SEEDS)
@settings(deadline=None)
def test_no_other_steps_of_a_and_b_come_nearer_to_the_gradient(
    size: tuple[int, int, int], scale: float, seed: int
) -> None:
    a, b, g, _ = drawn(size, seed)
    eye_in, eye_out = torch.eye(a.shape[1]).double(), torch.eye(len(b)).double()
    columns = [torch.einsum("or,ij->oirj", b, eye_in), torch.einsum("op,ri->oipr", eye_out, a)]  # of hA, of hB
    both = scale * torch.cat([c.reshape(g.numel(), -1) for c in columns], dim=1)
    best = both @ lstsq(both, g.reshape(-1, 1), driver="gelsd").solution
    h_a, h_b = directions(a, b, scale * b.T @ g, scale * g @ a.T, scale, ridge=0.0)
    torch.testing.assert_close(equivalent(a, b, h_a, h_b, scale), best.reshape(g.shape), atol=1e-8, rtol=0)


@given(SIZES, SCALES, SEEDS)
@settings(deadline=None)
def test_x_solves_its_sylvester_equation_and_brings_the_steps_nearest_to_the_gradients(
    size: tuple[int, int, int], scale: float, seed: int
) -> None:
    a, b, g, generator = drawn(size, seed)
    g_a, g_b = scale * b.T @ g, scale * g @ a.T
    plain_a, plain_b = directions(a, b, g_a, g_b, scale, nearest=False, ridge=0.0)
    h_a, h_b = directions(a, b, g_a, g_b, scale, ridge=0.0)
    x = (h_a - plain_a) @ pinv(a)
    torch.testing.assert_close(h_b, plain_b - b @ x, atol=1e-8, rtol=1e-8)
    right = -pinv(b.T @ b) @ g_a @ a.T / scale**2
    torch.testing.assert_close(b.T @ b @ x + x @ a @ a.T, right, atol=1e-8, rtol=1e-8)

    def distance(x: Tensor) -> float:
        return float((plain_a + x @ a - g_a).square().sum() + (plain_b - b @ x - g_b).square().sum())

    aside = normal(generator, *x.shape)
    assert max(distance(x), 1e-12) < min(distance(x + 1e-2 * aside), distance(x - 1e-2 * aside))


def test_a_factor_that_is_zero_stands_still_for_one_step() -> None:
    a, _, g, _ = drawn((7, 5, 2), 0)
    b = torch.zeros(7, 2, dtype=torch.float64)
    h_a, h_b = directions(a, b, 3 * b.T @ g, 3 * g @ a.T, 3.0)
    assert not h_a.any()
    torch.testing.assert_close(h_b, g @ pinv(a) / 3, atol=1e-5, rtol=0)
    h_a, h_b = directions(b.T, a.T, 3 * a @ g.T, 3 * g.T @ b, 3.0)
    assert not h_b.any()
    torch.testing.assert_close(h_a, pinv(a).T @ g.T / 3, atol=1e-5, rtol=0)
    both = directions(b.T, b, torch.zeros(2, 7).double(), torch.zeros(7, 2).double(), 3.0)
    assert not both[0].any() and not both[1].any()


def nearest_steps(a: Tensor, b: Tensor, g: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """The closed form once more, from G itself, X by a linear system of r^2 unknowns."""
    ga, gb, rank = s * b.T @ g, s * g @ a.T, len(a)
    ha = pinv(b.T @ b) @ ga / s**2
    hb = (torch.eye(len(b)).double() - b @ pinv(b)) @ gb @ pinv(a @ a.T) / s**2
    eye = torch.eye(rank, dtype=torch.float64)
    system = torch.kron(b.T @ b, eye) + torch.kron(eye, a @ a.T)
    x = (pinv(system) @ (-ha @ a.T).reshape(-1)).reshape(rank, rank)
    return ha + x @ a, hb - b @ x


@pytest.mark.parametrize("start", ["B = 0", "B random"])
def test_full_mode_is_adam_on_the_equivalent_gradient_brought_back_to_the_factors(start: str) -> None:
    a, b, _, generator = drawn((9, 8, 3), 1)
    b = b if start == "B random" else torch.zeros_like(b)
    gradients = [normal(generator, 9, 8) for _ in range(5)]
    changes = {"betas": [0.7, 0.95], "epsilon": 1e-3, "weight_decay": 0.1}
    path, _ = walk({"m": (a, b, 2.5)}, steps_of(gradients), update=PRO["full"], **changes)
    m, v = torch.zeros(9, 8).double(), torch.zeros(9, 8).double()
    for t, g in enumerate(gradients, start=1):
        p_b, p_a = b @ pinv(b), pinv(a) @ a
        seen = p_b @ g + g @ p_a - p_b @ g @ p_a
        m, v = 0.7 * m + 0.3 * seen, 0.95 * v + 0.05 * seen**2
        adam = m / (1 - 0.7**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-3)
        ha, hb = nearest_steps(a, b, adam, 2.5)
        a, b = a * (1 - 0.01 * 0.1) - 0.01 * ha, b * (1 - 0.01 * 0.1) - 0.01 * hb
        torch.testing.assert_close(path["m"][t - 1], 2.5 * b @ a, atol=1e-6, rtol=0)


def test_efficient_mode_is_adamw_on_the_nearest_steps() -> None:
    a, b, _, generator = drawn((9, 8, 3), 2)
    gradients = [normal(generator, 9, 8) for _ in range(5)]
    changes = {"betas": [0.7, 0.95], "epsilon": 1e-3, "weight_decay": 0.1}
    path, _ = walk({"m": (a, b, 2.5)}, steps_of(gradients), update=PRO["efficient"], **changes)
    mine = [a, b]
    first, second = [torch.zeros_like(p) for p in mine], [torch.zeros_like(p) for p in mine]
    for t, g in enumerate(gradients, start=1):
        for i, h in enumerate(nearest_steps(*mine, g, 2.5)):
            first[i], second[i] = 0.7 * first[i] + 0.3 * h, 0.95 * second[i] + 0.05 * h**2
            adam = first[i] / (1 - 0.7**t) / ((second[i] / (1 - 0.95**t)).sqrt() + 1e-3)
            mine[i] = mine[i] * (1 - 0.01 * 0.1) - 0.01 * adam
        torch.testing.assert_close(path["m"][t - 1], 2.5 * mine[1] @ mine[0], atol=3e-6, rtol=0)


@given(SEEDS)
@settings(deadline=None, max_examples=30)
def test_where_a_is_square_full_mode_takes_the_steps_that_adam_takes_at_w(seed: int) -> None:
    """P_A = I, so the equivalent gradient is the gradient; what remains is the product of two steps, lr^2."""
    a, b, _, generator = drawn((6, 4, 4), seed)
    gradients, rate = [normal(generator, 6, 4) for _ in range(3)], 1e-6
    changes = {"learning_rate": rate, "betas": [0.7, 0.95], "epsilon": 1e-8, "update": PRO["full"]}
    path, _ = walk({"m": (a, b, 0.7)}, steps_of(gradients), **changes)
    w = Parameter(0.7 * b @ a)
    adam = torch.optim.AdamW([w], lr=rate, betas=(0.7, 0.95), eps=1e-8, weight_decay=0.0)
    before = w.detach().clone()
    for g, now in zip(gradients, path["m"], strict=True):
        w.grad = g
        adam.step()
        torch.testing.assert_close((now - before) / rate, (w.detach() - before) / rate, atol=1e-2, rtol=0)


@given(SIZES, SCALES, SEEDS)
@settings(deadline=None)
def test_the_first_order_step_of_w_depends_on_nothing_but_b_times_a_and_on_no_scale(
    size: tuple[int, int, int], scale: float, seed: int
) -> None:
    """(B R, R^-1 A), and a doubled scale with B halved, are the same W with the same equivalent gradient."""
    a, b, g, generator = drawn(size, seed)
    r = tame(generator, len(a), len(a))

    def seen(a: Tensor, b: Tensor, s: float) -> Tensor:
        return equivalent(a, b, *directions(a, b, s * b.T @ g, s * g @ a.T, s, ridge=0.0), s)

    wanted = seen(a, b, scale)
    torch.testing.assert_close(seen(pinv(r) @ a, b @ r, scale), wanted, atol=1e-8, rtol=0)
    torch.testing.assert_close(seen(a, b / 2, 2 * scale), wanted, atol=1e-8, rtol=0)


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_full_modes_path_of_w_is_the_same_for_every_turn_of_the_factors(seed: int) -> None:
    """Of (B Q, Q^T A) for an orthogonal Q alone: X looks at the sizes of A and B, and enters in the second order."""
    a, b, _, generator = drawn((7, 6, 3), seed)
    gradients = steps_of([normal(generator, 7, 6) for _ in range(4)])
    turn = torch.linalg.qr(normal(generator, 3, 3))[0]
    one, _ = walk({"m": (a, b, 2.0)}, gradients, update=PRO["full"])
    two, _ = walk({"m": (turn.T @ a, b @ turn, 2.0)}, gradients, update=PRO["full"])
    for here, there in zip(one["m"], two["m"], strict=True):
        torch.testing.assert_close(here, there, atol=1e-6, rtol=0)


@pytest.mark.parametrize("escape", [False, True])
@given(seed=SEEDS)
@settings(deadline=None, max_examples=25)
def test_rites_path_of_w_is_the_same_for_all_factors_of_one_product(escape: bool, seed: int) -> None:
    a, b, _, generator = drawn((7, 6, 3), seed)
    c, d, _, _ = drawn((5, 8, 2), seed + 1)
    gradients = [{"m": normal(generator, 7, 6), "n": normal(generator, 5, 8)} for _ in range(5)]
    r, q = (3 * tame(generator, n, n) for n in (3, 2))
    update = {**RITE, "cutoff": 1e-9, "clip": 0.5, "skip": 9.0, "escape": escape}
    one, _ = walk({"m": (a, b, 2.0), "n": (c, d, 0.5)}, gradients, update=update)
    two, (mine) = walk({"m": (pinv(r) @ a, b @ r, 2.0), "n": (pinv(q) @ c, d @ q, 0.5)}, gradients, update=update)
    for name in ("m", "n"):
        assert (one[name][-1] - one[name][0]).norm() > 0.02, "nothing moved: the test would pass empty"
        for here, there in zip(one[name], two[name], strict=True):
            torch.testing.assert_close(here, there, atol=1e-8, rtol=0)
    assert not torch.allclose(mine["m"][0], a)


def root_of_gram(x: Tensor, power: float) -> Tensor:
    """(x^T x)^power by the singular values of x."""
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    return v.T * s ** (2 * power) @ v


def polar_rite(
    pairs: dict[str, tuple[Tensor, Tensor, float]], gradients: list[dict[str, Tensor]], update: dict[str, Any]
) -> dict[str, list[Tensor]]:
    """LoRA-RITE once more, r x in and out x r as the papers write them, in the bases of polar decompositions."""
    (one, two), eps, rate, decay = (0.8, 0.9), 1e-3, 0.01, 0.1
    mine = {n: (a, b, s) for n, (a, b, s) in pairs.items()}
    state: dict[tuple[str, str], Any] = {}
    path: dict[str, list[Tensor]] = {n: [] for n in pairs}
    for t, step in enumerate(gradients, start=1):
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in (one, two))
        bars = {}
        for n, g in step.items():
            a, b, s = mine[n]
            bars[n, "A"] = root_of_gram(b, -0.5) @ (s * b.T @ g)  # R_B^-T gA
            bars[n, "B"] = (s * g @ a.T) @ root_of_gram(a.T, -0.5)  # gB R_A^-1
        for key, bar in bars.items():
            if bar.square().mean().sqrt() > update["skip"]:
                bars[key] = torch.zeros_like(bar)
        norm = math.sqrt(sum(float(bar.square().sum()) for bar in bars.values()))
        bars = {key: bar / max(1.0, norm / update["clip"]) for key, bar in bars.items()}
        for n in step:
            a, b, s = mine[n]
            steps = []
            for role, partner in (("A", b), ("B", a.T)):
                q = partner @ root_of_gram(partner, -0.5)
                bar = bars[n, role] if role == "A" else bars[n, role].T
                old_q, v, m, rho = state.get((n, role), (q, torch.zeros(len(a), len(a)).double(), 0 * bar, 0.0))
                p = q.T @ old_q
                moved = p @ v @ p.T
                lost = min(float((eigvalsh(v) - eigvalsh(moved)).max()), float(v.trace() - moved.trace()))
                rho = b2 * (rho + max(0.0, lost)) if update["escape"] else 0.0
                v = b2 * moved + (1 - b2) * bar @ bar.T / bar.shape[1]
                values, vectors = torch.linalg.eigh(v)
                m = b1 * p @ m + (1 - b1) * vectors @ (vectors.T @ bar / ((values + rho).sqrt() + eps)[:, None])
                state[n, role] = (q, v, m, rho)
                steps.append(root_of_gram(partner, -0.5) @ m)
            mine[n] = (
                a * (1 - rate * decay) - rate * steps[0],
                b * (1 - rate * decay) - rate * steps[1].T,
                s,
            )
            path[n].append(mine[n][2] * mine[n][1] @ mine[n][0])
    return path


@pytest.mark.parametrize("escape", [False, True])
@pytest.mark.parametrize(("skip", "clip"), [(9.0, 9.0), (9.0, 0.5), (1.5, 2.0)])
def test_rite_in_the_bases_of_polar_decompositions_is_the_same(escape: bool, skip: float, clip: float) -> None:
    (a, b, _, generator), (c, d, _, _) = drawn((7, 6, 3), 3), drawn((5, 8, 2), 4)
    pairs = {"m": (a, b, 2.0), "n": (c, d, 0.5)}
    gradients = [{"m": normal(generator, 7, 6), "n": normal(generator, 5, 8)} for _ in range(6)]
    update = {"kind": "lora_rite", "skip": skip, "clip": clip, "cutoff": 1e-9, "escape": escape}
    changes = {"betas": [0.8, 0.9], "epsilon": 1e-3, "weight_decay": 0.1}
    path, _ = walk(pairs, gradients, update=update, **changes)
    for name, wanted in polar_rite(pairs, gradients, update).items():
        for here, there in zip(path[name], wanted, strict=True):
            torch.testing.assert_close(here, there, atol=1e-9, rtol=0)


def test_rites_first_step_from_b_zero_moves_b_alone_by_a_matrix_of_equal_singular_values() -> None:
    a, _, g, _ = drawn((9, 8, 3), 5)
    zero = torch.zeros(9, 3, dtype=torch.float64)
    update = {**RITE, "skip": None}
    _, mine = walk({"m": (a, zero, 2.0)}, steps_of([g, g]), update=update, epsilon=1e-12)
    assert not torch.allclose(mine["m"][0], a), "A moves from the second step on"
    path, mine = walk({"m": (a, zero, 2.0)}, steps_of([g]), update=update, epsilon=1e-12, learning_rate=0.03)
    assert torch.equal(mine["m"][0], a)
    u, _, v = torch.linalg.svd(g @ pinv(a) @ a, full_matrices=False)
    wanted = -2.0 * 0.03 * math.sqrt(9) * u[:, :3] @ v[:3]  # s lr sqrt(out) times the orthogonal factor of G P_A
    torch.testing.assert_close(path["m"][0], wanted, atol=1e-8, rtol=0)


def test_second_moments_keep_their_spectrum_in_a_turn_and_lose_it_to_new_directions() -> None:
    generator = torch.Generator().manual_seed(6)
    turn = torch.linalg.qr(normal(generator, 3, 3))[0]
    v = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    turned = transported(v, turn)
    torch.testing.assert_close(turned, turn @ v @ turn.T)
    torch.testing.assert_close(eigvalsh(turned), eigvalsh(v))
    assert escaped(turned, v) == pytest.approx(0, abs=1e-12)
    shrunk = torch.diag(torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64))  # of the first direction, half the length
    lost = transported(v, shrunk)  # eigenvalues 4, 2, 1 -> 1, 2, 1: sorted, they fall by 2, 1, 0, and the trace by 3
    assert escaped(lost, v) == pytest.approx(2)
    assert escaped(v, lost) == 0, "what is gained has not escaped"
    flat = torch.eye(3, dtype=torch.float64)
    assert escaped(torch.diag(torch.tensor([0.5, 1.4, 1.0], dtype=torch.float64)), flat) == pytest.approx(0.1)


def test_a_factor_whose_gradient_is_out_of_all_measure_is_skipped_alone() -> None:
    (a, b, _, generator), (c, d, _, _) = drawn((7, 6, 3), 7), drawn((5, 8, 2), 8)
    gradients = [{"m": 1e3 * normal(generator, 7, 6), "n": normal(generator, 5, 8)}]
    pairs = {"m": (a, b, 1.0), "n": (c, d, 1.0)}
    skipped, _ = walk(pairs, gradients, update={**RITE, "skip": 10.0})
    torch.testing.assert_close(skipped["m"][0], b @ a)
    assert (skipped["n"][0] - d @ c).norm() > 0.01
    free, _ = walk(pairs, gradients, update={**RITE, "skip": None, "clip": None})
    assert (free["m"][0] - b @ a).norm() > 0.01


def test_a_direction_below_the_cutoff_stands_still_in_the_other_factor() -> None:
    a, _, g, generator = drawn((9, 8, 2), 9)
    q = torch.linalg.qr(normal(generator, 9, 2))[0]
    b = q * torch.tensor([1.0, 1e-3], dtype=torch.float64)
    _, cut = walk({"m": (a, b, 1.0)}, steps_of([g]), update={**RITE, "skip": 9.0})
    _, whole = walk({"m": (a, b, 1.0)}, steps_of([g]), update={**RITE, "skip": 9.0, "cutoff": 1e-4})
    torch.testing.assert_close(cut["m"][0][1].detach(), a[1], atol=1e-12, rtol=0)
    assert (whole["m"][0][1] - a[1]).norm() > 1


@pytest.mark.parametrize("name", EVERY)
def test_what_is_no_factor_trains_by_adamw_and_factors_are_paired_by_name(name: str) -> None:
    changes = EVERY[name]
    config = LinkConfig(**{**LINK.model_dump(), **changes})
    (a, b, g, _), (c, d, h, _) = drawn((7, 6, 3), 10), drawn((7, 6, 3), 11)
    pairs, step = {"m": (a, b, 2.0), "n": (c, d, 0.5)}, [{"m": g, "n": h}]
    forwards, backwards = (walk(pairs, step * 3, order, **changes)[0] for order in (1, -1))
    alone, _ = walk({"m": pairs["m"]}, steps_of([g] * 3), **{**changes, "clip": None})
    for module in pairs:
        torch.testing.assert_close(forwards[module], backwards[module], atol=1e-12, rtol=0)
    if "rite" not in name:  # whose clip looks at all of them
        torch.testing.assert_close(forwards["m"], alone["m"], atol=1e-12, rtol=0)
    others = {role: (Parameter(torch.ones(4)), Parameter(torch.ones(4))) for role in ("bias", "head")}
    mine = build_optimizer([(f"m.{role}", role, p) for role, (p, _) in others.items()], config, {})
    groups = [{"params": [others["bias"][1]], "lr": config.learning_rate},
              {"params": [others["head"][1]], "lr": config.head_learning_rate}]  # fmt: skip
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=config.epsilon, weight_decay=config.weight_decay)
    for number in range(3):
        for one, two in others.values():
            one.grad, two.grad = (torch.arange(4.0) - number for _ in range(2))
        mine.step()
        theirs.step()
    for one, two in others.values():
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("family", "name"), [*((f, n) for f in FAMILIES for n in ("full", "rite")), ("llama", "efficient")]
)
def test_a_chain_of_two_links_learns_and_its_knots_change_no_score(family: str, name: str, tmp_path: Path) -> None:
    chain, losses = root_of(family, tmp_path), []
    for number in (1, 2):
        adapter, record, progress = run_link(job_of(family, chain, FP32, **EVERY[name], steps=10))
        assert record["knot"]["score_change"] < 1e-4, "run_link raises where law 2 is broken"
        write_link(tmp_path / f"links/{number}/adapter", adapter, record, {})
        chain = read_chain(tmp_path / f"links/{number}/adapter")
        losses += [event["loss"] for event in progress.losses]
    assert sum(losses[-4:]) / 4 < losses[0]


@pytest.mark.parametrize(("family", "name"), [("gpt2", "full"), ("bert", "rite, escape")])
def test_law_7_a_link_resumes_bit_for_bit(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**EVERY[name], "keep": "last", "dropout": 0.2, "bias": "none", "steps": 8}
    resumes(job_of(family, root_of(family, tmp_path), FP32, **changes), tmp_path, monkeypatch)


def test_every_mode_that_the_configuration_names_is_there() -> None:
    assert set(MODES) == set(get_args(LoraPro.model_fields["mode"].annotation))


@pytest.mark.parametrize("update", [PRO["efficient"], PRO["full"], RITE], ids=["efficient", "full", "rite"])
@pytest.mark.parametrize("parametrisation", ["frozen_a", "frozen_b"])
def test_a_frozen_factor_is_refused(update: dict[str, Any], parametrisation: str) -> None:
    raw = yaml.safe_load((Path(__file__).parent.parent / "params.yaml").read_text())
    raw["link"] |= {"update": update, "initialiser": "kaiming" if parametrisation == "frozen_a" else "random_b"}
    check_params(copy.deepcopy(raw))
    raw["link"]["parametrisation"] = parametrisation
    with pytest.raises(UserError, match=rf"link\.update '{update['kind']}' with link\.parametrisation 'frozen_"):
        check_params(raw)
