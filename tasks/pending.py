"""What is left for `sync` to do, told in a moment from files: opening MLflow takes seconds."""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path

from cola_core.errors import UserError
from cola_core.files import new_file
from tasks.places import home
from tasks.store import tracking_uri

__all__ = ["note_synced", "orphans", "state", "unsynced"]


def unsynced() -> bool:
    """Whether `sync` may find anything to do."""
    note = home() / "synced"
    try:
        return bool(orphans()) or not note.is_file() or note.read_text(encoding="utf-8") != state()
    except UserError:
        return True  # a bad address: sync says so


def note_synced(before: str) -> None:
    """Keep `before`, what `state` said when a sync began that has ended well."""
    with new_file(home() / "synced") as temporary:
        temporary.write_text(before, encoding="utf-8")


def state() -> str:
    """A hash over the names of records, the store's address and, where it is a file, which one."""
    uri = tracking_uri()
    names = [path.name for path in sorted((home() / "records").glob("*.json"))]
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    which = str(file.stat().st_ino) if file and file.is_file() else ""
    return hashlib.sha256("\n".join([uri, which, *names]).encode()).hexdigest()


def orphans() -> list[Path]:
    """Markers of live runs whose process is gone: one that lives holds its marker's lock."""
    return [path for path in sorted((home() / "live").glob("*.json")) if _free(path)]


def _free(path: Path) -> bool:
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):  # it lives; another sync was quicker
        return False
    return True
