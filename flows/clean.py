"""What may go: finished and abandoned workspaces, resume state nobody came back for, leftovers of killed processes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from cola_core.locks import try_lock
from flows.mend import sweep_all
from flows.snapshot import git, runs
from flows.study.disk import tidy
from tasks.pending import unposted_files

__all__ = ["clean", "trim"]

WEEK = 7 * 24 * 3600.0
KEPT = 10  # finished workspaces that `trim` leaves for `cola adopt`


def clean(root: Path, everything: bool = False) -> list[Path]:
    """Remove what no run needs any more; returns what was removed.

    A finished workspace goes at once: its outs are in DVC's cache, and the same run restores them. An interrupted one,
    the resume state of its links, and the shared stages of a study stay for a week so that the same run goes on there.

    Args:
        everything: interrupted runs too, whatever their age; what works at this moment always stays.
    """
    folder = runs(root)
    limit = time.time() - (0.0 if everything else WEEK)
    gone = [*_workspaces(folder, limit), *_resume(folder.parent / "resume", limit), *sweep_all(root)]
    gone += tidy(folder.parent / "studies", limit)
    git(root, "worktree", "prune")
    return gone


def trim(root: Path) -> list[Path]:
    """What a flow removes at its end: as `clean`, but the newest finished workspaces stay."""
    gone = list(_workspaces(runs(root), time.time() - WEEK, KEPT - 1))  # and the flow's own, which is held
    git(root, "worktree", "prune")
    return gone


def _workspaces(folder: Path, limit: float, kept: int = 0) -> Iterator[Path]:
    """Free ones that are finished, but the `kept` newest, half-made or half-removed, or untouched since `limit`.

    What still has files to post stays.
    """
    needed = unposted_files()
    finished = 0
    for note in sorted(folder.glob("*.lock"), key=_age, reverse=True):
        path = note.with_suffix("")
        lock = try_lock(note)
        if lock is None:
            continue
        with lock:
            lock.seek(0)
            said = lock.read()
            finished += said == "finished"
            done = not said or (said == "finished" and finished > kept)  # it says nothing where it was cut off
            stays = _age(note) > limit and not done
            if not stays and not any(file.is_relative_to(path) for file in needed):
                lock.truncate(0)  # killed in the next line, it is no workspace to go on in
                lock.flush()
                shutil.rmtree(path, ignore_errors=True)
                if not path.exists():  # what could not be removed is looked for by its note
                    note.unlink()
                    yield path


def _age(path: Path) -> float:
    """Seconds since 1970; 0 for what another process has just removed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _resume(folder: Path, limit: float) -> Iterator[Path]:
    """Resume folders untouched since `limit`; one that a process still locks is left alone."""
    for path in sorted(folder.glob("*/")):
        if _age(path) > limit or (lock := try_lock(path / "lock")) is None:
            continue
        with lock:
            if max(map(_age, path.rglob("*"))) <= limit:
                shutil.rmtree(path)
                yield path
