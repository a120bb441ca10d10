"""What each cell leaves: one compressed JSON file, final once it is written; and the test rows that cells share."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola_core.errors import UserError
from cola_core.files import new_file
from cola_core.study.design import Cell, Group

__all__ = ["Result", "read_packed", "read_results", "result_file", "write_packed"]

FORMAT = 1
SHARED = {"fetch", "prepare", "head", "evaluate_base", "profile@1", "allocate@1"}  # no link comes before them


@dataclass(frozen=True)
class Result:
    """One finished cell and the content of its file (see `tasks.harvest`)."""

    cell: Cell
    content: Mapping[str, Any]

    @property
    def failed(self) -> bool:
        """Whether training went wrong, such as by a loss that diverged."""
        return "failed" in self.content

    @property
    def validation_loss(self) -> float:
        """Of the whole chain at its end; infinite where training failed."""
        return math.inf if self.failed else float(self.content["validation_loss"])

    @property
    def metrics(self) -> Mapping[str, float]:
        """Test scores: accuracy, macro_f1, loss, calibration_error; empty for a cell of the sweep."""
        found: Mapping[str, float] = self.content.get("metrics", {})
        return found

    @property
    def cpu_seconds(self) -> float:
        """Of the processor, for all that was done link by link: probes, allocations, training."""
        return float(sum(spent["cpu"] for stage, spent in self.content["spent"].items() if "@" in stage))

    @property
    def interrupted(self) -> bool:
        """Whether a kill came between, so that the times are those of a part."""
        return any("interrupted" in spent for spent in self.content["spent"].values())

    @property
    def seconds(self) -> float:
        """By the clock, for what was this cell's own."""
        return float(sum(spent["seconds"] for stage, spent in self.content["spent"].items() if stage not in SHARED))

    @cached_property
    def correct(self) -> NDArray[np.float64]:
        """1 for every test row answered rightly, in the order of the test rows."""
        return np.array([int(bit) for bit in self.content["predictions"]["correct"]], dtype=float)


def result_file(folder: Path, cell: Cell, key: str) -> Path:
    """Where a cell's result stands; `key` tells its parameters from others under the same name."""
    return folder / "cells" / f"{cell.name}-{key[:8]}.json.gz"


def read_results(folder: Path) -> Iterator[Result]:
    """Every finished cell below a study's folder, in the order of their names.

    Raises:
        UserError: a file that is not what was written.
    """
    for path in sorted((folder / "cells").glob("*.json.gz")):
        content = read_packed(path)
        cell = content["cell"]
        group = Group(cell["model"], cell["task"], cell["recipe"])
        yield Result(Cell(cell["phase"], group, cell["learning_rate"], cell["seed"]), content)


def write_packed(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as compressed JSON, whole or not at all; the same content gives the same bytes."""
    text = json.dumps({**content, "format": FORMAT}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    with new_file(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_packed(path: Path) -> dict[str, Any]:
    """Read what `write_packed` wrote; its own checksum is gzip's.

    Raises:
        UserError: damaged, or of another format.
    """
    try:
        content: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        if content["format"] != FORMAT:
            raise UserError(f"{path}: result format {content['format']}, and this version of cola reads {FORMAT}")
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: no result of a cell ({error}); delete it, and the cell runs again") from None
    return content
