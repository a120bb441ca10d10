"""Tiny models as the arithmetic's tests ask for them, and what torch counts of their work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cola_core.adapters import Pair, attach
from cola_core.arithmetic.shape import Shape
from cola_core.config.recipe import MachineConfig
from cola_core.files import read_json
from cola_core.models import adaptable, load_base, place, weight_shape
from cola_core.scoring import Objective
from cola_core.targets import select_targets
from flows.timing import work_of
from tests.lab import FP32, KINDS, base_of, rows_of, task_of

CLASSIFIER = 3 * 32  # weights of the tiny BERT's head, which the formulas leave out
ROWS = 5


class Case:
    """A tiny model of a family with adapters of different ranks on some of its modules, and a batch of rows."""

    def __init__(self, family: str, targets: str, machine: MachineConfig = FP32, packed: bool = True) -> None:
        self.model = place(load_base(base_of(family), machine, 3), machine)
        self.objective = Objective(self.model, KINDS[family], task_of(family))
        self.objective.packed &= packed
        self.modules = adaptable(self.model)
        shapes = {name: weight_shape(module) for name, module in self.modules.items()}
        self.names = list(shapes)[-3:] if targets == "last" else select_targets(shapes, targets)
        self.ranks = {name: 1 + index % 4 for index, name in enumerate(self.names)}
        # cola.json keeps its modules in alphabetical order
        self.shape = Shape.of(dict(sorted(shapes.items())), KINDS[family], read_json(base_of(family) / "config.json"))
        self.rows = rows_of(family, ROWS)
        self.batch = self.objective.training_batch(self.rows)
        self.work = work_of(self.batch)
        self.unseen = 2 * ROWS * CLASSIFIER if KINDS[family] == "encoder" else 0

    def adapt(self) -> Case:
        attach(self.model, {name: self.pair(name, rank) for name, rank in self.ranks.items()})
        return self

    def pair(self, name: str, rank: int) -> Pair:
        out, inner = self.shape.modules[name]
        return Pair(torch.ones(rank, inner), torch.zeros(out, rank), 1.0)

    def step(self) -> None:
        self.objective(self.batch).backward()


def close(expected: float) -> Any:
    """Packed rows count as a broken number of rows of a broken length."""
    return pytest.approx(expected, rel=1e-9)


def counted(work: Callable[[], object]) -> int:
    """FLOPs of `work`; attention in its plain form, since the counter knows no kernel of the CPU's own."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
