"""Splits: MeZO's rule, disjoint, stable, counted duplicates, and what is said when rows do not suffice."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_core.config.base import parse
from cola_core.config.reading import read_yaml
from cola_core.config.task import PrepareConfig
from cola_core.data.examples import Example, read_examples
from cola_core.data.splits import Duplicates, split
from cola_core.errors import UserError

FIXED = {
    "train": ["train:15", "train:3", "train:2", "train:20"],
    "validation": ["train:4", "train:12"],
    "test": ["train:22", "train:25", "train:26"],
    "probe": ["train:2", "train:15"],
}
R8 = Path(os.environ.get("COLA_R8", "artifacts/fetch/data"))


def config(**changes: Any) -> PrepareConfig:
    """Section `prepare` of a small task; keywords replace single values."""
    base = {
        "kind": "choice", "loss": "answer", "score": "sum", "prompt": "{{ text }}", "label": "{{ label }}",
        "answers": {"a": " yes", "b": " no"}, "extract": None, "max_tokens": 32, "max_new_tokens": 8,
        "train": 10, "validation": 5, "probe": 3, "test": None, "duplicates": "drop_from_train",
    }  # fmt: skip
    return parse(PrepareConfig, {**base, **changes}, "prepare")


def rows(prompts: list[str], stem: str = "train", label: str = "a") -> list[Example]:
    return [Example(f"{stem}:{i}", f"{stem}.csv:{i + 1}", {}, p, label) for i, p in enumerate(prompts, 1)]


def ids(part: list[Example]) -> list[str]:
    return [example.id for example in part]


@given(
    prompts=st.lists(st.sampled_from("abcdefghijklmnop"), min_size=12, max_size=40),
    tested=st.lists(st.sampled_from("opqrs"), min_size=1, max_size=6),
    own=st.booleans(),
    policy=st.sampled_from(["drop_from_train", "keep"]),
    seed=st.integers(0, 9),
)
def test_laws(prompts: list[str], tested: list[str], own: bool, policy: str, seed: int) -> None:
    settings = config(train=None, validation=1, probe=1, test=2 if own else None, duplicates=policy)
    train, test = rows(prompts), None if own else rows(tested, "test")
    if len({*prompts} - {*tested}) < 6:
        return
    splits = split(train, test, settings, seed)
    parts = {name: ids(part) for name, part in splits.parts().items()}
    whole = parts["train"] + parts["validation"] + parts["test"]
    assert len(whole) == len(set(whole))
    assert set(parts["probe"]) <= set(parts["train"])
    kept = {e.prompt for e in splits.train + splits.validation}
    if policy == "drop_from_train":
        assert len(kept) == len(splits.train + splits.validation)
        assert not kept & {e.prompt for e in splits.test}
    assert len(whole) + splits.duplicates.dropped == len(train) + len(test or [])
    assert (splits.duplicates.dropped == 0) or policy == "drop_from_train"
    assert split(train, test, settings, seed) == splits


def test_the_last_rows_of_one_permutation_validate() -> None:
    train = rows([str(i) for i in range(100)])
    few = split(train, rows(["x"], "test"), config(train=10, validation=5), 0)
    more = split(train, rows(["x"], "test"), config(train=12, validation=3), 0)
    assert ids(few.train + few.validation) == ids(more.train + more.validation)
    rest = split(train, rows(["x"], "test"), config(train=None, validation=5), 0)
    assert len(rest.train) == 95
    assert ids(rest.train)[:15] == ids(few.train + few.validation)


def test_these_rows_for_this_seed() -> None:
    """Fixed once: another machine, Python or numpy must draw the same rows."""
    splits = split(rows([str(i) for i in range(30)]), None, config(train=4, validation=2, probe=2, test=3), 7)
    assert {name: ids(part) for name, part in splits.parts().items()} == FIXED
    other = split(rows([str(i) for i in range(30)]), None, config(train=4, validation=2, probe=2, test=3), 8)
    assert ids(other.train) != ids(splits.train)


def test_test_rows_are_a_sample_in_file_order() -> None:
    test = rows([f"t{i}" for i in range(50)], "test")
    splits = split(rows([str(i) for i in range(30)]), test, config(test=20), 0)
    numbers = [int(e.id.split(":")[1]) for e in splits.test]
    assert len(numbers) == 20
    assert numbers == sorted(numbers) != list(range(1, 21))


def test_duplicates_are_counted_by_kind() -> None:
    train = rows(["one", "two", "one", "three", "one", "tested"])
    train[4] = Example("train:5", "train.csv:6", {}, "one", "b")
    train += rows([f"n{i}" for i in range(20)], "more")
    test = rows(["tested", "other"], "test")
    dropped = split(train, test, config(train=None), 0)
    assert dropped.duplicates == Duplicates(repeated=1, conflicting=1, in_test=1, test_prompts=1, dropped=3)
    assert len(dropped.train + dropped.validation) == 23
    kept = split(train, test, config(train=None, duplicates="keep"), 0)
    assert kept.duplicates == Duplicates(repeated=1, conflicting=1, in_test=1, test_prompts=1, dropped=0)
    assert len(kept.train + kept.validation) == 26
    with pytest.raises(
        UserError, match=r"train\.csv:4: the same prompt as the row at train\.csv:2 \(1 repeated, 1 con"
    ):
        split(train, test, config(duplicates="refuse"), 0)
    leaked = rows(["x", "tested", "y"])
    with pytest.raises(UserError, match=r"train\.csv:3: the same prompt as a test row"):
        split(leaked, test, config(duplicates="refuse"), 0)


def test_rows_left_out_of_the_test_sample_are_not_trained_on() -> None:
    """A test row that this run does not score must stay unseen for the run that does."""
    test = rows([f"t{i}" for i in range(10)], "test")
    train = rows([f"t{i}" for i in range(10)] + [str(i) for i in range(20)])
    splits = split(train, test, config(train=None, test=2), 0)
    assert splits.duplicates.in_test == 10
    assert not {e.prompt for e in splits.train} & {e.prompt for e in test}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": 26}, "26 to train + 5 to validate asked, but the training file has 30 rows left"),
        ({"train": None, "validation": 30}, "at least 1 to train + 30 to validate asked"),
        ({"probe": 11}, "prepare.probe: is 11, but there are only 10 rows to train on"),
        ({"test": 3}, "prepare.test: is 3, but the file has only 1 row"),
    ],
)
def test_too_few_rows(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        split(rows([str(i) for i in range(30)]), rows(["x"], "test"), config(**changes), 0)
    assert told in str(caught.value)


def test_without_a_test_file_its_size_must_be_given() -> None:
    with pytest.raises(UserError, match=r"prepare\.test: without fetch\.data\.test it must say how many"):
        split(rows(["x"]), None, config(), 0)


@pytest.mark.skipif(not (R8 / "train.tab").is_file(), reason="needs the stage fetch's files (COLA_R8 names a folder)")
def test_reuters_r8() -> None:
    settings = parse(PrepareConfig, read_yaml(Path("conf/task/r8.yaml"))["prepare"], "prepare")
    train, test = read_examples(R8 / "train.tab", settings), read_examples(R8 / "test.tab", settings)
    assert (len(train), len(test)) == (5485, 2189)
    found = split(train, test, settings, 0).duplicates
    assert found == Duplicates(repeated=58, conflicting=4, in_test=5, test_prompts=4, dropped=66)


GROUPED = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 30)), min_size=30, max_size=60, unique=True)


def grouped(pairs: list[tuple[str, int]]) -> list[Example]:
    return [Example(f"train:{i}", f"t.csv:{i}", {}, f"{g}{n}", "a", g) for i, (g, n) in enumerate(pairs, 1)]


@given(GROUPED, st.integers(1, 8), st.integers(0, 8), st.integers(0, 99))
def test_held_out_rows_are_the_same_under_every_seed_and_no_group_stands_on_both_sides(
    pairs: list[tuple[str, int]], count: int, skip: int, seed: int
) -> None:
    train = grouped(pairs)
    settings = config(train=None, validation=1, probe=1, group="{{ g }}", held_out={"rows": count, "skip": skip})
    try:
        found = split(train, None, settings, seed)
        before = ids(split(train, None, held(skip), 0).test) if skip else []
        after = ids(split(train, None, held(3, skip + count), 0).test)
    except UserError as error:
        assert any(word in str(error) for word in ("held_out", "to train"))
        return
    largest = max(Counter(group for group, _ in pairs).values())
    assert count - 2 * largest < len(found.test) <= count
    assert ids(found.test) == ids(split(train, None, settings, seed + 1).test)
    used = {example.group for example in [*found.train, *found.validation]}
    assert not used & {example.group for example in found.test}
    assert not {*before, *after} & set(ids(found.test)), "two ranges that do not overlap share no row"


def held(rows: int, skip: int = 0) -> PrepareConfig:
    return config(train=None, validation=1, probe=1, group="{{ g }}", held_out={"rows": rows, "skip": skip})


def test_held_out_rows_join_the_test_file_and_their_groups_leave_the_training_rows() -> None:
    train = grouped([(letter, n) for letter in "abcdef" for n in range(5)])
    test = [Example("test:1", "x", {}, "other text", "a", "c")]
    found = split(train, test, config(train=None, validation=1, probe=1, group="{{ g }}", held_out={"rows": 10}), 0)
    assert found.test[0].id == "test:1"
    assert len(found.test) == 11
    groups = {example.group for example in found.test}
    assert not groups & {example.group for example in [*found.train, *found.validation]}
    assert len(found.train) + len(found.validation) + found.duplicates.dropped == 20
    assert len(groups) in (2, 3), "two whole groups of five, and the test file's own"


def test_without_groups_a_prompt_is_one_and_too_few_rows_are_told() -> None:
    train = rows([f"p{i}" for i in range(20)])
    found = split(train, None, config(train=None, validation=1, probe=1, held_out={"rows": 6}), 0)
    assert len(found.test) == 6
    assert not set(ids(found.test)) & set(ids(found.train))
    with pytest.raises(
        UserError, match="held_out: asks for 15 rows after 10 others, but the training file has 20 rows"
    ):
        split(train, None, config(held_out={"rows": 15, "skip": 10}), 0)
    with pytest.raises(UserError, match=r"held_out: no whole group .* within rows 1 to 4"):
        split(grouped([("a", n) for n in range(9)]), None, held(3, 1), 0)
