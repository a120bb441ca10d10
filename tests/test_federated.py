"""Federated links: shards, rounds against a loop of torch alone, exact means, differential privacy and its epsilon."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from cola_core.axes.parametrisations import PARAMETRISATIONS
from cola_core.axes.updates import build_optimizer
from cola_core.config.compositions import refused
from cola_core.config.params import check_params
from cola_core.config.recipe import LinkConfig
from cola_core.config.training_values import Privacy
from cola_core.errors import UserError
from cola_core.health import Course
from cola_core.knot import open_chain
from cola_core.links import run_link
from cola_core.optimizers.fedavg import FedAvg
from cola_core.optimizers.privacy import epsilon, private_gradient
from cola_core.optimizers.shards import Rounds, shards
from cola_core.train import Training
from tests.lab import FAMILIES, FP32, KINDS, LINK, chain_of, die_after, initial_pairs, job_of, root_of, rows_of, task_of
from tests.test_config import PARAMS

PRIVATE = {"noise": 0.5, "max_norm": 1.0, "delta": 1e-5}
LABELS = st.lists(st.integers(0, 3), max_size=60)


def changes(clients: int = 3, local_steps: int = 2, **others: Any) -> dict[str, Any]:
    """A federated link with B alone training; `others` go to the update where it has them, else to the link."""
    own = {name: others.pop(name, None) for name in ("concentration", "privacy")}
    update = {"kind": "fedavg", "clients": clients, "local_steps": local_steps, **own}
    sgd = {"learning_rate": 0.1, "weight_decay": 0.0, "clip": None}
    return {"parametrisation": "frozen_a", "update": update, **sgd, **others}


def rounds_of(job: Any) -> Any:
    """The batches that a job reads, row indices by round, client and local step."""
    optimizer = build_optimizer([("w", "B", Parameter(torch.zeros(1)))], job.config)
    assert isinstance(optimizer, FedAvg)
    return optimizer.plan(job.train, Course(job.config, job.schedule, job.seed, len(job.chain)))


@pytest.fixture
def unaccounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Private links without Opacus: what they train does not depend on it."""
    monkeypatch.setattr("cola_core.optimizers.fedavg.check_accountant", lambda: None)
    monkeypatch.setattr("cola_core.optimizers.fedavg.epsilon", lambda *_: 1.0)


# Shards and rounds.


@given(LABELS, st.integers(1, 9), st.none() | st.floats(0.01, 100), st.integers(0, 99))
def test_shards_partition_the_rows(labels: list[int], clients: int, concentration: float | None, seed: int) -> None:
    held = shards(labels, clients, concentration, seed)
    assert len(held) == clients
    assert sorted(i for shard in held for i in shard) == list(range(len(labels)))
    assert all(shard == sorted(shard) for shard in held)
    assert held == shards(labels, clients, concentration, seed)
    if concentration is None:
        sizes = [len(shard) for shard in held]
        assert max(sizes) - min(sizes) <= 1


def test_a_seed_decides_who_holds_what() -> None:
    for concentration in (None, 1.0):
        assert shards([0, 1] * 20, 3, concentration, 0) != shards([0, 1] * 20, 3, concentration, 1)


def test_a_small_concentration_leaves_a_client_few_labels() -> None:
    """Entropy of a client's labels: log 4 where rows are dealt out at random, near 0 where every label goes to one."""
    labels = [i % 4 for i in range(2000)]

    def entropy(concentration: float | None) -> float:
        found = []
        for seed in range(20):
            for shard in shards(labels, 5, concentration, seed):
                shares = [n / len(shard) for n in Counter(labels[i] for i in shard).values()]
                found.append((len(shard), -sum(p * math.log(p) for p in shares)))
        return sum(n * e for n, e in found) / sum(n for n, _ in found)

    even, wide, narrow, alone = entropy(None), entropy(100.0), entropy(0.5), entropy(0.001)
    assert math.log(4) >= even > wide > narrow > alone
    assert even > math.log(4) - 0.01 and wide > math.log(4) - 0.02 and narrow < 1.1


