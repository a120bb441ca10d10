"""The laws of the chain, on a tiny model of every family."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from cola_core import knot
from cola_core.adapters import add_pair, attach
from cola_core.chain import head_of, tie, write_link
from cola_core.errors import UserError
from cola_core.export import chain_manifest
from cola_core.files import tree_hash
from cola_core.knot import open_chain
from cola_core.lineage import read_chain
from cola_core.links import run_link
from cola_core.models import adaptable, weight_shape
from cola_core.rows import order
from cola_core.seeds import derive
from tests.lab import (
    FAMILIES,
    FP32,
    FP64,
    KINDS,
    base_of,
    chain_of,
    die_after,
    grow,
    initial_pairs,
    job_of,
    logits_of,
    model_of,
    root_of,
    rows_of,
)

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def plain_lora(job: Any, family: str, whole: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Law 1's reference: torch alone, weights W + s B A, one row at a time, every logit, its own learning rate.

    whole: the weights W themselves train (full fine-tuning).
    """
    model, config = open_chain(job.base, job.chain, job.task, job.machine).model, job.config
    pairs = initial_pairs(model, job)
    trained = {f"{n}.{k}": t.clone().requires_grad_() for n, p in pairs.items() for k, t in (("A", p.a), ("B", p.b))}
    if whole:
        trained = {n: model.get_submodule(n).weight.detach().clone().requires_grad_() for n in pairs}
    head = {
        n: p.clone().requires_grad_()
        for n, p in model.named_parameters()
        if KINDS[family] == "encoder" and "classifier" in n
    }
    groups = [{"params": list(trained.values()), "top": config.learning_rate}]
    groups += [{"params": list(head.values()), "top": config.head_learning_rate}] if head else []
    adam = torch.optim.AdamW(groups, betas=tuple(config.betas), eps=config.epsilon, weight_decay=config.weight_decay)
    plan = order(len(job.train), config.batch, config.steps, derive(job.seed, 1, "data"))
    losses = []
    for step, indices in enumerate(plan):
        weights = dict(head)
        for name, pair in pairs.items():
            if whole:
                weights[f"{name}.weight"] = trained[name]
                continue
            module, delta = model.get_submodule(name), pair.scale * trained[f"{name}.B"] @ trained[f"{name}.A"]
            weights[f"{name}.weight"] = module.weight + (delta.T if isinstance(module, Conv1D) else delta)
        rows, total, units = [job.train[i] for i in indices], 0.0, 0
        for row in rows:
            inputs = {"input_ids": torch.tensor([row.prompt + row.answer])}
            if KINDS[family] == "seq2seq":
                inputs = {
                    "input_ids": torch.tensor([row.prompt]),
                    "decoder_input_ids": torch.tensor([[0, *row.answer[:-1]]]),
                }
            logits = functional_call(model, weights, kwargs=inputs).logits[0].log_softmax(-1)
            start = 0 if KINDS[family] == "seq2seq" else len(row.prompt) - 1
            picked = [logits[start + j, t] for j, t in enumerate(row.answer)] or [logits[row.label]]
            total, units = total - sum(picked), units + len(picked)
        loss = total / units
        warm = math.ceil(config.warmup * config.steps)
        factor = (step + 1) / warm if step < warm else 1 - (step - warm) / (config.steps - warm)
        for group in adam.param_groups:
            group["lr"] = group["top"] * factor
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*trained.values(), *head.values()], config.clip)
        adam.step()
        losses.append(loss.item())
    return losses, trained


@pytest.mark.parametrize(("machine", "tolerance"), [(FP64, 1e-10), (FP32, 1e-5)])
def test_law_1_one_link_is_plain_lora(family: str, tmp_path: Path, machine: Any, tolerance: float) -> None:
    changes: dict[str, Any] = {}
    if family == "t5":  # transformers takes T5's norms in float32 whatever the dtype, and Adam blows up what is rounded
        tolerance, changes = 1e-5, {"epsilon": 1e-3}
    job = job_of(family, root_of(family, tmp_path), machine, steps=20, micro_batch=2, **changes)
    adapter, _, progress = run_link(job)
    losses, trained = plain_lora(job, family)
    assert [e["loss"] for e in progress.losses] == pytest.approx(losses, abs=tolerance)
    assert losses[-1] != losses[0]
    for name, pair in adapter.pairs.items():
        torch.testing.assert_close(pair.a, trained[f"{name}.A"].detach(), atol=tolerance * 10, rtol=0)
        torch.testing.assert_close(pair.b, trained[f"{name}.B"].detach(), atol=tolerance * 10, rtol=0)


