"""What must hold of a project after it was disturbed: the same hashes, nothing left over, everything in MLflow once."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import environment, hashes

__all__ = ["Outcome", "outcome"]

WRONG = ("RUNNING", "FAILED", "twice")


@dataclass(frozen=True)
class Outcome:
    """hashes: of every out in dvc.lock, and of the files in it; left: temporaries; runs: of MLflow, by state, and how
    many records it has `twice`; versions: of MLflow's model; due: stages that would run again."""

    hashes: dict[str, str]
    left: list[str]
    runs: Counter[str]
    versions: int
    due: str

    def differences(self, wanted: Outcome) -> list[str]:
        """What is not as in an undisturbed run, in words."""
        found = [f"hash of {name} differs" for name, value in wanted.hashes.items() if self.hashes.get(name) != value]
        found += [f"left over: {name}" for name in self.left]
        found += [f"{count} MLflow run(s) {state}" for state, count in self.runs.items() if state in WRONG and count]
        if self.runs["FINISHED"] < wanted.runs["FINISHED"]:  # more where a kill cost DVC a stage that had ended
            found.append(f"{self.runs['FINISHED']} MLflow runs of {wanted.runs['FINISHED']}")
        found += [f"{self.versions} model versions"] * (self.versions != 1)
        found += [f"would run again: {self.due}"] * bool(self.due)
        return found


def outcome(root: Path, cache: str) -> Outcome:
    """Look at a project whose last command ended well."""
    left = [p for place in (root, Path(cache), root.parent / "tmp") for p in place.rglob(".*.cola-tmp")]
    left += [p for place in ("artifacts", ".dvc/cache") for p in (root / place).rglob(".*.tmp")]
    left += [p for p in (root / ".cola/live").glob("*") if p.is_file()]
    left += list((root.parent / "tmp").glob("tmp*"))
    with sqlite3.connect(root / "mlflow.db") as store:
        states = Counter(state for (state,) in store.execute("select status from runs"))
        twice = store.execute("select value from tags where key = 'cola.record' group by value having count(*) > 1")
        states["twice"] = len(twice.fetchall())
        (versions,) = store.execute("select count(*) from model_versions").fetchone()
    command = [sys.executable, "-m", "dvc", "repro", "--dry"]
    dry = subprocess.run(command, cwd=root, env=environment(cache), capture_output=True, text=True, check=True).stdout
    due = ", ".join(line.split("'")[1] for line in dry.splitlines() if line.startswith("Running stage"))
    outs = hashes(root)
    return Outcome(outs | _files(root, outs), [str(path) for path in left], states, int(versions), due)


def _files(root: Path, outs: dict[str, str]) -> dict[str, str]:
    """Path -> hash of every file in an out that is a folder."""
    found = {}
    for name, value in outs.items():
        listing = root / ".dvc/cache/files/md5" / value[:2] / value[2:]
        if value.endswith(".dir") and listing.exists():
            found.update({f"{name}/{file['relpath']}": file["md5"] for file in json.loads(listing.read_text())})
    return found
