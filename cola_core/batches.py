"""The tensors a model is given for a group of rows.

A row is a prompt with one or more continuations to be scored (the right answer alone, or every candidate). For a causal
model all continuations of a row share one prompt: their tokens follow it as branches that see the prompt and themselves
only, so the prompt is computed once. Single-token continuations need no extra token at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from cola_core.rows import Row, Task

__all__ = ["COLLATE", "LENGTH", "Batch", "Branched", "branch_mask", "mask_of", "pad"]


@dataclass
class Batch:
    """What one forward pass needs.

    inputs: tensors by the name the model gives them; rows, columns: T' positions whose logits are needed;
    at: T indices into those positions, one per supervised token; targets: T token ids; owner: T indices of the
    continuation a token belongs to; lengths: tokens per continuation; labels: one per row; tokens: tokens computed.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    columns: Tensor
    at: Tensor
    targets: Tensor
    owner: Tensor
    lengths: Tensor
    labels: Tensor
    tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
        moved["inputs"] = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(**moved)


def pad(sequences: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Pad token lists, on the right unless asked otherwise, to one n x longest tensor."""
    longest = max(len(s) for s in sequences)
    gaps = [[value] * (longest - len(s)) for s in sequences]
    return torch.tensor(
        [[*gap, *s] if left else [*s, *gap] for gap, s in zip(gaps, sequences, strict=True)], dtype=torch.long
    )


def mask_of(sequences: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """1 where a token of the sequence stands, 0 where padding does: by position, never by token id."""
    return pad([[1] * len(s) for s in sequences], 0, left)


Continuations = Sequence[Sequence[Sequence[int]]]


# Tokens computed for one row with its continuations, the longest of which in all rows has so many tokens: a decoder's
# rows are padded to it, beside prompts that are padded to the longest prompt.
LENGTH: dict[str, Callable[[Row, Sequence[Sequence[int]], int], int]] = {
    "causal": lambda row, conts, _: len(row.prompt) + sum(len(tokens) - 1 for tokens in conts),
    "seq2seq": lambda row, conts, longest: len(row.prompt) + len(conts) * longest,
    "encoder": lambda row, _, __: len(row.prompt),
}


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
    def several(self) -> list[bool]:
        """Whether a row has more than one branch, whose tokens must not see each other."""
        return [len({b for b in branch if b}) > 1 for branch in self.branches]


def causal(rows: Sequence[Row], continuations: Continuations, task: Task) -> Batch:
    """Rows padded on the right; a mask where branches have to be kept apart."""
    made = Branched.of(rows, continuations)
    inputs = {"input_ids": pad(made.sequences, task.pad)}
    if any(made.several):
        inputs |= {"position_ids": pad(made.positions, 0), "attention_mask": branch_mask(made.branches)}
    return made.spots.batch(inputs, rows, sum(map(len, made.sequences)))


def seq2seq(rows: Sequence[Row], continuations: Continuations, task: Task) -> Batch:
    """Encoder reads every prompt once; the decoder scores each continuation in a row of its own."""
    assert task.start is not None, "prepare writes the decoder's start token for seq2seq models"
    prompts = [row.prompt for row in rows]
    decoder: list[list[int]] = []
    source: list[int] = []
    spots = Spots()
    for index, conts in enumerate(continuations):
        for tokens in conts:
            spots.add(len(decoder), range(len(tokens)), tokens)
            decoder.append([task.start, *tokens[:-1]])
            source.append(index)
    inputs = {
        "input_ids": pad(prompts, task.pad),
        "attention_mask": mask_of(prompts),
        "decoder_input_ids": pad(decoder, task.pad),
        "source": torch.tensor(source),
    }
    return spots.batch(inputs, rows, sum(map(len, prompts)) + sum(map(len, decoder)))


def encoder(rows: Sequence[Row], continuations: Continuations, task: Task) -> Batch:
    """The whole input; the head answers for every label at once."""
    prompts = [row.prompt for row in rows]
    inputs = {"input_ids": pad(prompts, task.pad), "attention_mask": mask_of(prompts)}
    return Spots().batch(inputs, rows, sum(map(len, prompts)))


COLLATE: dict[str, Callable[[Sequence[Row], Continuations, Task], Batch]] = {
    "causal": causal,
    "seq2seq": seq2seq,
    "encoder": encoder,
}


class Spots:
    """Collects where logits are needed; positions shared by several continuations are kept once."""

    def __init__(self) -> None:
        self.unique: dict[tuple[int, int], int] = {}
        self.lists: dict[str, list[int]] = {"at": [], "targets": [], "owner": [], "lengths": []}

    def add(self, row: int, columns: Sequence[int], tokens: Sequence[int]) -> None:
        for column, token in zip(columns, tokens, strict=True):
            self.lists["at"].append(self.unique.setdefault((row, column), len(self.unique)))
            self.lists["targets"].append(token)
            self.lists["owner"].append(len(self.lists["lengths"]))
        self.lists["lengths"].append(len(tokens))

    def batch(self, inputs: dict[str, Tensor], rows: Sequence[Row], tokens: int) -> Batch:
        where = torch.tensor(list(self.unique), dtype=torch.long).reshape(-1, 2)
        tensors: dict[str, Any] = {k: torch.tensor(v, dtype=torch.long) for k, v in self.lists.items()}
        labels = torch.tensor([row.label for row in rows])
        return Batch(inputs, where[:, 0], where[:, 1], labels=labels, tokens=tokens, **tensors)


def branch_mask(branches: Sequence[Sequence[int]]) -> Tensor:
    """n x 1 x L x L, true where a token may look: backwards, at the prompt (branch 0) and its own branch.

    Padding is branch -1: nothing of the sequence sees it, and it sees itself so that no row is empty.
    """
    branch = pad(branches, -1)
    query, key = branch[:, :, None], branch[:, None, :]
    length = branch.shape[1]
    backwards = torch.ones(length, length, dtype=torch.bool).tril()
    return (backwards & ((key == query) | ((key == 0) & (query >= 0))))[:, None]
