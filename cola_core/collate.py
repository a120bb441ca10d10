"""Rows, each with the continuations to be scored (the right answer alone, or every candidate), as a padded batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cola_core.batches import Batch, Spots, mask_of, pad
from cola_core.branches import Branched, Continuations, branch_mask
from cola_core.rows import Row, Task

__all__ = ["COLLATE", "LENGTH"]

# Tokens computed for one row with its continuations, the longest of which in all rows has so many tokens: a decoder's
# rows are padded to it, beside prompts that are padded to the longest prompt.
LENGTH: dict[str, Callable[[Row, Sequence[Sequence[int]], int], int]] = {
    "causal": lambda row, conts, _: len(row.prompt) + sum(len(tokens) - 1 for tokens in conts),
    "seq2seq": lambda row, conts, longest: len(row.prompt) + len(conts) * longest,
    "encoder": lambda row, _, __: len(row.prompt),
}


def causal(rows: Sequence[Row], continuations: Continuations, task: Task) -> Batch:
    """Rows padded on the right; a mask where branches have to be kept apart."""
    made = Branched.of(rows, continuations)
    inputs = {"input_ids": pad(made.sequences, task.pad)}
    if made.several:
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
