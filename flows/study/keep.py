"""What becomes of a cell's answer: a result file that is final, and a record for MLflow."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cola_core.config.reading import load_yaml
from cola_core.errors import RetryError, UserError
from cola_core.sealed import write_sealed
from cola_core.study.design import Design
from cola_core.study.results import Result, result_file, write_packed
from flows.study.orders import Planned
from flows.study.writing import experiment_of, identity
from tasks.places import home

__all__ = ["keep", "raise_if_failed"]


def keep(
    design: Design, folder: Path, planned: Planned, answer: Mapping[str, Any], version: str, started: float
) -> Result:
    """Leave a cell's record for MLflow, which may be left twice, and then its result, final from then on.

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
    result = Result(cell, content)
    _record(design, planned, result, started)
    write_packed(result_file(folder, cell, planned.key), content)
    return result


def raise_if_failed(name: str, answer: Mapping[str, Any]) -> None:
    """Raise what a cell's process told of cell `name`, if that is an error.

    Raises:
        UserError, RetryError: it is.
    """
    if "error" in answer:
        error = RetryError if answer["code"] == RetryError.exit_code else UserError
        raise error(f"{name}: {answer['stage']}: {answer['error']}")


def _record(design: Design, planned: Planned, result: Result, started: float) -> None:
    """Leave the record that `cola sync` makes one MLflow run of."""
    raw, content = load_yaml(planned.params), result.content
    links = content.get("links", [])
    losses = [loss for link in links for loss in link["losses"]]
    numbers = {"validation_loss": result.validation_loss, **result.metrics} if not result.failed else {}
    sections = ("machine", "targets", "schedule", "profile", "allocate", "link", "prepare", "chain")
    record = {
        "id": (name := identity(design, planned.key)),
        "stage": planned.cell.name,
        "status": "FAILED" if result.failed else "FINISHED",
        "experiment": experiment_of(design),
        "chain": links[-1]["chain"] if links else None,
        "started": datetime.fromtimestamp(started, UTC).isoformat(),
        "seconds": round(time.time() - started, 3),
        "params": {"phase": planned.cell.phase, "command": planned.command, **{name: raw[name] for name in sections}},
        "machine": content.get("machine", {}),
        "recipe": planned.cell.group.recipe,
        "task": raw["task"],
        "seed": raw["seed"],
        "metrics": {name: float(value) for name, value in numbers.items()},
        "series": {"loss": [[step, loss] for step, loss in enumerate(losses, start=1)]},
        "inputs": {},
        "outputs": {},
        "artifacts": [],
    }
    write_sealed(home() / "records" / f"cell-{name}.json", "record", record)
