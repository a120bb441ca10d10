"""Tokens per second and memory of a training step against rank, modules, length and batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from benchmarks.memory import peak_bytes
from benchmarks.pairs import timed
from benchmarks.setting import Setting
from cola_core.adapters import attach, detach
from cola_core.rows import Row
from cola_core.scoring import Objective

__all__ = ["curves"]

RANKS, LENGTHS, BATCHES = (4, 16, 64, 128), (32, 64, 128, 256), (1, 2, 4, 8)
TARGETS: dict[str, Any] = {
    "q, v": "query_value",
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "MLP": ["gate_proj", "up_proj", "down_proj"],
    "all": "all",
}


def curves(where: Setting) -> Iterator[dict[str, Any]]:
    """One axis at a time around rank 8, all linears, 8 rows of 64 tokens; the quicker of two forwards and backwards."""
    objective = where.objective()
    yield _curve("rank", (_point(where, objective, r, rank=r) for r in RANKS))
    yield _curve("modules", (_point(where, objective, name, targets=t) for name, t in TARGETS.items()))
    yield _curve("length", (_point(where, objective, n, length=n, batch=512 // n) for n in LENGTHS))
    yield _curve("batch", (_point(where, objective, n, batch=n) for n in BATCHES))


def _curve(name: str, points: Iterator[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"tokens-{name}", "what": f"tokens/s and memory of forward and backward against {name}",
            "points": list(points)}  # fmt: skip


def _point(
    where: Setting, objective: Objective, x: Any, rank: int = 8, targets: Any = "all", length: int = 64, batch: int = 8
) -> dict[str, Any]:
    attach(objective.model, where.pairs(objective, targets, rank))
    tokens = list(chain.from_iterable(row.prompt for row in where.train[: 32 * batch * length // 64]))
    rows = [Row("", tokens[i * length : (i + 1) * length - 1], [tokens[-1]], 0, "") for i in range(batch)]
    inputs = objective.training_batch(rows)

    def work() -> None:
        objective(inputs).backward()

    work()
    seconds = min(timed(work) for _ in range(2))
    memory = peak_bytes(work)
    detach(objective.model)
    torch.manual_seed(0)
    return {"x": x, "tokens_per_second": inputs.tokens / seconds, "peak_mib": memory / 2**20}