def test_label_shares_are_dirichlets() -> None:
    """A share is Beta(a, (K - 1) a): mean 1/K, variance (1/K) (1 - 1/K) / (K a + 1)."""
    shares = [len(shards([0] * 1000, 4, 0.7, seed)[2]) / 1000 for seed in range(2000)]
    assert np.mean(shares) == pytest.approx(0.25, abs=0.02)
    assert np.var(shares) == pytest.approx(0.25 * 0.75 / (4 * 0.7 + 1), rel=0.1)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_a_client_reads_its_own_rows_in_seeded_epochs(
    n: int, clients: int, batch: int, rounds: int, steps: int
) -> None:
    held = shards([0] * n, clients, None, 3)
    plan = Rounds(held, batch, rounds, steps, False, 5)
    assert plan.weights == [len(shard) / n for shard in held]
    for k, shard in enumerate(held):
        turns = [plan[t][k] for t in range(rounds)]
        assert [[len(rows) for rows in turn] for turn in turns] == rounds * [steps * [batch] if shard else []]
        stream = [i for turn in turns for rows in turn for i in rows]
        for start in range(0, len(stream), max(1, len(shard))):
            epoch = stream[start : start + len(shard)]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(shard)


def test_private_batches_are_drawn_row_by_row() -> None:
    """Sizes are binomial, rows independent of one another; a shard smaller than a batch is read whole."""
    plan = Rounds([list(range(40)), [40, 41]], 10, 400, 5, True, 0)
    assert plan.rates == [0.25, 1.0] and plan.expected == [10, 2]
    drawn = [rows for t in range(400) for rows in plan[t][0]]
    sizes = [len(rows) for rows in drawn]
    assert np.mean(sizes) == pytest.approx(10, abs=0.2)
    assert np.var(sizes) == pytest.approx(40 * 0.25 * 0.75, rel=0.1)
    assert min(Counter(i for rows in drawn for i in rows).values()) > 400
    assert np.mean([0 in rows and 1 in rows for rows in drawn]) == pytest.approx(1 / 16, abs=0.02)
    assert all(rows == [40, 41] for t in range(20) for rows in plan[t][1])
    assert plan[3] == Rounds([list(range(40)), [40, 41]], 10, 9, 5, True, 0)[3], "a round depends on no other"
    assert plan[3] != plan[4] and len({tuple(rows) for rows in plan[3][0]}) == 5


def test_clients_keep_their_rows_from_link_to_link(tmp_path: Path) -> None:
    job = job_of("llama", root_of("llama", tmp_path), **changes())
    optimizers = [build_optimizer([("w", "B", Parameter(torch.zeros(1)))], job.config) for _ in range(2)]
    one, two = (o.plan(job.train, Course(job.config, job.schedule, 7, i)) for i, o in enumerate(optimizers, 1))
    assert one.held == two.held and one[0] != two[0]


# Rounds against torch alone.


def gradient_of(job: Any, family: str, model: Any, pairs: Any, trained: Any, rows: list[Any]) -> tuple[Any, Any]:
    """Mean loss over the supervised units of `rows`, one row at a time, and its gradient."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in trained.items()}
    weights = {name: tensor for name, tensor in leaves.items() if name not in pairs}
    for name, pair in pairs.items():
        module = model.get_submodule(name)
        a, b = (pair.a, leaves[name]) if job.config.parametrisation.kind == "frozen_a" else (leaves[name], pair.b)
        delta = pair.scale * b @ a
        weights[f"{name}.weight"] = module.weight + (delta.T if isinstance(module, Conv1D) else delta)
    total, units = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        start, inputs = len(row.prompt) - 1, {"input_ids": torch.tensor([row.prompt + row.answer])}
        if KINDS[family] == "seq2seq":
            decoder = torch.tensor([[0, *row.answer[:-1]]])
            start, inputs = 0, {"input_ids": torch.tensor([row.prompt]), "decoder_input_ids": decoder}
        logits = functional_call(model, weights, kwargs=inputs).logits[0].log_softmax(-1)
        picked = [logits[start + j, t] for j, t in enumerate(row.answer)] or [logits[row.label]]
        total, units = total - sum(picked), units + len(picked)
    loss = total / units
    return loss.item(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def by_hand(job: Any, family: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Every round: each client steps down from the server's parameters, the server takes sum_k (n_k / n) w_k."""
    model, config, plan = open_chain(job.base, job.chain, job.task, job.machine).model, job.config, rounds_of(job)
    pairs = initial_pairs(model, job)
    server = {name: pair.b if config.parametrisation.kind == "frozen_a" else pair.a for name, pair in pairs.items()}
    if KINDS[family] == "encoder":
        server |= {name: p.detach().clone() for name, p in model.named_parameters() if "classifier" in name}
    losses = []
    for number in range(config.steps):
        factor, found = 1 - number / config.steps, []
        mean = {name: torch.zeros_like(tensor) for name, tensor in server.items()}
        for shard, steps in zip(plan.held, plan[number], strict=True):
            mine = dict(server)
            for rows in steps:
                loss, gradients = gradient_of(job, family, model, pairs, mine, [job.train[i] for i in rows])
                found.append(loss)
                for name, gradient in gradients.items():
                    rate = factor * (config.learning_rate if name in pairs else config.head_learning_rate)
                    mine[name] = mine[name] - rate * (gradient + config.weight_decay * mine[name])
            for name in mean:
                mean[name] = mean[name] + len(shard) / len(job.train) * mine[name]
        server = mean
        losses.append(sum(found) / len(found))
    return losses, server


