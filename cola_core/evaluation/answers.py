"""Let a model answer prepared rows: scores of candidates, or decoded text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola_core.batches import mask_of, pad
from cola_core.data.comparison import comparable
from cola_core.files import new_file
from cola_core.rows import Row, Task
from cola_core.scoring import Objective
from cola_core.seeds import derive

__all__ = ["Answers", "answer", "sample", "write_predictions"]

# tick(rows done, rows in all, tokens of this batch)
Tick = Callable[[int, int, int], None]
Decode = Callable[[list[int]], str]
# what is answered, the right answer's negative log-probability, the answer's probability among candidates
Found = tuple[str, float, float | None]


@dataclass(frozen=True)
class Answers:
    """One model's answers in row order.

    predicted, gold: label names, or normalised texts (generate); correct: whether they agree and are not empty;
    loss: negative log-probability of the right answer (per row), float64; confidence: probability of the predicted one
    among the candidates, empty where answers are generated.
    """

    predicted: list[str]
    gold: list[str]
    correct: list[bool]
    loss: list[float]
    confidence: list[float]


def sample(rows: Sequence[Row], count: int | str) -> list[Row]:
    """A class-stratified sample, the same under every seed, so that models can be compared on it.

    Every label keeps its share, to within one row; rows keep their order.

    Args:
        count: rows wanted, or "all".
    """
    if count == "all" or int(count) >= len(rows):
        return list(rows)
    generator = torch.Generator().manual_seed(derive(0, "evaluate"))
    groups: dict[int, list[int]] = {}
    labels = [row.label for row in rows]
    for index in torch.randperm(len(rows), generator=generator).tolist():
        groups.setdefault(labels[index], []).append(index)
    # Interleaving the groups by the fraction of themselves already taken makes every prefix stratified.
    ranked = sorted(
        (
            ((place + 0.5) / len(group), label, index)
            for label, group in groups.items()
            for place, index in enumerate(group)
        )
    )
    return [rows[index] for index in sorted(index for _, _, index in ranked[: int(count)])]


def answer(
    objective: Objective,
    rows: Sequence[Row],
    size: int,
    decode: Decode,
    tick: Tick = lambda *_: None,
    tokens: int | None = None,
) -> Answers:
    """Answer every row, in groups of similar length.

    Args:
        size, tokens: rows, and tokens with their padding, computed at once at most.
        decode: token ids -> text, for generated answers.
    """
    objective.eval()
    read = partial(_generate, decode=decode) if objective.task.kind == "generate" else _choose
    found: list[Found] = [("", 0.0, None)] * len(rows)
    done = 0
    with torch.no_grad():
        for indices in objective.groups(rows, size, tokens, answered=True):
            batch = [rows[i] for i in indices]
            for index, result in zip(indices, read(objective, batch), strict=True):
                found[index] = result
            done += len(batch)
            tick(done, len(rows), sum(len(row.prompt) for row in batch))
    gold = [normalise(row.reference, objective.task) for row in rows]
    predicted, losses, sure = (list(column) for column in zip(*found, strict=True)) if found else ([], [], [])
    correct = [p == g != "" for p, g in zip(predicted, gold, strict=True)]
    return Answers(predicted, gold, correct, losses, [each for each in sure if each is not None])


def normalise(text: str, task: Task) -> str:
    """What two answers are compared by: labels as they are, generated text as `comparable` has it."""
    return comparable(text, task.extract) if task.kind == "generate" else text


def write_predictions(path: Path, rows: Sequence[Row], answers: dict[str, Answers]) -> None:
    """One Arrow table: id, gold, and per model `<name>_` predicted, correct, loss and, of candidates, confidence."""
    import pyarrow as pa

    first = next(iter(answers.values()))
    columns: dict[str, Any] = {"id": [row.id for row in rows], "gold": first.gold}
    for name, given in answers.items():
        columns |= {f"{name}_{what}": column for what, column in vars(given).items() if what != "gold" and column}
    table = pa.table(columns)
    with (
        new_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table)


def _choose(objective: Objective, rows: Sequence[Row]) -> list[Found]:
    """The best candidate; its loss is taken over the candidates alone."""
    scores: Tensor = objective.scores(objective.scoring_batch(rows)).cpu().double()
    logs, labels, found = scores.log_softmax(dim=-1), objective.task.labels, list[Found]()
    for log, row in zip(logs, rows, strict=True):
        best = int(log.argmax())
        found.append((labels[best], -float(log[row.label]), float(log[best].exp())))
    return found


def _generate(objective: Objective, rows: Sequence[Row], decode: Decode) -> list[Found]:
    """Greedy decoding; causal prompts are padded on the left, so that all end together, those of encoders on the right.

    An encoder that counts positions from the first token would otherwise read padded rows at other positions.
    """
    task, model = objective.task, objective.model
    losses = -objective.scores(objective.scoring_batch(rows)).cpu().double()[:, 0]
    seq2seq = objective.kind == "seq2seq"
    prompts = [row.prompt for row in rows]
    ids, mask = pad(prompts, task.pad, left=not seq2seq), mask_of(prompts, left=not seq2seq)
    output = model.generate(  # type: ignore[operator]
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=task.end,
        pad_token_id=task.pad,
    )
    new = output[:, 1:] if seq2seq else output[:, ids.shape[1] :]
    texts = [decode(_until_end(tokens.tolist(), task)) for tokens in new]
    return [(normalise(text, task), float(loss), None) for text, loss in zip(texts, losses, strict=True)]


def _until_end(tokens: list[int], task: Task) -> list[int]:
    return tokens[: tokens.index(task.end)] if task.end in tokens else tokens
