"""Log-probabilities of continuations, and the training loss made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from cola_core.batches import Batch
from cola_core.collate import COLLATE, LENGTH
from cola_core.config.recipe import LinkConfig
from cola_core.packing import PACKED, first_tokens, packed_inputs, use_packing
from cola_core.rows import Row, Task, group_by_length

__all__ = ["Objective", "mean_loss"]


class Objective(nn.Module):
    """A model with its task: forward gives the loss, `scores` the log-probability of every candidate.

    Logits are computed only at the positions that are scored, and rows are packed end to end where the model allows it:
    the loss and its gradients are those of the plain, padded computation.
    """

    def __init__(self, model: PreTrainedModel, kind: str, task: Task) -> None:
        super().__init__()
        self.model, self.kind, self.task = model, kind, task
        self.packed = use_packing(model)

    def training_batch(self, rows: Sequence[Row]) -> Batch:
        """What the loss reads: the right answer of every row, or all candidates where they are compared."""
        return self._collate(rows, compare=self.task.loss == "candidates")

    def scoring_batch(self, rows: Sequence[Row]) -> Batch:
        """What `scores` reads: every candidate of every row."""
        return self._collate(rows, compare=bool(self.task.candidates))

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss over a batch made by `training_batch`; divide by `units` for the mean.

        answer: negative log-likelihood of the right answer's tokens; candidates (and encoders): cross-entropy over the
        candidates' summed log-probabilities (the heads' logits).
        """
        if self.kind == "encoder":
            return functional.cross_entropy(self._logits(batch), batch.labels, reduction="sum")
        tokens = self._token_log_probabilities(batch)
        if self.task.loss == "answer":
            return -tokens.sum()
        sums = self._sum(tokens, batch).view(len(batch.labels), -1)
        return functional.cross_entropy(sums, batch.labels, reduction="sum")

    def units(self, batch: Batch) -> int:
        """What the loss is a sum over: supervised tokens, or rows where candidates or labels are compared."""
        by_token = self.kind != "encoder" and self.task.loss == "answer"
        return len(batch.targets) if by_token else len(batch.labels)

    def scores(self, batch: Batch) -> Tensor:
        """n x C log-probabilities (sums or means per candidate) of a batch made by `scoring_batch`."""
        if self.kind == "encoder":
            return functional.log_softmax(self._logits(batch), dim=-1)
        sums = self._sum(self._token_log_probabilities(batch), batch)
        return (sums / batch.lengths if self.task.score == "mean" else sums).view(len(batch.labels), -1)

    def _collate(self, rows: Sequence[Row], compare: bool) -> Batch:
        continuations = [self._continuations(row, compare) for row in rows]
        collate = (PACKED if self.packed else COLLATE)[self.kind]
        return collate(rows, continuations, self.task).to(self.model.device)

    def groups(
        self, rows: Sequence[Row], size: int, tokens: int | None = None, answered: bool = False
    ) -> list[list[int]]:
        """Which rows to compute together; see `group_by_length`.

        Args:
            answered: the rows are to be answered, by comparing all candidates or by generating (beside prompts that are
                padded to the longest); by default what `training_batch` computes.
        """
        if answered and self.task.kind == "generate":
            return group_by_length([len(row.prompt) + self.task.max_new_tokens for row in rows], size, tokens)
        every = self.task.loss == "candidates" or (answered and bool(self.task.candidates))
        continuations = [self._continuations(row, every) for row in rows]
        longest = max((len(part) for parts in continuations for part in parts), default=0)
        lengths = [LENGTH[self.kind](*both, longest) for both in zip(rows, continuations, strict=True)]
        return group_by_length(lengths, size, tokens, padded=not self.packed)

    def _continuations(self, row: Row, compare: bool) -> list[list[int]]:
        return self.task.candidates if compare else [row.answer]

    def _token_log_probabilities(self, batch: Batch) -> Tensor:
        """log p of every supervised token."""
        logits = self._logits(batch)
        return logits[batch.at, batch.targets] - logits.logsumexp(-1)[batch.at]

    def _sum(self, tokens: Tensor, batch: Batch) -> Tensor:
        return tokens.new_zeros(len(batch.lengths)).index_add(0, batch.owner, tokens)

    def _logits(self, batch: Batch) -> Tensor:
        """T' x vocabulary at the batch's positions (language models), n x labels (encoders); float32 or wider."""
        with _only_positions(self.model, batch):
            logits = FORWARD[self.kind](self.model, batch.inputs)
        return logits if logits.dtype == torch.float64 else logits.float()


def mean_loss(objective: Objective, rows: Sequence[Row], config: LinkConfig) -> float:
    """Mean training loss over `rows`, in eval mode, without gradients."""
    objective.eval()
    total, units = 0.0, 0
    with torch.no_grad():
        for indices in objective.groups(rows, config.micro_batch, config.micro_tokens):
            batch = objective.training_batch([rows[i] for i in indices])
            total, units = total + float(objective(batch)), units + objective.units(batch)
    return total / units


@contextmanager
def _only_positions(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """Let the output layer see only the hidden states whose logits are needed, whatever the model does around it."""
    head = model.get_output_embeddings()
    if head is None or not len(batch.rows):
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][batch.rows, batch.columns],))
    try:
        yield
    finally:
        handle.remove()


def _causal(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """A branch mask becomes additive in the model's dtype; plain rows need none, since they are padded on the right."""
    mask = inputs.get("attention_mask")
    if "row_lengths" in inputs:
        inputs = packed_inputs(inputs)
    elif mask is not None:
        blocked = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
        inputs = {**inputs, "attention_mask": blocked.masked_fill(~mask, torch.finfo(model.dtype).min)}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _seq2seq(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    hidden = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    source = inputs["source"]
    logits: Tensor = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden[source]),
        attention_mask=inputs["attention_mask"][source],
        decoder_input_ids=inputs["decoder_input_ids"],
        use_cache=False,
    ).logits
    return logits


def _encoder(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    packed = "row_lengths" in inputs
    with first_tokens(model, inputs["row_lengths"]) if packed else nullcontext():
        logits: Tensor = model(**(packed_inputs(inputs) if packed else inputs)).logits
        return logits


FORWARD: dict[str, Callable[[PreTrainedModel, dict[str, Tensor]], Tensor]] = {
    "causal": _causal,
    "seq2seq": _seq2seq,
    "encoder": _encoder,
}