@pytest.mark.parametrize("frozen", ["frozen_a", "frozen_b"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_are_local_sgd_and_a_mean(family: str, frozen: str, tmp_path: Path) -> None:
    start = {"frozen_a": "kaiming", "frozen_b": "random_b"}[frozen]
    asked = {"parametrisation": frozen, "initialiser": start, "weight_decay": 0.1}
    asked["learning_rate"] = {"frozen_a": 0.03, "frozen_b": 0.003}[frozen]
    uneven = changes(concentration=1.0, steps=4, warmup=0.0, **asked)
    job = job_of(family, root_of(family, tmp_path), **uneven, head_learning_rate=0.03)
    assert len({len(shard) for shard in rounds_of(job).held}) > 1, "equal shards would hide the weights"
    adapter, record, progress = run_link(job)
    losses, server = by_hand(job, family)
    tolerance = 1e-5 if family == "t5" else 1e-10  # transformers takes T5's norms in float32 whatever the dtype
    assert [event["loss"] for event in progress.losses] == pytest.approx(losses, abs=tolerance)
    for name, tensor in server.items():
        pair = adapter.pairs.get(name)
        mine = adapter.head[name] if pair is None else pair.b if frozen == "frozen_a" else pair.a
        torch.testing.assert_close(mine, tensor, atol=tolerance, rtol=0)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in server.items() if name in adapter.pairs)
    assert record["clients"] == [{"rows": len(shard), "steps": 8} for shard in rounds_of(job).held]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_one_client_with_one_step_is_plain_sgd(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    federated = job_of(family, root_of(family, tmp_path), **changes(1, 1, weight_decay=0.1))
    same_rows = [rounds_of(federated)[t][0][0] for t in range(6)]
    monkeypatch.setattr("cola_core.optimizers.stepping.Descent.plan", lambda *_: same_rows)
    one, _, told = run_link(federated)
    two, _, plain = run_link(job_of(family, federated.chain, **{**changes(weight_decay=0.1), "update": "sgd"}))
    assert [e["loss"] for e in told.losses] == pytest.approx([e["loss"] for e in plain.losses], abs=1e-12)
    assert [e["tokens"] for e in told.losses] == [e["tokens"] for e in plain.losses]
    for name, pair in two.pairs.items():
        assert pair.b.any()
        torch.testing.assert_close(one.pairs[name].b, pair.b, atol=1e-12, rtol=0)
    for name, tensor in two.head.items():
        torch.testing.assert_close(one.head[name], tensor, atol=1e-12, rtol=0)


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 99))
def test_a_mean_of_products_is_a_product_of_means_only_beside_one_frozen_factor(k: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(k, *shape, generator=generator, dtype=torch.float64) for shape in ((r, 7), (6, r)))
    weights = torch.rand(k, 1, 1, generator=generator, dtype=torch.float64)
    weights /= weights.sum()
    mean_a, mean_b = (weights * a).sum(0), (weights * b).sum(0)
    torch.testing.assert_close((weights * (b @ a[0])).sum(0), mean_b @ a[0], atol=1e-13, rtol=0)
    torch.testing.assert_close((weights * (b[0] @ a)).sum(0), b[0] @ mean_a, atol=1e-13, rtol=0)
    assert float(((weights * (b @ a)).sum(0) - mean_b @ mean_a).abs().max()) > 1e-3


