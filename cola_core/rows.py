"""The task and its prepared rows, in which order they are read, and which of them are computed together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path

from cola_core.errors import UserError
from cola_core.sealed import read_sealed
from cola_core.seeds import derive

__all__ = ["PACKABLE", "Row", "Task", "group_by_length", "order"]

# Families whose attention and positions are known to take rows laid end to end; T5's relative positions are counted
# over the whole row.
PACKABLE = {"llama", "opt", "gpt2", "bert"}
OVERHEAD = 64  # what one more forward and backward costs, in tokens of padding; measured on two cores, a 135 M model


@dataclass(frozen=True)
class Task:
    """task.json: how rows of this task are trained and scored."""

    kind: str
    loss: str
    score: str
    labels: list[str]
    candidates: list[list[int]]
    pad: int
    end: int | None
    start: int | None
    max_new_tokens: int
    extract: str | None

    @classmethod
    def read(cls, path: Path) -> Task:
        """Read task.json; raises UserError where a field is missing."""
        content = read_sealed(path, "task")
        missing = [f.name for f in fields(cls) if f.name not in content]
        if missing:
            raise UserError(f"{path}: {missing[0]}: missing; run `dvc repro prepare`")
        return cls(**{f.name: content[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class Row:
    """One prepared example: token ids of the prompt and of the supervised answer, and the index of its label."""

    id: str
    prompt: list[int]
    answer: list[int]
    label: int
    reference: str


def order(rows: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Rows of every step: seeded epochs that follow one another without a gap, so none is read twice before all once.

    Steps are not sorted by length: where lengths differ between classes that would make steps of one class.

    Returns:
        `steps` lists of `batch` row indices.
    """
    import torch  # here alone: whoever only reads rows is spared seconds

    generator = torch.Generator().manual_seed(derive(seed, "order"))
    stream: list[int] = []
    while len(stream) < steps * batch:
        stream += torch.randperm(rows, generator=generator).tolist()
    return [stream[i * batch : (i + 1) * batch] for i in range(steps)]


def group_by_length(
    lengths: Sequence[int], size: int, tokens: int | None = None, padded: bool = True
) -> list[list[int]]:
    """Cut rows, sorted by length, into the groups that cost least to compute.

    A group costs its tokens, the padded ones included, plus OVERHEAD; losses are sums, so how rows are cut changes no
    gradient.

    Args:
        lengths: tokens computed for every row.
        size: rows of a group at most.
        tokens: tokens of a group at most, None for any number; a longer row is a group of its own.
        padded: whether a group's rows are all as long as its longest.

    Returns:
        indices into `lengths`, shortest rows first.
    """
    ranked = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    total, limit = [0, *accumulate(lengths[i] for i in ranked)], tokens or math.inf

    def computed(start: int, end: int) -> int:
        return (end - start) * lengths[ranked[end - 1]] if padded else total[end] - total[start]

    best: list[tuple[int, int]] = [(0, 0)]  # (cost, where the last group starts) of the first `end` rows
    for end in range(1, len(ranked) + 1):
        options: list[tuple[int, int]] = []
        for start in range(end - 1, max(0, end - size) - 1, -1):
            cost = computed(start, end)
            if cost > limit and options:
                break  # a longer group computes no less
            options.append((best[start][0] + cost + OVERHEAD, start))
        best.append(min(options))
    groups, end = [], len(ranked)
    while end:
        start = best[end][1]
        groups.append(ranked[start:end])
        end = start
    return groups[::-1]