def test_a_dense_link_is_full_fine_tuning_of_the_linear_maps(family: str, tmp_path: Path) -> None:
    tolerance, epsilon = (1e-5, 1e-3) if family == "t5" else (1e-9, 1e-8)
    chain = root_of(family, tmp_path)
    shapes = {name: weight_shape(m) for name, m in adaptable(model_of(family, chain)).items()}
    dense: dict[str, Any] = {
        "initialiser": "identity",
        "parametrisation": "dense",
        "scale": "unit",
        "weight_decay": 0.0,
    }
    ranks = {name: min(shape) for name, shape in shapes.items()}
    job = job_of(family, chain, FP64, ranks=ranks, learning_rate=1e-3, epsilon=epsilon, **dense)
    adapter, record, progress = run_link(job)
    losses, trained = plain_lora(job, family, whole=True)
    assert [e["loss"] for e in progress.losses] == pytest.approx(losses, abs=tolerance)
    assert losses[-1] != losses[0]
    head = sum(tensor.numel() for tensor in adapter.head.values())
    assert record["trainable_parameters"] in (size := sum(a * b for a, b in shapes.values()), size + head)
    assert len({out > inner for out, inner in shapes.values()}) == 2, "maps that widen and maps that narrow"
    for name, pair in adapter.pairs.items():
        module = model_of(family, chain).get_submodule(name)
        add_pair(module, pair)
        torch.testing.assert_close(module.weight, trained[name].detach(), atol=tolerance * 10, rtol=0)


@pytest.mark.parametrize(("machine", "tolerance"), [(FP64, 1e-10), (FP32, 1e-5)])
def test_law_2_tying_a_knot_changes_no_logit(family: str, tmp_path: Path, machine: Any, tolerance: float) -> None:
    chain = chain_of(family, tmp_path, 1, machine)
    before = open_chain(base_of(family), chain[:1], job_of(family, chain).task, machine)
    attach(before.model, chain[1].adapter().pairs)
    head = head_of(chain[:2])
    with torch.no_grad():
        for name, parameter in before.model.named_parameters():
            if name in head:
                parameter.copy_(head[name])
    rows = rows_of(family, 5, seed=3)
    untouched = logits_of(model_of(family, chain[:1], machine), family, rows)
    pairs = zip(
        logits_of(before.model, family, rows), logits_of(model_of(family, chain, machine), family, rows), strict=True
    )
    for (attached, merged), plain in zip(pairs, untouched, strict=True):
        assert float((attached - merged).abs().max()) <= tolerance * max(1.0, float(attached.abs().max()))
        assert float((attached - plain).abs().max()) > 100 * tolerance, (
            "the link learned nothing: the test would pass empty"
        )