@pytest.mark.parametrize("others", [{}, {"privacy": PRIVATE}], ids=["open", "private"])
@pytest.mark.usefixtures("unaccounted")
def test_the_learning_rate_absorbs_alpha(others: Any, tmp_path: Path) -> None:
    """s' = c s, lr' = lr / c^2 and B' = B / c give the same s B A, bit for bit where c is a power of two.

    Gradients grow by c, so a bound on them has to be c times as large, and weight decay, which does not, c^2 times.
    """
    job = job_of("llama", root_of("llama", tmp_path), **changes(**others, weight_decay=0.01, steps=3))
    wide = {**others, "privacy": {**PRIVATE, "max_norm": 4.0}} if others else {}
    large = {**changes(**wide, learning_rate=0.1 / 16), "weight_decay": 0.16, "alpha": 64.0, "steps": 3}
    one, two = run_link(job)[0], run_link(job_of("llama", job.chain, **large))[0]
    for name, pair in one.pairs.items():
        other = two.pairs[name]
        assert other.scale == 4 * pair.scale and pair.b.any()
        assert torch.equal(other.b, pair.b / 4) and torch.equal(other.a, pair.a)
    if others:
        kept = run_link(job_of("llama", job.chain, **{**large, "update": job.config.update.model_dump()}))[0]
        assert not all(torch.equal(4 * kept.pairs[name].b, pair.b) for name, pair in one.pairs.items())


# Training, knots, and what is resumed.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_federated_link_learns(family: str, tmp_path: Path) -> None:
    rate = {"learning_rate": 0.05, "head_learning_rate": 0.05, "local_steps": 4, "steps": 12}
    losses = [e["loss"] for e in run_link(job_of(family, root_of(family, tmp_path), FP32, **changes(**rate)))[2].losses]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize("private", [None, PRIVATE], ids=["open", "private"])
def test_links_follow_one_another(private: Any, tmp_path: Path) -> None:
    if private:
        pytest.importorskip("opacus", reason="the extra `privacy` is not installed")
    chain = chain_of("llama", tmp_path, 2, FP32, **changes(privacy=private, steps=2))
    records = [link.record["clients"] for link in chain[1:]]
    assert [len(clients) for clients in records] == [3, 3]
    if private:
        for one, two in zip(*records, strict=True):
            rate = one["rate"]
            assert one["epsilon"] == epsilon([(0.5, rate, 4)], 1e-5)
            assert two["epsilon"] == pytest.approx(epsilon([(0.5, rate, 8)], 1e-5), rel=1e-12)


class Reads:
    """Counts the readings of rows, and stops the run at one of them, as Ctrl-C would in the middle of a round."""

    def __init__(self, monkeypatch: Any) -> None:
        self.done, self.stop, honest = 0, 10**9, Training._gradients

        def gradients(training: Any, rows: Any) -> Any:
            self.done += 1
            if self.done > self.stop:
                raise KeyboardInterrupt
            return honest(training, rows)

        monkeypatch.setattr(Training, "_gradients", gradients)


CASES = [(family, private) for family in ("llama", "bert") for private in (None, PRIVATE)]


