"""Tokens per second and memory of a training step against rank, modules, length and batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from benchmarks.memory import peak_bytes
from benchmarks.pairs import timed
from benchmarks.setting import Setting
from cola_core.adapters import Pair, attach, detach
from cola_core.batches import Batch
from cola_core.rows import Row
from cola_core.scoring import Objective

__all__ = ["curves"]

RANKS, LENGTHS, BATCHES = (4, 16, 64, 128), (32, 64, 128, 256), (1, 2, 4, 8)
ROUNDS = 3
TARGETS: dict[str, Any] = {
    "q, v": "query_value",
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "MLP": ["gate_proj", "up_proj", "down_proj"],
    "all": "all",
}


def curves(where: Setting) -> Iterator[dict[str, Any]]:
    """One axis at a time around rank 8, all linears, 8 rows of 64 tokens; the quickest of some rounds."""
    objective = where.objective()
    yield _curve("rank", objective, [_point(where, objective, r, rank=r) for r in RANKS])
    yield _curve("modules", objective, [_point(where, objective, name, targets=t) for name, t in TARGETS.items()])
    yield _curve("length", objective, [_point(where, objective, n, length=n, batch=512 // n) for n in LENGTHS])
    yield _curve("batch", objective, [_point(where, objective, n, batch=n) for n in BATCHES])


@dataclass
class Point:
    """x: its place on the axis; seconds: of the quickest forward and backward so far."""

    x: Any
    pairs: dict[str, Pair]
    batch: Batch
    seconds: float = math.inf
    peak: int = 0


def _curve(name: str, objective: Objective, points: list[Point]) -> dict[str, Any]:
    """Points in turn, so that a slow minute is slow for all of them; memory in the first round."""
    for turn in range(ROUNDS + 1):
        for point in points:
            layers = attach(objective.model, point.pairs)
            work = partial(_step, objective, point.batch)
            if turn:
                point.seconds = min(point.seconds, timed(work))
            else:
                point.peak = peak_bytes(work)
                assert all(layer.B.grad is not None and layer.B.grad.any() for layer in layers.values()), "no gradient"
            detach(objective.model)
    found = [{"x": p.x, "tokens_per_second": p.batch.tokens / p.seconds, "peak_mib": p.peak / 2**20} for p in points]
    return {
        "id": f"tokens-{name}",
        "what": f"tokens/s and memory of forward and backward against {name}",
        "points": found,
    }


def _point(
    where: Setting, objective: Objective, x: Any, rank: int = 8, targets: Any = "all", length: int = 64, batch: int = 8
) -> Point:
    tokens = list(chain.from_iterable(row.prompt for row in where.train[: 32 * batch * length // 64]))
    rows = [Row("", tokens[i * length : (i + 1) * length - 1], [tokens[-1]], 0, "") for i in range(batch)]
    return Point(x, where.pairs(objective, targets, rank), objective.training_batch(rows))


def _step(objective: Objective, batch: Batch) -> None:
    objective(batch).backward()
