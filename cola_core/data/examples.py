"""Rows of a data file with their rendered prompt and checked label: what splits and encoding work on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_core.config.task import PrepareConfig
from cola_core.data.comparison import comparable
from cola_core.data.tables import read_table
from cola_core.data.templates import template
from cola_core.errors import UserError, suggest

__all__ = ["Example", "label_counts", "read_examples"]


@dataclass(frozen=True)
class Example:
    """One row.

    id: file stem and 1-based data row, such as `train:17`; place: `file:line` for messages; row: its columns;
    prompt: the whole rendered prompt; reference: the label's name (choice, classify) or the answer's text (generate);
    group: what `prepare.group` renders to, empty without it.
    """

    id: str
    place: str
    row: dict[str, Any]
    prompt: str
    reference: str
    group: str = ""


def read_examples(path: Path, config: PrepareConfig) -> list[Example]:
    """Read and render every row of a data file, in the file's order.

    Raises:
        UserError: anything wrong with the file, a template, a label that `answers` does not have, or an answer in which
            `extract` finds nothing; with file:line.
    """
    table = read_table(path)
    prompt, label = template("prepare.prompt", config.prompt), template("prepare.label", config.label)
    group = template("prepare.group", config.group) if config.group else None
    examples = []
    for index, row in enumerate(table.rows):
        place = table.place(index)
        reference = _checked(label.render(row, place), config, place)
        kin = group.render(row, place) if group else ""
        examples.append(Example(f"{path.stem}:{index + 1}", place, row, prompt.render(row, place), reference, kin))
    return examples


def label_counts(references: Iterable[str], config: PrepareConfig) -> dict[str, int]:
    """Rows per label, in the order of the label indices (sorted names); empty for generate."""
    counts = dict.fromkeys(sorted(config.answers), 0)
    for reference in references:
        if reference in counts:
            counts[reference] += 1
    return counts


def _checked(reference: str, config: PrepareConfig, place: str) -> str:
    """Spaces around a label's name carry nothing; those around a free answer are part of it."""
    if config.answers and reference.strip() not in config.answers:
        known = sorted(config.answers)
        raise UserError(
            f"{place}: prepare.label: {reference.strip()!r} is no key of prepare.answers{suggest(reference, known)}"
        )
    if not reference.strip():
        raise UserError(f"{place}: prepare.label: the answer is empty")
    if config.extract and not config.answers and not comparable(reference, config.extract):
        raise UserError(f"{place}: prepare.extract: finds nothing to compare in the row's own answer")
    return reference.strip() if config.answers else reference