@pytest.mark.parametrize(("family", "private"), CASES, ids=[f"{f}-{'private' if p else 'open'}" for f, p in CASES])
@pytest.mark.usefixtures("unaccounted")
def test_law_7_a_round_that_was_stopped_is_trained_again_as_a_whole(
    family: str, private: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    asked = {**changes(privacy=private), "dropout": 0.2, "keep": "best", "steps": 5}
    chain, reads = root_of(family, tmp_path), Reads(monkeypatch)
    whole, _, undisturbed = run_link(job_of(family, chain, FP32, **asked))
    total = reads.done
    job = job_of(family, chain, FP32, checkpoint=tmp_path / "state.safetensors", **asked)
    seen: list[int] = []

    for part in (0.1, 0.3, 0.3):  # of five rounds: in the first, in the second, in the third
        reads.done, reads.stop = 0, int(part * total)
        with pytest.raises(KeyboardInterrupt):
            run_link(job, lambda event: seen.append(event["step"]))
    reads.stop = 10**9
    for step, how in ((3, GeneratorExit), (4, KeyboardInterrupt)):
        with pytest.raises(how):
            run_link(job, die_after(step, how, seen))
    resumed, _, progress = run_link(job, lambda event: seen.append(event["step"]))
    assert seen == [1, 2, 3, 3, 4, 5], "stopped: no whole round is repeated; killed: those since the last checkpoint"
    assert progress.losses == undisturbed.losses
    for name, pair in whole.pairs.items():
        assert torch.equal(pair.a, resumed.pairs[name].a) and torch.equal(pair.b, resumed.pairs[name].b)
    assert all(torch.equal(tensor, resumed.head[name]) for name, tensor in whole.head.items())


# Differential privacy.


class Toy:
    """Rows whose gradients are known: row i's is `gradients[i]`, cut into two parameters."""

    def __init__(self, gradients: torch.Tensor) -> None:
        self.gradients = gradients
        self.parameters = [
            Parameter(torch.zeros(2, dtype=gradients.dtype)),
            Parameter(torch.zeros(1, 3, dtype=gradients.dtype)),
        ]

    def read(self, rows: Any) -> tuple[float, int]:
        mean = self.gradients[list(rows)].mean(0)
        for parameter, part in zip(self.parameters, (mean[:2], mean[2:].view(1, 3)), strict=True):
            parameter.grad = part.clone() if parameter.grad is None else parameter.grad + part
        return float(rows[0]), 10 + rows[0]

    def asked(self, rows: Any, noise: float, bound: float, expected: float = 1.0) -> torch.Tensor:
        options = Privacy.model_construct(noise=noise, max_norm=bound, delta=1e-5)
        self.told = private_gradient(self.parameters, rows, self.read, options, expected)
        return torch.cat([p.grad.flatten() for p in self.parameters])


def draws(rows: int, seed: int = 0) -> torch.Tensor:
    scale = torch.logspace(-2, 2, rows, dtype=torch.float64)[:, None]
    return scale * torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.floats(0.01, 100), st.floats(0.5, 9), st.integers(0, 99))
def test_every_row_counts_for_no_more_than_the_bound(n: int, bound: float, expected: float, seed: int) -> None:
    gradients = draws(n, seed)
    toy = Toy(gradients)
    shortened = gradients * (bound / gradients.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(toy.asked(range(n), 0.0, bound, expected), shortened.sum(0) / expected)
    assert toy.told == [(float(i), 10 + i) for i in range(n)]
    for row in range(n):
        without = [i for i in range(n) if i != row]
        moved = toy.asked(range(n), 0.0, bound) - toy.asked(without, 0.0, bound)
        assert float(moved.norm()) <= bound * (1 + 1e-9)


def test_without_noise_and_bound_it_is_the_plain_mean() -> None:
    torch.testing.assert_close(Toy(draws(7)).asked(range(7), 0.0, 1e9, 7.0), draws(7).mean(0))


@pytest.mark.parametrize("rows", [[], [0, 1, 2]], ids=["empty", "three rows"])
def test_the_noise_is_as_wide_as_told(rows: list[int]) -> None:
    """noise * bound on the sum, so noise * bound / expected on the gradient, for every parameter alike."""
    toy, (noise, bound, expected) = Toy(draws(3)), (1.5, 0.4, 8.0)
    centre = toy.asked(rows, 0.0, bound, expected)
    torch.manual_seed(0)
    found = torch.stack([toy.asked(rows, noise, bound, expected) - centre for _ in range(4000)])
    assert found.std(0).tolist() == pytest.approx([noise * bound / expected] * 5, rel=0.04)
    assert found.mean(0).tolist() == pytest.approx([0.0] * 5, abs=0.005)
    assert float((torch.corrcoef(found.T) - torch.eye(5)).abs().max()) < 0.06


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.usefixtures("unaccounted")
def test_a_private_round_without_noise_and_bound_is_an_open_one(family: str, tmp_path: Path) -> None:
    """Where a row is a unit of the loss, and batches are whole shards."""
    task, chain = task_of(family, "answer" if family == "bert" else "candidates"), root_of(family, tmp_path)
    asked = {"clients": 2, "batch": 8, "head_learning_rate": 0.05, "steps": 2}
    faint = {"noise": 1e-15, "max_norm": 1e9, "delta": 1e-5}
    for options in (faint, {**faint, "max_norm": 1e-3}):
        faint["noise"] = 1e-15 / faint["max_norm"]
        one, two = (
            run_link(job_of(family, chain, task=task, **changes(privacy=each, **asked)))[0] for each in (None, options)
        )
        gaps = [float((pair.b - two.pairs[name].b).abs().max()) for name, pair in one.pairs.items()]
        gaps += [float((tensor - two.head[name]).abs().max()) for name, tensor in one.head.items()]
        assert (max(gaps) < 1e-12) == (options is faint)


@pytest.mark.usefixtures("unaccounted")
def test_a_round_without_a_row_is_noise_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Rounds, "__getitem__", lambda self, number: [[[], []] for _ in self.held])
    job = job_of("llama", root_of("llama", tmp_path), **changes(privacy=PRIVATE), steps=1, warmup=0.0)
    adapter, _, progress = run_link(job)
    assert math.isfinite(progress.losses[0]["loss"])
    b = torch.cat([pair.b.flatten() for pair in adapter.pairs.values()])
    # Three clients, two steps each, batches of 4 rows expected: lr * noise * bound / 4 * sqrt(2) / client.
    weights = math.sqrt(sum((n / 16) ** 2 for n in (6, 5, 5)))
    assert float(b.std()) == pytest.approx(0.1 * 0.5 * 1.0 / 4 * math.sqrt(2) * weights, rel=0.05)


