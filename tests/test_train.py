"""The training loop: accumulation, checkpointing, best and early stopping, precision, failures; verifying a chain."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_core import train
from cola_core.adapters import LoRA, attach, detach
from cola_core.chain import head_of, write_link
from cola_core.config.recipe import MachineConfig, ScheduleConfig
from cola_core.errors import UserError
from cola_core.knot import open_chain
from cola_core.lineage import read_chain
from cola_core.links import run_link
from cola_core.sealed import write_sealed
from cola_core.split_files import write_rows
from cola_core.verify import verify_chain
from tests.lab import (
    FAMILIES,
    FP32,
    FP64,
    base_of,
    chain_of,
    grow,
    initial_pairs,
    job_of,
    model_of,
    root_of,
    rows_of,
    task_of,
)

BF16 = MachineConfig(device="cpu", threads=1, dtype="bf16")


def learned(job: Any) -> dict[str, torch.Tensor]:
    return {name: pair.b for name, pair in run_link(job)[0].pairs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_micro_batches_are_one_batch(family: str, tmp_path: Path) -> None:
    chain = root_of(family, tmp_path)
    tolerance = 1e-5 if family == "t5" else 1e-8
    cuts = [{"micro_batch": 4}, {"micro_batch": 1}, {"micro_tokens": 20}]
    whole, *others = (learned(job_of(family, chain, epsilon=1e-3, **cut)) for cut in cuts)
    for name, b in whole.items():
        for parts in others:
            torch.testing.assert_close(parts[name], b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(family: str, tmp_path: Path) -> None:
    chain = root_of(family, tmp_path)
    plain, saved = (learned(job_of(family, chain, activation_checkpointing=on, epsilon=1e-3)) for on in (False, True))
    for name, b in plain.items():
        assert b.any()
        torch.testing.assert_close(saved[name], b, atol=1e-8, rtol=0)


def test_best_is_kept_and_patience_stops(tmp_path: Path, monkeypatch: Any) -> None:
    seen = iter([0.5, 0.3, 0.6, 0.4, 0.35])
    monkeypatch.setattr(train, "mean_loss", lambda *_: next(seen))
    job = job_of("llama", root_of("llama", tmp_path), steps=12, validate_every=2, keep="best", patience=3)
    objective = open_chain(job.base, job.chain, job.task, job.machine)
    layers = attach(objective.model, initial_pairs(objective.model, job))
    layer = next(iter(layers.values()))
    course = train.Course(job.config, job.schedule, job.seed, 1)
    training = train.Training(objective, layers, job.train, job.validation, course)
    kept = [layer.B.detach().clone() for _ in training]
    progress = training.progress
    assert (progress.step, progress.best_step, progress.best_loss) == (10, 4, 0.3)
    assert torch.equal(layer.B, kept[3]), "the adapter of step 4 is the one that stays"


def test_a_global_learning_rate_goes_on_over_the_knot(tmp_path: Path) -> None:
    chain, found = root_of("llama", tmp_path), list[float]()
    whole = run_link(job_of("llama", chain, steps=6, warmup=0.5, decay="cosine"))[2]
    for _ in range(2):
        schedule = ScheduleConfig(kind="cola", learning_rate="global", horizon=6)
        job = job_of("llama", chain, steps=3, warmup=0.5, decay="cosine", schedule=schedule)
        found += [event["learning_rate"] for event in run_link(job)[2].losses]
        chain = grow(job, tmp_path)
    assert found == [event["learning_rate"] for event in whole.losses]


def test_only_the_adapter_gets_gradients(tmp_path: Path) -> None:
    job = job_of("llama", root_of("llama", tmp_path))
    objective = open_chain(job.base, job.chain, job.task, job.machine)
    before = {name: p.clone() for name, p in objective.model.named_parameters()}
    attach(objective.model, initial_pairs(objective.model, job))
    objective(objective.training_batch(job.train[:4])).backward()
    for name, parameter in objective.model.named_parameters():
        assert (parameter.grad is not None) == (name.endswith((".A", ".B"))), name
    detach(objective.model)
    assert not any(isinstance(m, LoRA) for m in objective.model.modules())
    for name, parameter in objective.model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bf16_keeps_fp32_masters_and_records_its_error(family: str, tmp_path: Path) -> None:
    chain = chain_of(family, tmp_path, 2, BF16)
    for link in chain[1:]:
        assert all(pair.a.dtype == pair.b.dtype == torch.float32 for pair in link.adapter().pairs.values())
        assert 0 < link.record["knot"]["score_change"] < 1
    merged, exact = model_of(family, chain, BF16), model_of(family, chain, FP32)
    for name, weight in exact.state_dict().items():
        assert torch.equal(merged.state_dict()[name], weight.bfloat16()), "links are added in fp32 and cast once"


def test_bf16_trains_an_encoders_head_in_fp32(tmp_path: Path) -> None:
    """At this rate bf16 itself would round most steps away."""
    moved = {}
    for machine in (BF16, FP32):
        root = root_of("bert", tmp_path / machine.dtype)
        before = head_of(root)
        head = run_link(job_of("bert", root, machine, head_learning_rate=1e-4))[0].head
        assert all(tensor.dtype == torch.float32 for tensor in head.values())
        moved[machine.dtype] = sum(float((head[name] - before[name]).abs().mean()) for name in head)
    assert moved["bf16"] == pytest.approx(moved["fp32"], rel=0.3)


def test_a_link_that_is_not_finite_says_where_and_what_to_try(tmp_path: Path) -> None:
    job = job_of("llama", root_of("llama", tmp_path), FP32, learning_rate=1e30, clip=None, warmup=0.0)
    where = r"the (loss or its gradient|gradient of \S+) is not finite"
    with pytest.raises(UserError, match=rf"link 1, step \d+: {where}; link.learning_rate is 1e\+30: try a tenth"):
        run_link(job)


def test_a_validation_that_is_not_finite_stops_too(tmp_path: Path, monkeypatch: Any) -> None:
    """Else the first of them would be the best for good."""
    monkeypatch.setattr(train, "mean_loss", lambda *_: float("nan"))
    with pytest.raises(UserError, match=r"link 1, step 2: the validation loss is not finite"):
        run_link(job_of("llama", root_of("llama", tmp_path), FP32, validate_every=2))


def test_biases_train_only_when_asked(tmp_path: Path) -> None:
    frozen = run_link(job_of("opt", root_of("opt", tmp_path)))[0]
    free = run_link(job_of("opt", root_of("opt", tmp_path), bias="lora"))[0]
    assert all(pair.bias is None for pair in frozen.pairs.values())
    base = model_of("opt", root_of("opt", tmp_path)).state_dict()
    moved = [name for name, pair in free.pairs.items() if not torch.equal(pair.bias, base[f"{name}.bias"])]
    assert moved


def test_an_encoders_head_is_carried_along_the_chain(tmp_path: Path) -> None:
    chain = chain_of("bert", tmp_path, 2, FP32)
    heads = [head_of(chain[: link.number + 1])["classifier.weight"] for link in chain]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    assert torch.equal(model_of("bert", chain, FP32).classifier.weight, heads[2])


def prepared(folder: Path, family: str) -> Path:
    """task.json and validation.arrow as stage prepare writes them."""
    folder.mkdir()
    write_sealed(folder / "task.json", "task", asdict(task_of(family)))
    write_rows(folder / "validation.arrow", rows_of(family, 6, seed=1))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_finds_every_prefix_as_it_was(family: str, tmp_path: Path) -> None:
    chain = chain_of(family, tmp_path, 2, FP32)
    rows = prepared(tmp_path / "prepare", family)
    verdicts = list(verify_chain(chain[-1].folder, base_of(family), rows, FP32))
    assert [(v.link, v.hash, v.change) for v in verdicts] == [(link.number, link.hash, 0.0) for link in chain[1:]]


def test_verify_finds_a_link_that_no_longer_gives_its_scores(tmp_path: Path) -> None:
    chain = chain_of("llama", tmp_path, 1, FP32)
    rows = prepared(tmp_path / "prepare", "llama")
    adapter, record = chain[1].adapter(), {k: v for k, v in chain[1].record.items() if k != "files"}
    for pair in adapter.pairs.values():
        pair.b.mul_(1.01)
    write_link(chain[1].folder, adapter, record, {})  # hashes are right again: only the scores can tell
    with pytest.raises(UserError, match=r"links 1\.\.1 move a score"):
        list(verify_chain(chain[1].folder, base_of("llama"), rows, FP32))


@pytest.mark.parametrize("rank", ["8", -3, 1.0, True, None, 10**12, 33])
def test_a_rank_that_cannot_be_is_one_line(rank: Any, tmp_path: Path) -> None:
    job = job_of("llama", root_of("llama", tmp_path))
    name = next(iter(job.ranks))
    with pytest.raises(UserError, match=rf"ranks\.json: ranks: {name}: .* is no rank; allowed: 0 to"):
        run_link(job_of("llama", job.chain, ranks={**job.ranks, name: rank}))


@pytest.mark.parametrize(
    ("ranks", "told"), [({"lm_head": 4}, "no module 'lm_head'"), ({}, "no module to train"), ([4], "no module to")]
)
def test_ranks_of_no_module_are_one_line(ranks: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        run_link(job_of("llama", root_of("llama", tmp_path), ranks=ranks))


@pytest.mark.parametrize(
    "knot", [None, {"rows": [], "scores": []}, {"rows": ["train:1"], "scores": [[1.0], [2.0, 3.0]]}]
)
def test_verify_refuses_a_forged_knot_in_one_line(knot: Any, tmp_path: Path) -> None:
    chain = chain_of("llama", tmp_path, 1, FP32)
    write_sealed(chain[1].folder / "link.json", "link", {**chain[1].record, "knot": knot})
    with pytest.raises(UserError, match=r"link\.json: knot"):
        list(verify_chain(chain[1].folder, base_of("llama"), prepared(tmp_path / "prepare", "llama"), FP32))


def test_a_link_of_another_base_is_one_line(tmp_path: Path) -> None:
    chain = chain_of("bert", tmp_path, 1, FP32)
    adapter, record = chain[1].adapter(), {k: v for k, v in chain[1].record.items() if k != "files"}
    name, pair = next(iter(adapter.pairs.items()))
    narrow = {**adapter.pairs, name: replace(pair, a=pair.a[:, 1:])}
    strange = {**adapter.pairs, "bert.pooler.dense": replace(pair, a=pair.a.clone(), b=pair.b.clone())}
    head = {**adapter.head, "classifier.bias": torch.zeros(7)}
    for pairs, last in ((narrow, adapter.head), (strange, adapter.head), (adapter.pairs, head)):
        alpha = dict.fromkeys(pairs, 16.0)
        write_link(chain[1].folder, replace(adapter, pairs=pairs, alpha=alpha, head=last), record, {})
        with pytest.raises(UserError, match=r"does not fit: the base"):
            model_of("bert", read_chain(chain[1].folder), FP32)


def test_rank_zero_leaves_a_module_alone(tmp_path: Path) -> None:
    job = job_of("llama", root_of("llama", tmp_path))
    name = next(iter(job.ranks))
    chain = grow(job_of("llama", job.chain, ranks={**job.ranks, name: 0}), tmp_path)
    assert name not in chain[1].adapter().pairs
    assert read_chain(chain[1].folder)[1].hash == chain[1].hash
    before, after = (model_of("llama", chain[:n], FP64).get_submodule(name).weight for n in (1, 2))
    assert torch.equal(before, after)
