"""What is left for `sync` to do, told in a moment from files: opening MLflow takes seconds."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from cola_core.errors import UserError
from cola_core.files import new_file
from cola_core.locks import try_lock
from tasks.places import home
from tasks.store import database_file, tracking_uri

__all__ = ["new_store", "note_synced", "orphans", "state", "unposted_files", "unsynced"]


def unsynced() -> bool:
    """Whether `sync` may find anything to do."""
    try:
        return any(orphans()) or _noted() != state()
    except UserError:
        return True  # a bad address: sync says so


def unposted_files() -> list[Path]:
    """The files that the store may still need: artifacts of records that no finished sync has seen."""
    records = sorted((home() / "records").glob("*.json"))
    where, now = _noted().split("\n"), []
    with suppress(UserError):
        now = state().split("\n")
    late = [path for path in records if where[:2] != now[:2] or path.name not in where]
    return [file for path in late for file in _artifacts(path)]


def _artifacts(record: Path) -> list[Path]:
    try:
        return [Path(file) for file in json.loads(record.read_text(encoding="utf-8"))["artifacts"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []  # sync names it


def note_synced(before: str) -> None:
    """Keep `before`, what `state` said when a sync began that has ended well."""
    with new_file(home() / "synced") as temporary:
        temporary.write_text(before, encoding="utf-8")


def new_store(now: str) -> bool:
    """Whether `now`, from `state`, tells of another store than the last sync that ended well has seen."""
    return _noted().split("\n")[:2] != now.split("\n")[:2]


def state() -> str:
    """Lines: a hash of the store's address, which database it is if that is a file, and the names of all records."""
    uri = tracking_uri()
    names = [path.name for path in sorted((home() / "records").glob("*.json"))]
    file = database_file(uri)
    which = _which(file) if file and file.is_file() else ""
    return "\n".join([hashlib.sha256(uri.encode()).hexdigest(), which, *names])


def _which(database: Path) -> str:
    """What tells a database from one made anew in its place, which may get the same inode."""
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as opened:
            born = opened.execute("SELECT min(creation_time) FROM experiments").fetchone()
    except sqlite3.Error:
        return "unreadable"
    return f"{database.stat().st_ino} {born}"


def _noted() -> str:
    note = home() / "synced"
    return note.read_text(encoding="utf-8") if note.is_file() else ""


def orphans() -> Iterator[Path]:
    """Markers of live runs whose process is gone, each locked while it is looked at: one that lives holds its lock."""
    for path in sorted((home() / "live").glob("*.json")):
        marker = try_lock(path)
        if marker is not None:
            with marker:
                yield path