def quadrature(noise: float, rate: float, steps: int, delta: float) -> float:
    """min over orders of the Renyi divergence between (1 - q) N(0, s^2) + q N(1, s^2) and N(0, s^2), by quadrature."""
    z, width = np.linspace(-40 * noise - 10, 40 * noise + 80, 400_001, retstep=True)
    density = -(z**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    shifted = (2 * z - 1) / (2 * noise**2)
    ratio = np.logaddexp(math.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + shifted)
    found = []
    for order in [1 + x / 10 for x in range(1, 100)] + list(range(12, 64)):
        terms = density + order * ratio
        renyi = (terms.max() + math.log(np.exp(terms - terms.max()).sum() * width)) / (order - 1)
        found.append(steps * renyi + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1))
    return min(found)


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(1.0, 0.1, 50), (2.0, 0.5, 100), (0.8, 0.02, 200), (5.0, 1.0, 10)]
)
def test_epsilon_is_the_sampled_gaussians(noise: float, rate: float, steps: int) -> None:
    pytest.importorskip("opacus", reason="the extra `privacy` is not installed")
    assert epsilon([(noise, rate, steps)], 1e-5) == pytest.approx(quadrature(noise, rate, steps, 1e-5), rel=1e-4)


def test_epsilon_of_whole_batches_is_the_gaussian_mechanisms() -> None:
    """q = 1: Renyi divergence a T / (2 noise^2) at order a, in closed form."""
    pytest.importorskip("opacus", reason="the extra `privacy` is not installed")
    orders, delta, noise = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64)), 1e-6, 3.0
    by_order = [
        a * 20 / (2 * noise**2) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders
    ]
    assert epsilon([(noise, 1.0, 20)], delta) == pytest.approx(min(by_order), rel=1e-9)


def test_epsilon_grows_with_steps_and_falls_with_noise_and_sampling() -> None:
    pytest.importorskip("opacus", reason="the extra `privacy` is not installed")
    assert epsilon([(1.0, 0.1, 10)], 1e-5) < epsilon([(1.0, 0.1, 20)], 1e-5) < epsilon([(0.9, 0.1, 20)], 1e-5)
    assert epsilon([(0.9, 0.1, 20)], 1e-5) < epsilon([(0.9, 0.2, 20)], 1e-5)
    assert epsilon([(1.0, 0.1, 10)] * 2, 1e-5) == pytest.approx(epsilon([(1.0, 0.1, 20)], 1e-5))


def test_link_json_tells_every_clients_epsilon(tmp_path: Path) -> None:
    pytest.importorskip("opacus", reason="the extra `privacy` is not installed")
    uneven = changes(privacy=PRIVATE, concentration=1.0, patience=1, validate_every=1, learning_rate=1e-9)
    job = job_of("llama", root_of("llama", tmp_path), **uneven)
    _, record, progress = run_link(job)
    assert progress.step < 6, "the link ends early, so fewer rounds are paid for"
    for client, shard in zip(record["clients"], rounds_of(job).held, strict=True):
        assert (client["rows"], client["steps"], client["delta"]) == (len(shard), 2 * progress.step, 1e-5)
        rate = min(1.0, 4 / len(shard))
        assert client["epsilon"] == epsilon([(0.5, rate, 2 * progress.step)], 1e-5) and client["rate"] == rate
    json.dumps(record, allow_nan=False)


# What is refused.


