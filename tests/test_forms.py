"""What A and B are made of: frozen factors, gates and shortcuts, against matrices written out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cola_core.adapters import LoRA, Pair, attach, detach
from cola_core.axes.parametrisations import PARAMETRISATIONS
from cola_core.errors import UserError
from cola_core.forms.gates import softmax_gates
from cola_core.knot import open_chain
from cola_core.links import run_link
from cola_core.models import adaptable, as_matrix
from cola_core.scoring import mean_loss
from cola_core.start import first_layers, first_pairs
from tests.lab import FAMILIES, FP32, FP64, logits_of, root_of, rows_of
from tests.points import job_at

NORMAL, ONE = {"kind": "gated", "start": "normal"}, {"kind": "gated", "start": "one"}
SOFTMAX = {"kind": "softmax_gated", "temperature": 0.05}


def opened(family: str, folder: Path, form: Any, seed: int = 0, **link: Any) -> tuple[Any, dict[str, LoRA], Any]:
    """A model with layers of a form, whose B are random instead of 0."""
    job = job_at(family, root_of(family, folder), {"parametrisation": form, **link}, machine=FP64)
    objective = open_chain(job.base, job.chain, job.task, FP64)
    layers = first_layers(objective.model, job, first_pairs(objective.model, job))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator, dtype=torch.float64))
    return objective, layers, job


def dense(model: Any, deltas: dict[str, torch.Tensor]) -> Any:
    """The model without layers and with these matrices, out x in, added to its weights."""
    detach(model)
    modules = adaptable(model)
    with torch.no_grad():
        for name, delta in deltas.items():
            as_matrix(modules[name]).add_(delta)
    return model


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # some families take their norms in float32


@pytest.mark.parametrize(("kind", "trains"), [("plain", {"A", "B"}), ("frozen_a", {"B"}), ("frozen_b", {"A"})])
def test_only_the_factors_that_a_form_names_move(kind: str, trains: set[str], tmp_path: Path) -> None:
    start = "random_b" if kind == "frozen_b" else "kaiming"
    job = job_at("llama", root_of("llama", tmp_path), {"parametrisation": kind, "initialiser": start})
    before = first_pairs(open_chain(job.base, job.chain, job.task, FP32).model, job)
    adapter, record, _ = run_link(job)
    for name, pair in adapter.pairs.items():
        assert torch.equal(pair.a, before[name].a.float()) == ("A" not in trains)
        assert torch.equal(pair.b, before[name].b.float()) == ("B" not in trains)
    assert record["knot"]["exact"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", [NORMAL, SOFTMAX])
def test_gates_scale_ranks_in_the_forward_pass_and_in_the_merge(family: str, form: Any, tmp_path: Path) -> None:
    objective, layers, _ = opened(family, tmp_path, form)
    deltas = {}
    for name, layer in layers.items():
        if form is SOFTMAX:
            with torch.no_grad():
                layer.score.copy_(0.05 * torch.arange(len(layer.score)))
            weights = torch.exp(torch.arange(len(layer.score)).double())
            gate = len(weights) * weights / weights.sum()
        else:
            gate = layer.gate.detach()
        deltas[name] = layer.scale * layer.B.detach() @ torch.diag(gate) @ layer.A.detach()
        pair = layer.pair()
        torch.testing.assert_close(pair.scale * pair.b @ pair.a, deltas[name])
    rows = rows_of(family, 3, seed=4)
    gated = logits_of(objective.model, family, rows)
    equal(gated, logits_of(dense(objective.model, deltas), family, rows))


def test_beam_starts_as_lora_and_sora_draws_its_gates(tmp_path: Path) -> None:
    _, beams, _ = opened("llama", tmp_path / "a", SOFTMAX)
    assert all(torch.equal(softmax_gates(layer), torch.ones(2, dtype=torch.float64)) for layer in beams.values())
    _, drawn, _ = opened("llama", tmp_path / "b", NORMAL)
    gates = torch.cat([layer.gate.detach() for layer in drawn.values()])
    assert len(set(gates.tolist())) == len(gates) and 0.5 < float(gates.std()) < 1.5
    _, ones, _ = opened("llama", tmp_path / "c", ONE)
    assert all(layer.gate.detach().eq(1).all() for layer in ones.values())


def test_ranks_whose_gate_is_0_are_left_out_of_the_file(tmp_path: Path) -> None:
    _, layers, _ = opened("llama", tmp_path, NORMAL)
    layer = next(iter(layers.values()))
    with torch.no_grad():
        layer.gate[0] = 0
    pair = layer.pair()
    assert pair.rank == len(layer.gate) - 1
    torch.testing.assert_close(pair.a, layer.gate[1:, None] * layer.A[1:])
    torch.testing.assert_close(pair.b, layer.B[:, 1:])


def test_a_link_that_lost_every_rank_is_one_line(tmp_path: Path) -> None:
    update = {"kind": "proximal", "threshold": 1e6, "rule": "soft", "l1": 0.0}
    job = job_at("llama", root_of("llama", tmp_path), {"parametrisation": NORMAL, "update": update})
    with pytest.raises(UserError, match=r"took every rank away; lower link\.update\.threshold"):
        run_link(job)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_shortcuts_add_the_pairs_of_earlier_blocks(family: str, tmp_path: Path) -> None:
    objective, layers, _ = opened(family, tmp_path, {"kind": "res_bs", "previous": 3})
    own = {name: layer.scale * layer.B.detach() @ layer.A.detach() for name, layer in layers.items()}
    deltas = {name: own[name] + sum(own[e] for e in earlier(name, layers)) for name in layers}
    assert any(earlier(name, layers) for name in layers)
    for name, layer in layers.items():
        pair = layer.pair()
        torch.testing.assert_close(pair.scale * pair.b @ pair.a, deltas[name])
    rows = rows_of(family, 3, seed=4)
    short = logits_of(objective.model, family, rows)
    equal(short, logits_of(dense(objective.model, deltas), family, rows))


def earlier(name: str, layers: Any) -> list[str]:
    """Modules of the same name in earlier blocks, found by the block's number alone."""
    parts = name.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    found = [".".join([*parts[:place], str(k), *parts[place + 1 :]]) for k in range(int(parts[place]))]
    return [other for other in found if other in layers and layers[other].A.shape == layers[name].A.shape]


