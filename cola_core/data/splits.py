"""Who trains, who validates, who tests: MeZO's rule (arXiv 2305.17333, large_models/tasks.py), by hash, not by RNG.

One permutation of the training file under the seed; its first `train + validation` rows are taken and the last
`validation` of them validate. Test rows come from the test file, or are set apart from the training file first; rows
that are held out of the training file beside them are the same under every seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

from cola_core.config.task import PrepareConfig
from cola_core.data.examples import Example
from cola_core.errors import UserError
from cola_core.seeds import derive

__all__ = ["Duplicates", "Splits", "split"]


@dataclass(frozen=True)
class Duplicates:
    """Rows of the training file that stand elsewhere too; a row may be counted in two of the first three.

    repeated: same prompt and label as an earlier row; conflicting: an earlier row's prompt with a new label;
    in_test: the prompt of a test row; test_prompts: different prompts among those; dropped: rows taken out, with those
    of a test row's group.
    """

    repeated: int
    conflicting: int
    in_test: int
    test_prompts: int
    dropped: int


@dataclass(frozen=True)
class Splits:
    """The four splits; `probe` is a sample of `train`, the other three share no row."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    probe: list[Example]
    duplicates: Duplicates

    def parts(self) -> dict[str, list[Example]]:
        """The splits by name."""
        return {name: getattr(self, name) for name in ("train", "validation", "test", "probe")}

    def duplicate_counts(self) -> dict[str, int]:
        """`duplicates` as plain data."""
        return asdict(self.duplicates)


def split(train: Sequence[Example], test: Sequence[Example] | None, config: PrepareConfig, seed: int) -> Splits:
    """Split examples; the same seed and rows give the same splits on every machine and library version.

    Args:
        train: rows of the training file, in its order.
        test: rows of the test file, or None to set `config.test` rows of the training file apart.

    Raises:
        UserError: not enough rows, or duplicates under `duplicates: refuse`.
    """
    held, train = _held_out(train, config)
    shown, rest = _test_rows(train, test, config, seed) if test or config.held_out is None else ([], train)
    shown = [*shown, *held]
    kept, duplicates = _without_duplicates(rest, [*(test or []), *shown], config)
    chosen = _permuted(kept, seed, "split")
    wanted = len(chosen) - config.validation if config.train is None else config.train
    if wanted < 1 or wanted + config.validation > len(chosen):
        asked = f"{config.train or 'at least 1'} to train + {config.validation} to validate"
        dropped = f" ({duplicates.dropped} duplicates dropped)" * bool(duplicates.dropped)
        raise UserError(
            f"params.yaml: prepare: {asked} asked, but the training file has {_rows(len(chosen))} left{dropped}"
        )
    taken, validation = chosen[:wanted], chosen[wanted : wanted + config.validation]
    if config.probe > wanted:
        raise UserError(
            f"params.yaml: prepare.probe: is {config.probe}, but there are only {_rows(wanted)} to train on"
        )
    return Splits(taken, validation, shown, _permuted(taken, seed, "probe")[: config.probe], duplicates)


def _held_out(train: Sequence[Example], config: PrepareConfig) -> tuple[list[Example], list[Example]]:
    """The rows of `prepare.held_out` and all others, both in the file's order.

    Groups stand in one order, that of their hash, whatever the range; one that an end of it would cut is in no range.
    """
    if config.held_out is None:
        return [], list(train)
    first, last = config.held_out.skip, config.held_out.skip + config.held_out.rows
    if last > len(train):
        raise UserError(
            f"params.yaml: prepare.held_out: asks for {config.held_out.rows} rows after {first} others, but the "
            f"training file has {_rows(len(train))}"
        )
    kin = [example.group or example.prompt for example in train]
    sizes = Counter(kin)
    order = sorted(sizes, key=lambda group: derive(0, "held_out", group))
    ends = dict(zip(order, accumulate(sizes[group] for group in order), strict=True))
    parts: tuple[list[Example], list[Example]] = [], []
    for group, example in zip(kin, train, strict=True):
        inside = first <= ends[group] - sizes[group] and ends[group] <= last
        parts[not inside].append(example)
    if not parts[0]:
        raise UserError(
            f"params.yaml: prepare.held_out: no whole group of prepare.group lies within rows {first} to {last}; "
            "ask for more rows"
        )
    return parts


def _test_rows(
    train: Sequence[Example], test: Sequence[Example] | None, config: PrepareConfig, seed: int
) -> tuple[list[Example], list[Example]]:
    """The test split and what is left of the training file, both in the order of their file."""
    source = train if test is None else test
    if test is None and config.test is None:
        raise UserError("params.yaml: prepare.test: without fetch.data.test it must say how many rows to set apart")
    if (config.test or 0) > len(source):
        raise UserError(f"params.yaml: prepare.test: is {config.test}, but the file has only {_rows(len(source))}")
    sampled = {example.id for example in _permuted(source, seed, "test")[: config.test]}
    shown = [example for example in source if example.id in sampled]
    return shown, [e for e in train if e.id not in sampled] if test is None else list(train)


def _without_duplicates(
    train: Sequence[Example], test: Sequence[Example], config: PrepareConfig
) -> tuple[list[Example], Duplicates]:
    """Count duplicates by whole rendered prompt, before truncation; drop, keep or refuse them.

    A training row of a test row's group goes in any case, where groups are named.
    """
    policy, tested = config.duplicates, {example.prompt for example in test}
    labels: dict[str, dict[str, Example]] = {}
    found: dict[str, list[tuple[Example, Example | None]]] = {"repeated": [], "conflicting": [], "in_test": []}
    for example in train:
        seen = labels.setdefault(example.prompt, {})
        if seen:
            kind = "repeated" if example.reference in seen else "conflicting"
            found[kind].append((example, next(iter(seen.values()))))
        if example.prompt in tested:
            found["in_test"].append((example, None))
        seen.setdefault(example.reference, example)
    counts = {kind: len(pairs) for kind, pairs in found.items()}
    if policy == "refuse" and any(counts.values()):
        _refuse(found, counts)
    bad = {pair[0].id for pairs in found.values() for pair in pairs} if policy == "drop_from_train" else set()
    kin = {example.group for example in test} if config.group else set()
    bad |= {example.id for example in train if example.group in kin}
    leaked = len({example.prompt for example, _ in found["in_test"]})
    return [e for e in train if e.id not in bad], Duplicates(**counts, test_prompts=leaked, dropped=len(bad))


def _refuse(found: dict[str, list[tuple[Example, Example | None]]], counts: dict[str, int]) -> None:
    example, earlier = next(pair for pairs in found.values() for pair in pairs)
    twin = f"the row at {earlier.place}" if earlier else "a test row"
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    raise UserError(
        f"{example.place}: the same prompt as {twin} ({told}), and prepare.duplicates is 'refuse'; "
        "allowed: drop_from_train, keep"
    )


def _permuted(examples: Sequence[Example], seed: int, purpose: str) -> list[Example]:
    """Examples ordered by a hash of seed, purpose and position: no random generator that a new version may change."""
    keys = [derive(seed, purpose, index) for index in range(len(examples))]
    return [examples[index] for index in sorted(range(len(examples)), key=keys.__getitem__)]


def _rows(count: int) -> str:
    return f"{count} row" + "s" * (count != 1)