def test_a_missing_accountant_is_told_before_any_round(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    seen: list[Any] = []
    with pytest.raises(UserError, match=r"^link\.update\.privacy: opacus.*extra `privacy`: python -m pip install"):
        run_link(job_of("llama", root_of("llama", tmp_path), **changes(privacy=PRIVATE, steps=1)), seen.append)
    assert seen == []


def test_several_processes_are_refused(monkeypatch: Any) -> None:
    config = LinkConfig(**{**LINK.model_dump(), **changes()})
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"^link\.update 'fedavg' with more than one process"):
        build_optimizer([("w", "B", Parameter(torch.zeros(1)))], config)


def test_clients_are_averaged_only_where_the_mean_is_exact() -> None:
    chosen = dict.fromkeys(
        ("allocate.allocator", "link.initialiser", "link.pruning", "link.scale", "link.quantise", "profile.probe",
         "profile.directions", "schedule.kind", "machine.dtype", "machine.device"), "-",
    )  # fmt: skip
    for kind in PARAMETRISATIONS:
        told = refused({**chosen, "link.parametrisation": kind, "link.update": "fedavg"})
        assert (told is None) == (kind in ("frozen_a", "frozen_b")), kind


def federated_params(**others: Any) -> dict[str, Any]:
    """params.yaml of a chain of two federated links; dotted keys in `others` with __ for the dot."""
    raw = copy.deepcopy(PARAMS)
    raw["link"] |= {**changes(), "initialiser": "kaiming"}
    raw["profile"]["probe"], raw["allocate"]["allocator"] = "none", "uniform"
    for key, value in others.items():
        *path, last = key.split("__")
        place = raw
        for part in path:
            place = place[part]
        place[last] = value
    return raw


GENERATE = {**PARAMS["prepare"], "kind": "generate", "answers": {}}


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({}, None),
        ({"link__update__privacy": PRIVATE}, None),
        ({"link__update__concentration": 0.3}, None),
        ({"link__clip": 1.0}, "chain.1: link.clip with link.update 'fedavg'"),
        ({"link__parametrisation": "plain"}, "chain.1: link.update 'fedavg' with link.parametrisation 'plain': what"),
        ({"prepare": GENERATE}, None),
        ({"prepare": GENERATE, "link__update__concentration": 0.3}, "chain.1: link.update.concentration with prepare"),
        ({"link__update__privacy": PRIVATE, "profile__probe": "one_batch"}, "chain.1: link.update.privacy with prof"),
        (
            {"link__update__privacy": PRIVATE, "fetch__model__kind": "encoder", "prepare__kind": "classify",
             "merge__portable_adapter": False},
            "chain.1: link.update.privacy with an encoder",
        ),
        ({"chain__2__link__update": {**changes()["update"], "privacy": PRIVATE}}, "chain.2: link.update.privacy besi"),
        (
            {"link__update__privacy": PRIVATE, "chain__2__link__update": changes(2, privacy=PRIVATE)["update"]},
            "chain.1: link.update.privacy beside",
        ),
        ({"link__update__privacy": {**PRIVATE, "noise": 0.0}}, "link.update.privacy.noise: Input should be greater"),
        ({"link__update__privacy": {**PRIVATE, "max_nrm": 1.0}}, "link.update.privacy.max_nrm: unknown key; did you"),
        ({"link__update__clients": 0}, "link.update.clients: Input should be greater"),
    ],
)  # fmt: skip
def test_what_a_federation_cannot_do_is_one_line(others: dict[str, Any], told: str | None) -> None:
    raw = federated_params(**others)
    if told is None:
        check_params(raw)
        return
    with pytest.raises(UserError) as caught:
        check_params(raw)
    assert str(caught.value).startswith(f"params.yaml: {told}") and "\n" not in str(caught.value)


def test_a_round_reads_a_batch_per_client_and_local_step(tmp_path: Path) -> None:
    """What `cola plan` multiplies a step's work by."""
    config = LinkConfig(**{**LINK.model_dump(), **changes(5, 4)})
    job = job_of("llama", root_of("llama", tmp_path), **changes(5, 4))
    assert config.update.batches == 20 == len([rows for steps in rounds_of(job)[0] for rows in steps])
    assert LINK.update.batches == 1


def test_the_rows_of_the_tests_have_answers_of_several_lengths() -> None:
    assert len({len(row.answer) for row in rows_of("llama", 16)}) > 1