class Two(nn.Module):
    """Two blocks of one linear map each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"map": nn.Linear(6, 6, dtype=torch.float64)}) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block["map"](x))
        return x


@pytest.mark.parametrize("kind", ["res_is", "res_ms", "res_ms_weights"])
def test_input_and_middle_shortcuts_read_what_the_block_before_read(kind: str) -> None:
    torch.manual_seed(0)
    net, x = Two(), torch.randn(5, 6, dtype=torch.float64)
    a, b = (torch.randn(2, 2, 6, dtype=torch.float64) for _ in range(2))
    names = ["blocks.0.map", "blocks.1.map"]
    form, options = PARAMETRISATIONS[kind], SimpleNamespace(previous=1)
    layers = attach(net, {n: Pair(a[i], b[i].T.contiguous(), 0.5) for i, n in enumerate(names)}, form=form)
    for layer in layers.values():
        form.prepare(layer, options, 0)
    form.connect(layers, options)
    first, second = (net.get_submodule(n).base for n in names)
    y = torch.tanh(first(x) + 0.5 * x @ a[0].T @ b[0])
    low = (y + x) @ a[1].T if kind == "res_is" else y @ a[1].T + x @ a[0].T
    expected = torch.tanh(second(y) + 0.5 * low @ b[1])
    torch.testing.assert_close(net(x), expected)
    ratio = x.norm() / y.norm() if kind != "res_ms_weights" else a[0].norm() / a[1].norm()
    form.settle(layers[names[1]])
    pair = layers[names[1]].pair()
    torch.testing.assert_close(pair.b @ pair.a, (1 + ratio.detach()) * b[1].T @ a[1])
    alone = layers[names[0]].pair()
    torch.testing.assert_close(alone.b @ alone.a, b[0].T @ a[0], msg="the first block has none before it")
    if kind != "res_ms_weights":
        before = layers[names[1]].ratios.clone()
        with torch.no_grad():
            net(2 * x)
        form.settle(layers[names[1]])
        assert torch.equal(layers[names[1]].ratios, before), "a validation is no training batch"


@pytest.mark.parametrize("kind", ["res_is", "res_ms"])
def test_the_window_forgets_what_is_older_than_100_batches(kind: str, tmp_path: Path) -> None:
    objective, layers, job = opened("llama", tmp_path, {"kind": kind, **({} if kind == "res_is" else {"previous": 1})})
    layer = next(layer for layer in layers.values() if layer.previous)
    batch = objective.training_batch(job.train[:2])
    for _ in range(103):
        objective(batch)
        assert not layer.ratios.any(), "a step that is not taken changes nothing"
    layer.form.settle(layer)
    assert int(layer.batches) == 103 and bool((layer.ratios > 0).all())
    layer.ratios.fill_(0.25)
    assert float(layer.pair().b[0, 0] / layer.B[0, 0]) == pytest.approx(1.25)


@pytest.mark.parametrize("kind", ["res_is", "res_ms", "res_ms_weights"])
def test_a_merge_that_is_not_exact_says_by_how_much_and_what_it_costs(kind: str, tmp_path: Path) -> None:
    form = {"kind": kind, **({} if kind == "res_is" else {"previous": 1})}
    chain = root_of("llama", tmp_path)
    job = job_at("llama", chain, {"parametrisation": form, "learning_rate": 2e-2})
    adapter, record, _ = run_link(job)
    assert not record["knot"]["exact"] and record["knot"]["score_change"] > 1e-4
    assert record["validation_loss"] != record["validation_loss_as_trained"]
    merged = open_chain(job.base, chain, job.task, FP32)
    with torch.no_grad():
        for name, pair in adapter.pairs.items():
            as_matrix(merged.model.get_submodule(name)).add_(pair.scale * pair.b @ pair.a)
    assert record["validation_loss"] == pytest.approx(mean_loss(merged, job.validation, job.config), rel=1e-5)


def test_an_exact_merge_has_one_validation_loss(tmp_path: Path) -> None:
    _, record, _ = run_link(job_at("llama", root_of("llama", tmp_path), {"parametrisation": SOFTMAX}))
    assert record["knot"]["exact"] and record["validation_loss"] == record["validation_loss_as_trained"]
