"""Answers, metrics and intervals against scikit-learn and closed forms."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from transformers import BartConfig, BartForConditionalGeneration

from cola_core.config.report import EvaluateConfig
from cola_core.config.task import HeadConfig
from cola_core.errors import UserError
from cola_core.evaluation.answers import answer, normalise, sample, write_predictions
from cola_core.evaluation.metrics import STATISTICS, calibration_error, confusion, majority, summary
from cola_core.head import fit_head
from cola_core.knot import open_chain
from cola_core.rows import Row, Task
from cola_core.scoring import Objective
from tests.lab import FAMILIES, FP32, FP64, KINDS, base_of, root_of, rows_of, task_of

CONFIG = EvaluateConfig(rows="all", prefixes=True, batch=4, batch_tokens=None, resamples=200, confidence=0.95)
WORDS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=4, max_size=60)


@settings(max_examples=30, deadline=None)
@given(WORDS)
def test_scores_are_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    gold, said = zip(*pairs, strict=True)
    found = summary(said, gold, [0.0] * len(gold), CONFIG, seed=0)
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, said))
    assert found["macro_f1"] == pytest.approx(f1_score(gold, said, average="macro"))
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
    assert confusion(said, gold, list("abcd")) == confusion_matrix(gold, said, labels=list("abcd")).tolist()
    assert found == summary(said, gold, [0.0] * len(gold), CONFIG, seed=0), "same seed, same interval"


def test_macro_f1_of_every_resample_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    true, said = generator.integers(0, 3, (40, 6)), generator.integers(0, 4, (40, 6))
    expected = [f1_score(t, s, average="macro") for t, s in zip(true, said, strict=True)]
    np.testing.assert_allclose(dict(STATISTICS)["macro_f1"](true, said, axis=-1), expected)


def test_a_perfect_model_has_a_perfect_interval() -> None:
    gold = ["a"] * 20 + ["rare"]
    found = summary(gold, gold, [0.0] * len(gold), CONFIG, seed=0)
    assert found["macro_f1_low"] == found["macro_f1"] == found["macro_f1_high"] == 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(0), 0
    for seed in range(100):
        correct = generator.random(200) < 0.7
        said = ["a" if right else "b" for right in correct]
        found = summary(said, ["a"] * 200, [0.0] * 200, CONFIG, seed)
        covered += found["accuracy_low"] <= 0.7 <= found["accuracy_high"]
    assert 87 <= covered <= 100


def test_majority_answers_the_commonest_training_label() -> None:
    found = majority(["a", "b", "b"], ["a", "b", "a", "a"], CONFIG, seed=0)
    assert found["accuracy"] == 0.25
    assert "loss" not in found


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(1, 80))
def test_the_sample_keeps_every_labels_share(labels: list[int], count: int) -> None:
    rows = [Row(f"test:{i}", [1], [2], label, "") for i, label in enumerate(labels)]
    found = sample(rows, count)
    assert len(found) == min(count, len(rows))
    assert found == sample(rows, count)
    assert [int(row.id[5:]) for row in found] == sorted(int(row.id[5:]) for row in found)
    shares, whole = Counter(row.label for row in found), Counter(labels)
    for label, n in whole.items():
        assert abs(shares[label] - n * len(found) / len(rows)) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_come_back_in_row_order(family: str, tmp_path: Path) -> None:
    objective = open_chain(base_of(family), root_of(family, tmp_path), task_of(family), FP64)
    rows = rows_of(family, 11)
    found = answer(objective, rows, 4, str)
    for row, said, loss in zip(rows, found.predicted, found.loss, strict=True):
        with torch.no_grad():
            scores = objective.scores(objective.scoring_batch([row]))[0]
        assert said == "abc"[int(scores.argmax())]
        assert loss == pytest.approx(-float(scores.log_softmax(-1)[row.label]), abs=1e-5)
    write_predictions(tmp_path / "p.arrow", rows, {"base": found})
    table = pa.ipc.open_stream((tmp_path / "p.arrow").read_bytes()).read_all()
    assert table.column_names == ["id", "gold", "base_predicted", "base_correct", "base_loss", "base_confidence"]


@pytest.mark.parametrize("family", [f for f in FAMILIES if KINDS[f] != "encoder"])
def test_generated_answers_do_not_depend_on_the_batch(family: str, tmp_path: Path) -> None:
    task = Task("generate", "answer", "sum", [], [], 1, 2, 0 if family == "t5" else None, 5, None)
    objective = open_chain(base_of(family), root_of(family, tmp_path), task, FP64)
    rows = [Row(row.id, row.prompt, [*row.answer, 2], -1, "x") for row in rows_of(family, 5)]
    together = answer(objective, rows, 5, lambda ids: " ".join(map(str, ids)))
    alone = [answer(objective, [row], 1, lambda ids: " ".join(map(str, ids))).predicted[0] for row in rows]
    assert together.predicted == alone
    assert all(len(text.split()) <= 5 for text in alone)


def test_generated_answers_do_not_depend_on_the_batch_where_positions_are_absolute() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in SIZES.items()}
    sizes |= {"d_model": 16, "vocab_size": 60, "max_position_embeddings": 64, "init_std": 0.8}
    model: Any = BartForConditionalGeneration(BartConfig(**sizes, forced_eos_token_id=None)).double()
    objective = Objective(model, "seq2seq", Task("generate", "answer", "sum", [], [], 1, 2, 2, 6, None))
    rows = [Row(f"test:{n}", list(range(5, 5 + n)), [7, 2], -1, "x") for n in (2, 5, 9, 14)]
    together = answer(objective, rows, 4, lambda ids: " ".join(map(str, ids))).predicted
    alone = [answer(objective, [row], 1, lambda ids: " ".join(map(str, ids))).predicted[0] for row in rows]
    assert together == alone
    assert len(set(alone)) > 1


SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_float64_is_made_after_the_copy_from_the_device(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some devices have no float64."""
    generate = Task("generate", "answer", "sum", [], [], 1, 2, None, 2, None)
    models = [open_chain(base_of(family), root_of(family, tmp_path), task_of(family), FP32)]
    models += [Objective(models[0].model, "causal", generate)] if family == "llama" else []
    copy, widen = torch.Tensor.cpu, torch.Tensor.double
    copied: list[torch.Tensor] = []

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(copy(tensor))
        return copied[-1]

    def double(tensor: torch.Tensor) -> torch.Tensor:
        assert any(tensor is one for one in copied)
        return widen(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "double", double)
    for objective in models:
        answer(objective, rows_of(family, 3), 2, str)
    if family == "bert":
        fit_head(models[0], rows_of(family, 12), HEAD)
    assert copied


