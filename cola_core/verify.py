"""Prove a chain: every file is what it was, and every prefix still gives the scores it gave when its knot was tied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field

from cola_core.axes.bases import BASES
from cola_core.checksums import check_hashes
from cola_core.config.base import Strict, parse
from cola_core.config.recipe import MachineConfig
from cola_core.errors import UserError
from cola_core.files import tree_hash
from cola_core.knot import open_chain, sample_scores
from cola_core.lineage import read_chain
from cola_core.root import base_manifest
from cola_core.rows import Task
from cola_core.split_files import read_rows

__all__ = ["Verdict", "verify_chain"]


class Knot(Strict, extra="ignore"):
    """What is read of a link's knot: sample rows by id and their scores, which anybody may have written."""

    rows: list[str] = Field(min_length=1)
    scores: list[list[float]]


@dataclass(frozen=True)
class Verdict:
    """One prefix: its last link, that link's hash, and how far the scores of its sample rows moved."""

    link: int
    hash: str
    change: float


def verify_chain(last: Path, base: Path, prepared: Path, machine: MachineConfig) -> Iterator[Verdict]:
    """Check all hashes from the last link down to the base's own files, then rebuild and score every prefix.

    Args:
        last: folder of the final link, `links/<M>/adapter`.
        prepared: where task.json and validation.arrow stand, whose rows link.json names.

    Raises:
        UserError: the first file that changed, or the first prefix whose scores moved beyond the store's tolerance.
    """
    chain = read_chain(last)
    _check_base(base, chain[0].record["base"]["hash"])
    task = Task.read(prepared / "task.json")
    rows = {row.id: row for row in read_rows(prepared / "validation.arrow")}
    for link in chain[1:]:
        knot = parse(Knot, link.record.get("knot"), "knot", file=str(link.folder / "link.json"))
        if any(name not in rows for name in knot.rows):
            raise UserError(f"{prepared / 'validation.arrow'}: not the rows that link {link.number} was tied with")
        objective = open_chain(base, chain[: link.number + 1], task, machine)
        found = sample_scores(objective, [rows[name] for name in knot.rows])
        if [len(scores) for scores in knot.scores] != [found.shape[1]] * len(found):
            raise UserError(
                f"{link.folder / 'link.json'}: knot: its scores are not those of its rows; `dvc checkout` it"
            )
        recorded = torch.tensor(knot.scores, dtype=torch.float64)
        change = float((found - recorded).abs().max())
        if not change <= BASES[machine.dtype].tolerance * max(1.0, float(recorded.abs().max())):
            raise UserError(
                f"{link.folder}: rebuilt from its files, links 1..{link.number} move a score by {change:.3g}"
            )
        yield Verdict(link.number, link.hash, change)


def _check_base(base: Path, expected: str) -> None:
    found = tree_hash(base / "cola.json")
    if found != expected:
        raise UserError(
            f"{base}: is another base ({found[:12]}) than the chain's ({expected[:12]}); run `dvc checkout`"
        )
    check_hashes(base, base_manifest(base).get("files"), tree_hash)
