"""Scores and losses of the shared-prefix batches against one plain forward per row and candidate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from cola_core.knot import open_chain
from cola_core.models import adaptable
from cola_core.packing import use_packing
from cola_core.rows import Row
from cola_core.scoring import Objective, mean_loss
from tests.lab import CANDIDATES, FAMILIES, FP64, KINDS, LINK, base_of, root_of, rows_of, task_of


def plain_scores(model: Any, family: str, rows: list[Row]) -> torch.Tensor:
    """n x C summed log-probabilities, one forward per candidate, every logit."""
    found = torch.zeros(len(rows), 3, dtype=torch.float64)
    for i, row in enumerate(rows):
        prompt = torch.tensor([row.prompt])
        if KINDS[family] == "encoder":
            found[i] = model(input_ids=prompt).logits[0].log_softmax(-1)
            continue
        for j, tokens in enumerate(CANDIDATES):
            if KINDS[family] == "seq2seq":
                logits = model(input_ids=prompt, decoder_input_ids=torch.tensor([[0, *tokens[:-1]]])).logits[0]
            else:
                logits = model(input_ids=torch.tensor([row.prompt + tokens])).logits[0, len(row.prompt) - 1 :]
            found[i, j] = sum(logits.log_softmax(-1)[k, token] for k, token in enumerate(tokens))
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_both_losses(family: str, packed: bool, tmp_path: Path) -> None:
    objective = open_chain(base_of(family), root_of(family, tmp_path), task_of(family), FP64)
    assert objective.packed == (family != "t5")
    objective.packed = packed and objective.packed
    rows = rows_of(family, 9)
    tolerance = 1e-5 if family == "t5" else 1e-9  # transformers takes T5's norms in float32 whatever the dtype
    with torch.no_grad():
        expected = plain_scores(objective.model, family, rows)
        found = objective.scores(objective.scoring_batch(rows))
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        labels = torch.tensor([row.label for row in rows])
        right = expected[range(len(rows)), labels]
        assert float(objective(objective.training_batch(rows))) == pytest.approx(
            -float(right.sum()), abs=tolerance * 10
        )
        objective.task = task_of(family, "candidates")
        loss = functional.cross_entropy(expected, labels, reduction="sum")
        assert float(objective(objective.training_batch(rows))) == pytest.approx(float(loss), abs=tolerance * 10)
        assert mean_loss(objective, rows, LINK) == pytest.approx(float(loss) / 9, abs=tolerance * 10)


@pytest.mark.parametrize("loss", ["answer", "candidates"])
@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_add_up(family: str, loss: str, tmp_path: Path) -> None:
    """8 x 1 = 1 x 8: the loss is a sum and is divided once by the units of the whole step."""
    objective = open_chain(base_of(family), root_of(family, tmp_path), task_of(family, loss), FP64)
    rows = rows_of(family, 8)
    with torch.no_grad():
        whole = float(objective(objective.training_batch(rows)))
        parts = sum(float(objective(objective.training_batch([row]))) for row in rows)
    assert whole == pytest.approx(parts, rel=1e-6)
    units = sum(objective.units(objective.training_batch([row])) for row in rows)
    assert units == objective.units(objective.training_batch(rows))


def test_mean_scores_divide_by_the_candidates_tokens(tmp_path: Path) -> None:
    objective = open_chain(base_of("llama"), root_of("llama", tmp_path), task_of("llama"), FP64)
    rows = rows_of("llama", 4)
    with torch.no_grad():
        sums = objective.scores(objective.scoring_batch(rows))
        objective.task = type(objective.task)(**{**vars(objective.task), "score": "mean"})
        means = objective.scores(objective.scoring_batch(rows))
    torch.testing.assert_close(means, sums / torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))


def test_only_the_needed_logits_are_computed(tmp_path: Path) -> None:
    objective = open_chain(base_of("llama"), root_of("llama", tmp_path), task_of("llama"), FP64)
    seen = []
    objective.model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    batch = objective.training_batch(rows_of("llama", 5))
    objective(batch)
    assert seen == [(len(batch.targets), objective.model.config.vocab_size)]


@pytest.mark.parametrize("loss", ["answer", "candidates"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_packed_rows_have_the_padded_rows_loss_and_gradients(family: str, loss: str, tmp_path: Path) -> None:
    """And compute no token that is not there; padding is the plain path."""
    objective = open_chain(base_of(family), root_of(family, tmp_path), task_of(family, loss), FP64)
    weights = [module.weight.requires_grad_(True) for module in adaptable(objective.model).values()]
    rows, found = rows_of(family, 7), []
    for packed in (True, False):
        objective.packed = packed
        batch = objective.training_batch(rows)
        assert (batch.inputs["input_ids"].numel() == batch.tokens) == packed
        value = objective(batch)
        found.append((value.item(), torch.autograd.grad(value, weights)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    for ours, plain in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-9, rtol=1e-6)
        assert float(plain.abs().sum()) > 0


def test_rows_are_not_packed_where_that_is_not_known_to_work(tmp_path: Path) -> None:
    objective = open_chain(base_of("llama"), root_of("llama", tmp_path), task_of("llama"), FP64)
    objective.model.config.model_type = "unknown"
    assert not use_packing(objective.model)
    assert not use_packing(open_chain(base_of("t5"), root_of("t5", tmp_path / "t5"), task_of("t5"), FP64).model)


@pytest.mark.parametrize("loss", ["answer", "candidates"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_budget_holds_for_what_is_computed(family: str, loss: str, tmp_path: Path) -> None:
    """Candidates count too, whether training compares them or evaluation scores them; padding counts where it is."""
    objective = open_chain(base_of(family), root_of(family, tmp_path), task_of(family, loss), FP64)
    rows = rows_of(family, 12)
    for answered, batch_of in ((False, objective.training_batch), (True, objective.scoring_batch)):
        groups = objective.groups(rows, 8, 60, answered)
        assert sorted(i for group in groups for i in group) == list(range(12))
        for group in groups:
            inputs = batch_of([rows[i] for i in group]).inputs
            computed = inputs["input_ids"].numel() + inputs.get("decoder_input_ids", torch.empty(0)).numel()
            assert computed <= 60 or len(group) == 1


def test_a_token_budget_holds_for_generated_answers(tmp_path: Path) -> None:
    """Their prompts are padded to the longest even where rows are packed; answers count as long as they may get."""
    task = replace(task_of("llama"), kind="generate", candidates=[], max_new_tokens=5)
    objective = open_chain(base_of("llama"), root_of("llama", tmp_path), task, FP64)
    rows = rows_of("llama", 12)
    for group in objective.groups(rows, 8, 60, answered=True):
        assert len(group) * (max(len(rows[i].prompt) for i in group) + 5) <= 60 or len(group) == 1


def test_an_attention_that_the_user_chose_stays(tmp_path: Path) -> None:
    model = open_chain(base_of("llama"), root_of("llama", tmp_path), task_of("llama"), FP64).model
    model.set_attn_implementation("eager")
    assert not Objective(model, "causal", task_of("llama")).packed
    assert model(input_ids=torch.tensor([[1, 2, 3]]), output_attentions=True).attentions