HEAD = HeadConfig(inverse_regularisation=1.0, max_iterations=2000)


def test_a_head_for_rows_of_one_class_is_refused(tmp_path: Path) -> None:
    objective = open_chain(base_of("bert"), root_of("bert", tmp_path), task_of("bert"), FP32)
    rows = [Row(f"train:{i}", [40 + i], [], 1, "b") for i in range(4)]
    with pytest.raises(UserError, match=r"^prepare\.train: all training rows \(4\) are of class 'b'; .*two classes$"):
        fit_head(objective, rows, HEAD)


def test_an_empty_extraction_is_never_correct(tmp_path: Path) -> None:
    task = Task("generate", "answer", "sum", [], [], 1, 2, None, 2, "never (seen)")
    objective = open_chain(base_of("llama"), root_of("llama", tmp_path), task, FP32)
    rows = [Row(row.id, row.prompt, [*row.answer, 2], -1, "x") for row in rows_of("llama", 3)]
    found = answer(objective, rows, 3, str)
    assert found.predicted == found.gold == [""] * 3
    assert found.correct == [False] * 3


def test_normalisation_reads_the_extracted_answer() -> None:
    gsm8k = Task("generate", "answer", "sum", [], [], 1, 2, None, 5, r"####\s*(\S+)")
    assert normalise("So 3 + 4 = 7.\n#### 1,007", gsm8k) == "1007"
    assert normalise("no mark", gsm8k) == ""
    two = Task("generate", "answer", "sum", [], [], 1, 2, None, 5, r"(\d+) (km|m)|none")
    assert normalise("3 km, then 40 m; else none", two) == "40"
    plain = Task("generate", "answer", "sum", [], [], 1, 2, None, 5, None)
    assert normalise("  The  Answer. ", plain) == "the answer"


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=60))
def test_the_calibration_error_is_the_mean_gap_over_even_bins(answers: list[tuple[bool, float]]) -> None:
    right, sure = zip(*answers, strict=True)
    expected = 0.0
    for place in range(15):
        low, high = place / 15, (place + 1) / 15
        inside = [(r, s) for r, s in answers if low <= s < high or (place == 14 and s == 1.0)]
        if inside:
            gap = abs(sum(r for r, _ in inside) / len(inside) - sum(s for _, s in inside) / len(inside))
            expected += gap * len(inside) / len(answers)
    assert calibration_error(right, sure) == pytest.approx(expected, abs=1e-9) or any(
        abs(s * 15 - round(s * 15)) < 1e-9 for s in sure
    ), "a confidence on the edge of two bins may fall into either"
