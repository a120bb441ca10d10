"""Mend what a killed DVC leaves: it writes dvc.lock and its table of locks in place, where a kill cuts them off.

Nothing is lost with them: DVC's run cache restores every stage that dvc.lock told of. A folder of that cache which was
made and not yet filled would fail its stage ever after.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from cola_core.assets.cache import cache_root
from cola_core.errors import RetryError, UserError
from cola_core.files import SUFFIX, sweep
from cola_core.locks import try_lock
from flows.project import project
from flows.snapshot import runs
from tasks.follow import alive

__all__ = ["mend", "sweep_all"]

ASIDE = ".dvc/tmp/dvc.lock.cut"


def mend(root: Path) -> list[str]:
    """Put away the cut-off files and abandoned temporaries of DVC in the project at `root`; returns a line for each.

    Nothing is touched while another DVC works there. What killed processes of ours left goes too.
    """
    sweep_all(root)
    if not any(_broken(root)):
        return []
    try:
        with project(root) as repo, repo.lock:
            return [_remove(path, root) for path in _broken(root)]
    except RetryError:
        return []


def sweep_all(root: Path) -> list[Path]:
    """Remove temporaries whose process is gone: here, in every workspace and in the cache; returns them."""
    places = (runs(root).parent, root / "artifacts", cache_root())
    parents = {path.parent for place in places for path in _below(place, f".*{SUFFIX}")}
    return [path for parent in sorted(parents) for path in sweep(parent)]


def _broken(root: Path) -> Iterator[Path]:
    for path, whole in ((root / "dvc.lock", _is_lock_file), (root / ".dvc/tmp/rwlock", _is_lock_table)):
        if path.is_file() and not whole(path):
            yield path
    yield from filter(Path.is_file, _below(root / "artifacts", ".*.tmp"))
    shared = list(filter(Path.is_file, _below(root / ".dvc/cache", ".*.tmp")))
    barren = [folder for folder in (root / ".dvc/cache/runs").glob("*/*/") if set(folder.iterdir()) <= set(shared)]
    if (shared or barren) and not _others_at_work(root):
        yield from [*shared, *barren]


def _below(place: Path, pattern: str) -> Iterator[Path]:
    """Files and folders of such a name anywhere below `place`, while others may be removing them."""
    for folder, folders, files in os.walk(place):
        yield from (Path(folder, name) for name in fnmatch.filter([*folders, *files], pattern))


def _is_lock_file(path: Path) -> bool:
    """Whether every stage in it is whole, as far as its shape tells."""
    text = path.read_bytes()
    if b"\n<<<<<<< " in text:  # the user's own conflict, of which DVC tells
        return True
    try:
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 -- safe  # nosec B506
        return text.endswith(b"\n") and all(map(_is_stage, content["stages"].values()))
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _is_stage(entry: Any) -> bool:
    return bool(entry["cmd"]) and all("path" in item for part in ("deps", "outs") for item in entry.get(part, []))


def _is_lock_table(path: Path) -> bool:
    """Whether a living process holds something in it; DVC takes a zombie or a stranger of the same number for one."""
    written = path.stat().st_mtime
    try:
        held = [info for infos in json.loads(path.read_bytes()).values() for info in infos.values()]
        pids = {int(one["pid"]) for info in held for one in (info if isinstance(info, list) else [info])}
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    return not pids or any(_lived(pid, written) for pid in pids)


def _lived(pid: int, moment: float) -> bool:
    """Whether a process that lives was there at `moment` already."""
    try:
        process = psutil.Process(pid)
        return bool(alive(process) and process.create_time() <= moment)
    except psutil.Error:
        return False


def _others_at_work(root: Path) -> bool:
    """Whether a workspace that shares the cache is held by a run."""
    for note in runs(root).glob("*.lock"):
        lock = try_lock(note)
        if lock is None:
            return True
        lock.close()
    return False


def _remove(path: Path, root: Path) -> str:
    what = f"{path.relative_to(root)}, which a killed DVC had left unfinished"
    if path.name == "dvc.lock":
        (root / ASIDE).parent.mkdir(parents=True, exist_ok=True)
        path.replace(root / ASIDE)
        return f"moved {what}, to {ASIDE}"
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    return f"removed {what}"


if __name__ == "__main__":
    try:
        for line in mend(Path.cwd()):
            print(line, flush=True)
    except UserError as error:
        print(f"mend: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
