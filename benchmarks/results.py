"""Rows of the benchmark, the machine they were measured on, and the file that keeps both."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.pairs import Pairs
from cola_core.files import write_json

__all__ = ["Row", "alone", "compared", "machine", "results_file", "write_results"]

PACKAGES = ("torch", "transformers", "peft", "accelerate", "dvc", "prefect", "mlflow")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Row:
    """One figure.

    what: the figure in words; unit: of ours and peer; n: pairs or repeats behind it; goal: the upper bound (or, with
    `at_least`, the lower) on the median ratio, on ours where there is no peer, null for a figure without one;
    note: what a reader has to know besides.
    """

    id: str
    what: str
    unit: str
    n: int
    ours: float
    peer: float | None
    ratio_median: float | None
    ratio_low: float | None
    ratio_high: float | None
    goal: float | None
    met: bool | None
    at_least: bool = False
    note: str = ""


def compared(
    name: str, what: str, pairs: Pairs, goal: float | None, *, unit: str = "s", at_least: bool = False, note: str = ""
) -> Row:
    """A row with a peer; at_least: ours has to be so many times as large (speed) instead of small (time)."""
    ours, peer = (sorted(side)[len(side) // 2] for side in (pairs.ours, pairs.peer))
    low, high = pairs.spread
    met = None if goal is None else (pairs.median >= goal if at_least else pairs.median <= goal)
    return Row(name, what, unit, len(pairs.ours), ours, peer, pairs.median, low, high, goal, met, at_least, note)


def alone(name: str, what: str, values: Sequence[float], goal: float | None, *, unit: str = "s", note: str = "") -> Row:
    """A row without a peer: the median has to stay below the goal."""
    ours = sorted(values)[len(values) // 2]
    met = None if goal is None else ours <= goal
    return Row(name, what, unit, len(values), ours, None, None, None, None, goal, met, note=note)


def machine(threads: int) -> dict[str, Any]:
    """What the figures hold for: processor, threads and versions; no name of host or user."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", info)
    flags = set(match[1].split()) if (match := re.search(r"flags\s*:\s*(.+)", info)) else set()
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def results_file(about: Mapping[str, Any]) -> str:
    """<date>-<machine>.json."""
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{about['cpu']} {about['cores']} cores".lower()).strip("-")
    return f"{about['date']}-{slug}.json"


def write_results(
    path: Path, about: Mapping[str, Any], rows: Sequence[Row], curves: Sequence[dict[str, Any]], old: Mapping[str, Any]
) -> None:
    """Write the file whole or not at all; called after every figure, so a stopped run keeps the others.

    Args:
        old: an earlier file's content, or {}; what has been measured again takes the place of its figures.
    """
    found = {"rows": [asdict(row) for row in rows], "curves": list(curves)}
    renewed = {kind: _renewed(old.get(kind, []), items) for kind, items in found.items()}
    write_json(path, {"machine": dict(about), **renewed})


def _renewed(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    mine = {item["id"]: item for item in new}
    return [mine.pop(item["id"], item) for item in old] + list(mine.values())


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
