"""Rows laid end to end, without padding: linear maps see one long row, attention sees each row by itself.

Right-padded batches of texts of mixed length compute a third of their tokens for nothing. transformers lets a model's
attention be exchanged; everything else in a block works token by token, so nothing else has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cola_core.batches import Batch, Spots
from cola_core.branches import Branched, Continuations, branch_mask
from cola_core.rows import PACKABLE, Row, Task

__all__ = ["PACKED", "first_tokens", "packed_inputs", "use_packing"]

_sdpa: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward


def use_packing(model: PreTrainedModel) -> bool:
    """Make `model` ready for packed rows where that is known to work; other inputs are computed as before.

    An attention that the caller chose instead of transformers' default stays. Elsewhere than on a CPU many small
    attention calls would cost more than padding.
    """
    known = model.config.model_type in PACKABLE and model.config._attn_implementation in ("sdpa", "by_rows")
    if not known or model.device.type != "cpu":
        return False
    model.set_attn_implementation("by_rows")
    return True


def by_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: list[int] | None = None,
    row_masks: list[Tensor | None] | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA of each row by itself; query, key, value: 1 x heads x tokens x size."""
    if row_lengths is None:
        return _sdpa(module, query, key, value, attention_mask, **more)
    parts = zip(*(torch.split(tensor, row_lengths, dim=2) for tensor in (query, key, value)), strict=True)
    masks = row_masks or [None] * len(row_lengths)
    rows = [_sdpa(module, *p, mask, **more)[0] for p, mask in zip(parts, masks, strict=True)]
    return torch.cat(rows, dim=1), None


AttentionInterface.register("by_rows", by_rows)
AttentionMaskInterface.register("by_rows", sdpa_mask)


def causal(rows: Sequence[Row], continuations: Continuations, task: Task) -> Batch:
    """As `collate.causal`, end to end; logits are needed at (0, offset of the row + column)."""
    made = Branched.of(rows, continuations)
    inputs = _packed(made.sequences, made.positions)
    if made.several:
        inputs["branches"] = _end_to_end(made.branches)
    batch = made.spots.batch(inputs, rows, sum(map(len, made.sequences)))
    batch.columns = batch.columns + _starts(inputs["row_lengths"])[batch.rows]
    batch.rows = torch.zeros_like(batch.rows)
    return batch


def encoder(rows: Sequence[Row], continuations: Continuations, task: Task) -> Batch:
    """The whole inputs, end to end; the head answers for every label at once."""
    prompts = [row.prompt for row in rows]
    inputs = _packed(prompts, [range(len(prompt)) for prompt in prompts])
    return Spots().batch(inputs, rows, sum(map(len, prompts)))


PACKED: dict[str, Callable[[Sequence[Row], Continuations, Task], Batch]] = {"causal": causal, "encoder": encoder}


def packed_inputs(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the model is called with: lengths and masks as lists, and a mask that keeps transformers from making one."""
    lengths = inputs["row_lengths"].tolist()
    made = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "row_lengths": lengths}
    if "branches" in inputs:
        branches = [branch.tolist() for branch in torch.split(inputs["branches"][0], lengths)]
        made["row_masks"] = [branch_mask([branch]) if max(branch) > 1 else None for branch in branches]
    return {**made, "attention_mask": torch.zeros(1, 1, 1, 1)}


@contextmanager
def first_tokens(model: PreTrainedModel, lengths: Tensor) -> Iterator[None]:
    """Hand an encoder's pooler and head n rows of one token each, the first: all that they read."""
    starts = _starts(lengths)

    def unpack(_: nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[0, starts][:, None]
        return output

    handle = model.base_model.get_submodule("encoder").register_forward_hook(unpack)
    try:
        yield
    finally:
        handle.remove()


def _packed(sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return {"input_ids": _end_to_end(sequences), "position_ids": _end_to_end(positions), "row_lengths": lengths}


def _end_to_end(sequences: Sequence[Sequence[int]]) -> Tensor:
    """1 x total tokens."""
    return torch.tensor([list(chain.from_iterable(sequences))])


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths
