"""The tensors of one forward pass, and the positions whose logits it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from cola_core.rows import Row

__all__ = ["Batch", "Spots", "mask_of", "pad"]


@dataclass
class Batch:
    """What one forward pass needs.

    inputs: tensors by the name the model gives them; rows, columns: T' positions whose logits are needed;
    at: T indices into those positions, one per supervised token; targets: T token ids; owner: T indices of the
    continuation a token belongs to; lengths: tokens per continuation; labels: one per row;
    tokens: of all rows, without padding.
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


class Spots:
    """Collects where logits are needed; positions shared by several continuations are kept once."""

    def __init__(self) -> None:
        self.unique: dict[tuple[int, int], int] = {}
        self.lists: dict[str, list[int]] = {"at": [], "targets": [], "owner": [], "lengths": []}

    def add(self, row: int, columns: Sequence[int], tokens: Sequence[int]) -> None:
        """One continuation: at `columns` of `row` its `tokens` are to be predicted."""
        for column, token in zip(columns, tokens, strict=True):
            self.lists["at"].append(self.unique.setdefault((row, column), len(self.unique)))
            self.lists["targets"].append(token)
            self.lists["owner"].append(len(self.lists["lengths"]))
        self.lists["lengths"].append(len(tokens))

    def batch(self, inputs: dict[str, Tensor], rows: Sequence[Row], tokens: int) -> Batch:
        """What has been collected, with the inputs and the labels of `rows`."""
        where = torch.tensor(list(self.unique), dtype=torch.long).reshape(-1, 2)
        tensors: dict[str, Any] = {k: torch.tensor(v, dtype=torch.long) for k, v in self.lists.items()}
        labels = torch.tensor([row.label for row in rows])
        return Batch(inputs, where[:, 0], where[:, 1], labels=labels, tokens=tokens, **tensors)


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
