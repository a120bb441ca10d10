"""Evaluation: rows per second of choice scoring, beside one forward per candidate with transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.pairs import Pairs, timed
from benchmarks.results import Row, compared
from benchmarks.setting import Setting
from cola_core.evaluation.answers import answer
from cola_core.rows import Row as Example

__all__ = ["scoring"]

BATCH = 16


def scoring(where: Setting, name: str, goal: float, rows: int, pairs: int) -> Row:
    """Rows per second, ours / peer: the same rows, batch size and weights; both choose the same candidates."""
    objective, examples = where.objective(), where.test[:rows]
    model, found = where.model(), Pairs()
    answers, chosen = [], []
    one_by_one(model, examples[:BATCH], where.task.candidates[:1])
    answer(objective, examples[:BATCH], BATCH, str)
    for _ in range(pairs):
        ours = timed(lambda: answers.append(answer(objective, examples, BATCH, str)))
        peer = timed(lambda: chosen.append(one_by_one(model, examples, where.task.candidates)))
        found.add(rows / ours, rows / peer)
    for given, scores in zip(answers, chosen, strict=True):
        assert given.predicted == [where.task.labels[int(i)] for i in scores.argmax(1)], "another candidate was chosen"
        losses = -scores.log_softmax(1)[range(rows), [row.label for row in examples]]
        torch.testing.assert_close(torch.tensor(given.loss), losses, atol=1e-3, rtol=1e-3)
    what = f"choice scoring, {len(where.task.candidates)} candidates, beside one forward per candidate"
    return compared(name, what, found, goal, unit="rows/s", at_least=True)


@torch.no_grad()
def one_by_one(model: torch.nn.Module, rows: Sequence[Example], candidates: Sequence[Sequence[int]]) -> Tensor:
    """rows x candidates summed log-probabilities, as a careful evaluation script with transformers computes them.

    Rows are sorted by length, and of the logits only the candidate's positions are normalised.
    """
    scores = torch.zeros(len(rows), len(candidates))
    ranked = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for start in range(0, len(rows), BATCH):
        batch = ranked[start : start + BATCH]
        for column, candidate in enumerate(candidates):
            scores[batch, column] = _batch(model, [rows[i].prompt for i in batch], candidate)
    return scores


def _batch(model: torch.nn.Module, prompts: Sequence[Sequence[int]], candidate: Sequence[int]) -> Tensor:
    texts = [[*prompt, *candidate] for prompt in prompts]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    found = model(input_ids=ids, attention_mask=mask).logits
    places = [range(len(prompt) - 1, len(prompt) - 1 + len(candidate)) for prompt in prompts]
    needed = torch.stack([found[i, list(place)] for i, place in enumerate(places)]).log_softmax(-1)
    return needed[:, range(len(candidate)), list(candidate)].sum(-1)
