"""What becomes of a cell's answer: a result file that is final."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cola_core.errors import RetryError, UserError
from cola_core.study.results import Result, result_file, write_packed
from flows.study.orders import Planned

__all__ = ["keep", "raise_if_failed"]


def keep(folder: Path, planned: Planned, answer: Mapping[str, Any], version: str) -> Result:
    """Write a cell's result, final from then on.

    Args:
        folder: of the study's results; answer: what the cell's process said; version: a hash of the code that ran.

    Raises:
        UserError, RetryError: the cell ended with a mistake, or with what may pass.
    """
    raise_if_failed(planned.cell.name, answer)
    cell = planned.cell
    content = {
        "cell": {**vars(cell.group), "phase": cell.phase, "learning_rate": cell.learning_rate, "seed": cell.seed},
        "key": planned.key,
        "command": planned.command,
        "code": version,
        **answer["result"],
    }
    if rows := content.pop("rows", None):
        name = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
        content["rows"] = name
        if not (path := folder / "rows" / f"{name}.json.gz").is_file():
            write_packed(path, rows)
    write_packed(result_file(folder, cell, planned.key), content)
    return Result(cell, content)


def raise_if_failed(name: str, answer: Mapping[str, Any]) -> None:
    """Raise what a cell's process told of cell `name`, if that is an error.

    Raises:
        UserError, RetryError: it is.
    """
    if "error" in answer:
        error = RetryError if answer["code"] == RetryError.exit_code else UserError
        raise error(f"{name}: {answer['stage']}: {answer['error']}")