def test_law_2_a_discontinuous_knot_stops_the_run(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    honest = knot.add_pair

    def forgetful(module: Any, pair: Any) -> float:
        return honest(module, type(pair)(pair.a, 0.9 * pair.b, pair.scale))

    monkeypatch.setattr(knot, "add_pair", forgetful)
    with pytest.raises(UserError, match="merging it moves a score"):
        run_link(job_of(family, root_of(family, tmp_path), learning_rate=0.05))


def test_law_3_files_rebuild_the_model_bit_for_bit(family: str, tmp_path: Path) -> None:
    base_before = tree_hash(base_of(family))
    chain = chain_of(family, tmp_path, 2, FP32)
    model = model_of(family, chain[:1], FP32)
    for link in chain[1:]:  # in memory, in order, in fp32
        for name, pair in link.adapter().pairs.items():
            module = model.get_submodule(name)
            delta = pair.scale * (pair.b @ pair.a)
            module.weight.data += delta.T if isinstance(module, Conv1D) else delta
    head = head_of(chain)
    rebuilt = model_of(family, chain, FP32).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(rebuilt[name], head.get(name, tensor)), name
    assert tree_hash(base_of(family)) == base_before


def test_law_4_every_link_starts_from_nothing(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    from cola_core import train

    counts: list[int] = []  # Adam's own count of steps, as its state holds it after every step
    honest = train.build_optimizer

    def watch(*arguments: Any) -> Any:
        optimizer = honest(*arguments)
        optimizer.register_step_post_hook(
            lambda done, *_: counts.append(max(int(state["step"]) for state in done.state.values()))
        )
        return optimizer

    monkeypatch.setattr(train, "build_optimizer", watch)
    chain = chain_of(family, tmp_path, 2)
    assert counts == 2 * list(range(1, 7))
    for link in chain[1:]:
        assert link.record["optimizer_state_at_start"] == "empty"
        assert link.record["schedule_section"]["learning_rate"] == "restart"
    again = grow(job_of(family, chain[:2]), tmp_path)
    assert again[-1].hash == chain[-1].hash, "what ran before in this process must not matter"


def test_law_5_a_merge_that_is_not_finite_stops(family: str, tmp_path: Path) -> None:
    chain = chain_of(family, tmp_path, 1, FP32)
    adapter, record = chain[1].adapter(), {k: v for k, v in chain[1].record.items() if k != "files"}
    name = next(iter(adapter.pairs))
    adapter.pairs[name].b[0, 0] = math.inf
    write_link(chain[1].folder, adapter, record, {})
    with pytest.raises(UserError) as told:
        model_of(family, read_chain(chain[1].folder), FP32)
    for word in (
        "link 1, step 6",
        f"{name} is not finite",
        "link.learning_rate was 0.005",
        "a tenth of it",
        "dtype=fp32",
    ):
        assert word in str(told.value)


def test_law_5_every_link_records_what_rounding_took(family: str, tmp_path: Path) -> None:
    chain = chain_of(family, tmp_path, 1, FP32)
    model, taken = model_of(family, chain[:1], FP32), []
    for name, pair in chain[1].adapter().pairs.items():
        module, delta = model.get_submodule(name), (pair.scale * (pair.b @ pair.a)).numpy()
        before = module.weight.detach().numpy()
        delta = delta.T if isinstance(module, Conv1D) else delta
        moved = (before + delta).astype("f8") - before.astype("f8")
        taken.append(np.linalg.norm(moved - delta.astype("f8")) / np.linalg.norm(delta.astype("f8")))
    knot = chain[1].record["knot"]
    assert [knot["merge_error_max"], knot["merge_error_mean"]] == pytest.approx([max(taken), np.mean(taken)], rel=1e-6)
    assert max(taken) > 1e-9, "nothing was rounded: the test would pass empty"
    (told,) = chain_manifest(chain, dict(tie(model, chain)))["links"]
    assert told["merge_error_max"] == knot["merge_error_max"]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_law_7_a_link_resumes_bit_for_bit(family: str, tmp_path: Path, dropout: float) -> None:
    chain = root_of(family, tmp_path)
    whole, _, undisturbed = run_link(job_of(family, chain, FP32, dropout=dropout, keep="best"))
    job = job_of(family, chain, FP32, dropout=dropout, keep="best", checkpoint=tmp_path / "state.safetensors")
    seen: list[int] = []

    for step, how in ((1, GeneratorExit), (3, GeneratorExit), (4, KeyboardInterrupt), (5, KeyboardInterrupt)):
        with pytest.raises(how):
            run_link(job, die_after(step, how, seen))
    resumed, _, progress = run_link(job, lambda event: seen.append(event["step"]))
    told = "killed: at most the steps since the last checkpoint (every 2) are repeated; stopped: none"
    assert seen == [1, 1, 2, 3, 3, 4, 5, 6], told
    assert progress.losses == undisturbed.losses
    for name, pair in whole.pairs.items():
        assert torch.equal(pair.a, resumed.pairs[name].a)
        assert torch.equal(pair.b, resumed.pairs[name].b)


def test_a_changed_link_is_found_before_it_is_used(family: str, tmp_path: Path) -> None:
    chain = chain_of(family, tmp_path, 2)
    weights = chain[1].folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"links/1/adapter/adapter_model.safetensors: changed"):
        read_chain(chain[2].folder)
    weights.unlink()
    with pytest.raises(UserError, match="missing"):
        read_chain(chain[2].folder)


def test_a_link_on_another_parent_is_refused(family: str, tmp_path: Path) -> None:
    chain = chain_of(family, tmp_path, 2)
    grow(job_of(family, chain[:1], steps=5), tmp_path)  # link 1 is trained again: link 2 hangs on the old one
    with pytest.raises(UserError, match="was trained on another link 1"):
        read_chain(chain[2].folder)
