"""Folders that tell when a file in them is not what was written: files.json lists each with its checksum.

Checksums (XXH3, 128 bits) find damage: a flipped bit, a cut file, an edit by hand. They are no proof against a forger;
what a chain commits to is sha256 (`files.tree_hash`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from cola_core.errors import UserError
from cola_core.sealed import damaged, read_sealed, write_sealed

__all__ = ["check_files", "check_hashes", "checksum", "inside", "seal_folder"]

BLOCK = 1 << 22
LONGEST = 255  # bytes of a file's name


def seal_folder(folder: Path) -> None:
    """Write files.json: every other file below `folder` with its checksum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "files.json")
    sums = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
    write_sealed(folder / "files.json", "files", {"files": sums})


def check_files(folder: Path, files: Mapping[str, str] | None = None) -> None:
    """Compare files below `folder` with their checksums, by default those of its files.json.

    Raises:
        UserError: the first that is missing or changed, or a name that leads out of the folder.
    """
    if files is None and folder.is_dir() and not (folder / "files.json").exists():
        raise UserError(
            f"{folder}: has no files.json: version 0.1 wrote none, or it is lost; `dvc repro` makes the folder again, "
            "or `dvc checkout` restores it"
        )
    told = read_sealed(folder / "files.json", "files").get("files") if files is None else files
    check_hashes(folder, told, checksum)


def check_hashes(folder: Path, files: Any, digest: Callable[[Path], str]) -> None:
    """Compare files below `folder` with what a stranger may have written of them: name -> digest.

    Raises:
        UserError: no such list, the first file that is missing or changed, or a name that leads out of the folder.
    """
    if not isinstance(files, dict):
        raise UserError(f"{folder}: its list of files is no object (got {type(files).__name__}); `dvc checkout` it")
    for name, expected in files.items():
        path = inside(folder, name)
        if not path.is_file() or digest(path) != expected:
            raise damaged(path)


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, for a name that a stranger may have written.

    Raises:
        UserError: it leads out of the folder, or is longer than any file system takes.
    """
    parts = PurePosixPath(name).parts
    if len(name.encode(errors="replace")) > LONGEST:
        raise UserError(f"{folder}: names a file {name[:50]!r}[...] of {len(name)} characters; refused")
    if not parts or ".." in parts or parts[0] == "/" or "\\" in name or "\0" in name:
        raise UserError(f"{folder}: names a file outside itself ({name!r}); refused")
    return folder / name


def checksum(path: Path, size: int | None = None) -> str:
    """XXH3 of a file's bytes, or of the first `size` of them; as fast as memory."""
    digest, left = xxhash.xxh3_128(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, BLOCK))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
