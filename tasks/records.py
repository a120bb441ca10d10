"""The record of an executed stage: what it used, made and measured, for `sync` to post to MLflow."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cola_core.files import read_json, tree_hash
from cola_core.sealed import write_sealed
from cola_core.secrets import masked
from tasks.context import Context, Done
from tasks.places import home

__all__ = ["identity", "machine", "record"]


def identity(path: Path) -> str:
    """The hash by which records know an artifact: of its manifest where it has one, else of all its bytes."""
    for manifest in ("cola.json", "link.json", "chain.json", "manifest.json"):
        if (path / manifest).is_file():
            return tree_hash(path / manifest)
    return tree_hash(path)


def chain_hash(paths: Sequence[Path]) -> str | None:
    """The hash that commits to the whole chain so far, from the first path that carries one."""
    for path in paths:
        if (path / "chain.json").is_file():
            return str(read_json(path / "chain.json")["hash"])
        if (path / "link.json").is_file():
            return tree_hash(path / "link.json")
    return None


def machine() -> dict[str, Any]:
    """What the last digits depend on, of a process that has computed anything."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "instructions": instructions, "threads": torch.get_num_threads()}


def record(context: Context, done: Done, started: float, status: str = "FINISHED") -> Path:
    """Leave what a run used, made and measured under `.cola/records`; `sync` posts it to MLflow once."""
    now = time.time()
    content = {
        "id": context.record_id,
        "stage": context.stage,
        "status": status,
        "experiment": context.raw["register"]["name"],
        "chain": chain_hash([*done.outputs, *done.inputs]),
        "started": datetime.fromtimestamp(started, UTC).isoformat(),
        "seconds": round(now - started, 3),
        "params": masked(context.used),
        "machine": machine(),
        "recipe": context.raw["recipe"],
        "task": context.raw["task"],
        "seed": context.raw["seed"],
        "metrics": done.metrics,
        "series": done.series,
        "inputs": {path.as_posix(): identity(path) for path in done.inputs},
        "outputs": {path.as_posix(): identity(path) for path in done.outputs},
        "artifacts": [str(path.resolve()) for path in done.artifacts],
    }
    path = home() / "records" / f"{context.stage}-{context.record_id}.json"
    write_sealed(path, "record", content)
    return path
