"""PEFT as the independent peer: it loads our files, and trains the same link to the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from cola_core.axes.schedules import learning_rate_factor
from cola_core.errors import UserError
from cola_core.export import flat_adapter, portable_adapter, write_flat
from cola_core.knot import open_chain
from cola_core.links import run_link
from cola_core.rows import order
from cola_core.seeds import derive
from tests.lab import (
    FAMILIES,
    FP32,
    KINDS,
    base_of,
    chain_of,
    initial_pairs,
    job_of,
    logits_of,
    model_of,
    root_of,
    rows_of,
)

FORMS = {"flat": flat_adapter, "portable": lambda chain: portable_adapter(flat_adapter(chain))}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_exported_adapter_and_gives_the_merged_logits(family: str, form: str, tmp_path: Path) -> None:
    chain = chain_of(family, tmp_path, 3, FP32, learning_rate=2e-2)
    if family == "bert" and form == "portable":
        with pytest.raises(UserError, match="head is saved"):
            FORMS[form](chain)
        return
    write_flat(tmp_path / form, FORMS[form](chain))
    rows = rows_of(family, 5, seed=3)
    loaded = PeftModel.from_pretrained(model_of(family, chain[:1], FP32), str(tmp_path / form)).eval()
    merged = logits_of(model_of(family, chain, FP32), family, rows)
    plain = logits_of(model_of(family, chain[:1], FP32), family, rows)
    for ours, theirs, base in zip(merged, logits_of(loaded, family, rows), plain, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(ours.abs().max()))
        assert float((ours - base).abs().max()) > 1e-2, "the chain learned nothing: the test would pass empty"


@pytest.mark.parametrize("scale", ["lora", "rslora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_one_links_own_file_with_its_ranks_and_scales(family: str, scale: str, tmp_path: Path) -> None:
    chain = chain_of(family, tmp_path, 1, FP32, scale=scale, learning_rate=2e-2)
    loaded = PeftModel.from_pretrained(model_of(family, chain[:1], FP32), str(chain[1].folder)).eval()
    for name, pair in chain[1].adapter().pairs.items():
        layer = loaded.base_model.model.get_submodule(name)
        assert layer.r["default"] == pair.rank
        assert layer.scaling["default"] == pytest.approx(pair.scale)
    rows = rows_of(family, 3, seed=3)
    for ours, theirs in zip(
        logits_of(model_of(family, chain, FP32), family, rows), logits_of(loaded, family, rows), strict=True
    ):
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(ours.abs().max()))


@pytest.mark.parametrize("family", [f for f in FAMILIES if KINDS[f] == "causal"])
def test_one_link_follows_peft_from_the_same_start(family: str, tmp_path: Path) -> None:
    """20 steps in fp32, losses equal to 1e-5: PEFT's layers, whole logits, torch's AdamW."""
    job = job_of(family, root_of(family, tmp_path), FP32, steps=20, scale="rslora", learning_rate=1e-3)
    _, _, progress = run_link(job)
    model: Any = open_chain(job.base, job.chain, job.task, job.machine).model
    pairs = initial_pairs(model, job)
    config = LoraConfig(
        r=8, lora_alpha=16, use_rslora=True, target_modules=list(pairs), fan_in_fan_out=family == "gpt2",
        rank_pattern={name: pair.rank for name, pair in pairs.items()},
    )  # fmt: skip
    model = get_peft_model(model, config)
    for name, pair in pairs.items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(pair.a)
        layer.lora_B["default"].weight.data.copy_(pair.b)
    trained = [p for p in model.parameters() if p.requires_grad]
    c = job.config
    adam = torch.optim.AdamW(trained, betas=(c.betas[0], c.betas[1]), eps=c.epsilon, weight_decay=c.weight_decay)
    plan = order(len(job.train), c.batch, c.steps, derive(job.seed, 1, "data"))
    losses = []
    for step, indices in enumerate(plan):
        for group in adam.param_groups:
            group["lr"] = c.learning_rate * learning_rate_factor(step, 0, job.schedule, c)
        total, units = torch.zeros(()), 0
        for row in (job.train[i] for i in indices):
            labels = torch.tensor([[-100] * len(row.prompt) + row.answer])
            out = model(input_ids=torch.tensor([row.prompt + row.answer]), labels=labels)
            total, units = total + out.loss * len(row.answer), units + len(row.answer)
        adam.zero_grad()
        (total / units).backward()
        torch.nn.utils.clip_grad_norm_(trained, c.clip)
        adam.step()
        losses.append((total / units).item())
    assert [e["loss"] for e in progress.losses] == pytest.approx(losses, abs=1e-5)
    assert losses[0] - min(losses) > 0.1


def test_biases_are_not_exported_flat(tmp_path: Path) -> None:
    chain = chain_of("opt", tmp_path, 1, FP32, bias="lora")
    assert any(pair.bias is not None for pair in chain[1].adapter().pairs.values())
    with pytest.raises(UserError, match=r"link\.bias=lora"):
        flat_adapter(chain)


def test_the_base_is_named_by_reference_never_by_path(tmp_path: Path) -> None:
    chain = chain_of("llama", tmp_path, 1, FP32)
    assert flat_adapter(chain).base == "tiny:llama"
    assert str(base_of("llama")) not in (chain[1].folder / "adapter_config.json").read_text()
