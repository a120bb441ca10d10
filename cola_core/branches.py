"""A prompt with several continuations as one row: branches that see the prompt and themselves only.

So a causal model computes the prompt once for all of them. Single-token continuations need no extra token at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_core.batches import Spots, pad
from cola_core.rows import Row

__all__ = ["Branched", "Continuations", "branch_mask"]

Continuations = Sequence[Sequence[Sequence[int]]]


@dataclass
class Branched:
    """Rows as token lists: a prompt, then the branches of its continuations (all but each one's last token, which
    nothing has to read).

    positions: of every token in its own text; branches: 0 for the prompt, 1, 2, ... for the continuations; spots: where
    logits are needed, as (row, column).
    """

    sequences: list[list[int]]
    positions: list[list[int]]
    branches: list[list[int]]
    spots: Spots

    @classmethod
    def of(cls, rows: Sequence[Row], continuations: Continuations) -> Branched:
        """Lay every row's continuations behind its prompt."""
        made = cls([], [], [], Spots())
        for index, (row, conts) in enumerate(zip(rows, continuations, strict=True)):
            ids, place, branch = list(row.prompt), list(range(len(row.prompt))), [0] * len(row.prompt)
            for number, tokens in enumerate(conts, start=1):
                start = len(ids)
                made.spots.add(index, [len(row.prompt) - 1, *range(start, start + len(tokens) - 1)], tokens)
                ids += tokens[:-1]
                place += [len(row.prompt) + j for j in range(len(tokens) - 1)]
                branch += [number] * (len(tokens) - 1)
            made.sequences.append(ids)
            made.positions.append(place)
            made.branches.append(branch)
        return made

    @property
    def several(self) -> bool:
        """Whether any row has more than one branch, whose tokens must not see each other."""
        return any(len({b for b in branch if b}) > 1 for branch in self.branches)


def branch_mask(branches: Sequence[Sequence[int]]) -> Tensor:
    """n x 1 x L x L, true where a token may look: backwards, at the prompt (branch 0) and its own branch.

    Padding is branch -1: nothing of the sequence sees it, and it sees itself so that no row is empty.
    """
    branch = pad(branches, -1)
    query, key = branch[:, :, None], branch[:, None, :]
    length = branch.shape[1]
    backwards = torch.ones(length, length, dtype=torch.bool).tril()
    return (backwards & ((key == query) | ((key == 0) & (query >= 0))))[:, None]
