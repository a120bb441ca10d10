"""Seconds per training step, beside PEFT with transformers' Trainer, PEFT's layers alone, and the arithmetic floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairs import alternate
from benchmarks.peers import against_trainer, floor, peft_layers, peft_model
from benchmarks.results import Row, compared
from benchmarks.setting import Ours, Setting
from cola_core.rows import Row as Example
from cola_core.scoring import Objective

__all__ = ["bf16", "full", "layers", "near_floor", "trainer"]

RANK = 8


def trainer(where: Setting, name: str, what: str, goal: float, pairs: int, targets: str = "all") -> Row:
    """Ours beside PEFT + Trainer at its defaults."""
    config = where.link(steps=pairs + 2)
    objective = where.objective()
    start = where.pairs(objective, targets, RANK)
    theirs = peft_model(where.model(), start, where)
    ours = Ours(where, config, start, objective)
    return compared(name, what, against_trainer(where, ours, theirs, pairs), goal)


def layers(where: Setting, task: str, pairs: int) -> Row:
    """Ours beside PEFT's layers in our own loop: what is left is the adapter layer."""
    config = where.link(steps=pairs + 2)
    ours = Ours(where, config, where.pairs(where.objective(), "all", RANK), where.objective())
    theirs = _peft_in_our_loop(where, config)
    found = alternate(ours.step, theirs.step, pairs)
    ours.check(theirs.losses, 1e-4)
    return compared("step-peft-layers", f"{task}, PEFT's layers inside our loop", found, 1.0)


def _peft_in_our_loop(where: Setting, config: Any) -> Ours:
    objective = where.objective()
    start = where.pairs(objective, "all", RANK)
    wrapped = peft_model(objective.model, start, where)
    theirs = Ours.__new__(Ours)
    theirs.objective, theirs.layers = objective, peft_layers(wrapped, start)
    theirs.start(where, config, theirs.layers)
    return theirs


def near_floor(where: Setting, name: str, targets: str, goal: float, pairs: int) -> Row:
    """A whole step of ours (optimizer included) beside the bare forward and activation gradients of the same groups."""
    config = where.link(steps=pairs + 3)
    ours = Ours(where, config, where.pairs(where.objective(), targets, RANK), where.objective())
    bare = where.objective()
    steps, names, losses = iter(ours.rows), list(ours.layers), list[float]()

    def least() -> None:
        losses.append(_there_and_back(bare, next(steps), config.micro_batch))

    with floor(bare, names):
        found = alternate(ours.step, least, pairs)
    ours.check(losses[:1])  # the bare model does not learn
    assert not any(p.grad is not None for p in bare.parameters()), "the floor computes no weight gradient"
    return compared(name, f"R8, the measured floor, adapters on {targets.replace('_', ' ')}", found, goal)


def _there_and_back(objective: Objective, rows: Sequence[Example], size: int) -> float:
    """Forward and backward of a step's rows in the groups that training would take; returns the mean loss."""
    batches = [objective.training_batch([rows[i] for i in group]) for group in objective.groups(rows, size)]
    units, total = sum(map(objective.units, batches)), 0.0
    for batch in batches:
        loss = objective(batch) / units
        loss.backward()
        total += float(loss.detach())
    return total


def full(where: Setting, task: str, pairs: int) -> Row:
    """Ours beside full fine-tuning in the same loop: all weights' gradients and AdamW on them."""
    config = where.link(steps=pairs + 2)
    ours = Ours(where, config, where.pairs(where.objective(), "all", RANK), where.objective())
    model = where.objective()
    model.requires_grad_(True)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True)
    steps, losses = iter(ours.rows), list[float]()

    def whole() -> None:
        losses.append(_there_and_back(model, next(steps), config.micro_batch))
        adam.step()
        adam.zero_grad()

    found = alternate(ours.step, whole, pairs)
    ours.check(losses[:1])  # it learns something else
    return compared("step-full", f"{task}, full fine-tuning in the same loop", found, None)


def bf16(where: Setting, pairs: int) -> Row:
    """Our step with a bf16 base beside the same step in fp32."""
    config = where.link(steps=pairs + 2)
    half, whole = (
        Ours(where, config, where.pairs(where.objective(), "all", RANK), where.objective(dtype))
        for dtype in ("bf16", "fp32")
    )
    found = alternate(half.step, whole.step, pairs)
    half.check(whole.losses, 0.05)
    note = f"{_instructions()}; the losses of both agree within 5 %"
    return compared("step-bf16", "SST-2, bf16 base beside fp32, the same step of ours", found, None, note=note)


def _instructions() -> str:
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    has = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    return f"the processor has {' and '.join(has)}" if has else "the processor has neither AVX512_BF16 nor AMX"
