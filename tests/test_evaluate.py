"""Answers, metrics and intervals against scikit-learn and closed forms."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from cola_core.batches import Row, Task
from cola_core.config.report import EvaluateConfig
from cola_core.evaluation.answers import answer, normalise, sample, write_predictions
from cola_core.evaluation.metrics import confusion, majority, summary
from cola_core.links import open_chain
from tests.lab import FAMILIES, FP64, KINDS, base_of, root_of, rows_of, task_of

CONFIG = EvaluateConfig(rows="all", prefixes=True, batch=4, resamples=200, confidence=0.95)
WORDS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=4, max_size=60)


@settings(max_examples=30, deadline=None)
@given(WORDS)
def test_scores_are_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    gold, said = zip(*pairs, strict=True)
    found = summary(said, gold, [0.0] * len(gold), CONFIG, seed=0)
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, said))
    labels = sorted(set(gold))
    assert found["macro_f1"] == pytest.approx(f1_score(gold, said, labels=labels, average="macro", zero_division=0))
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
    assert confusion(said, gold, list("abcd")) == confusion_matrix(gold, said, labels=list("abcd")).tolist()
    assert found == summary(said, gold, [0.0] * len(gold), CONFIG, seed=0), "same seed, same interval"


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


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(1, 80), st.integers(0, 5))
def test_the_sample_keeps_every_labels_share(labels: list[int], count: int, seed: int) -> None:
    rows = [Row(f"test:{i}", [1], [2], label, "") for i, label in enumerate(labels)]
    found = sample(rows, count, seed)
    assert len(found) == min(count, len(rows))
    assert found == sample(rows, count, seed)
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
    assert table.column_names == ["id", "gold", "base_predicted", "base_correct", "base_loss"]


@pytest.mark.parametrize("family", [f for f in FAMILIES if KINDS[f] != "encoder"])
def test_generated_answers_do_not_depend_on_the_batch(family: str, tmp_path: Path) -> None:
    task = Task("generate", "answer", "sum", [], [], 1, 2, 0 if family == "t5" else None, 5, None)
    objective = open_chain(base_of(family), root_of(family, tmp_path), task, FP64)
    rows = [Row(row.id, row.prompt, [*row.answer, 2], -1, "x") for row in rows_of(family, 5)]
    together = answer(objective, rows, 5, lambda ids: " ".join(map(str, ids)))
    alone = [answer(objective, [row], 1, lambda ids: " ".join(map(str, ids))).predicted[0] for row in rows]
    assert together.predicted == alone
    assert all(len(text.split()) <= 5 for text in alone)


def test_normalisation_reads_the_extracted_answer() -> None:
    gsm8k = Task("generate", "answer", "sum", [], [], 1, 2, None, 5, r"####\s*(\S+)")
    assert normalise("So 3 + 4 = 7.\n#### 1,007", gsm8k) == "1007"
    assert normalise("no mark", gsm8k) == ""
    plain = Task("generate", "answer", "sum", [], [], 1, 2, None, 5, None)
    assert normalise("  The  Answer. ", plain) == "the answer"
