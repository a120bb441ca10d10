"""JSON artifacts that tell when they are not what was written: each has a format number and a checksum of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from cola_core.errors import UserError
from cola_core.files import read_json, write_json

__all__ = ["damaged", "read_sealed", "write_sealed"]

# What reads and writes each kind now. 1 was written before formats had numbers (version 0.1); 3 since a link may hold
# coefficients or replace weights (version 0.3).
FORMATS = {"base": 2, "chain": 3, "files": 2, "link": 3, "manifest": 2, "profile": 3, "ranks": 2}
FORMATS |= {"record": 2, "registration": 2, "serve": 2, "task": 2}


def write_sealed(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON with its kind's format number and a checksum of all of it."""
    whole = {**content, "format": FORMATS[kind]}
    whole.pop("checksum", None)
    write_json(path, {**whole, "checksum": _digest(whole)})


def read_sealed(path: Path, kind: str) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises:
        UserError: missing, not JSON, another format, or changed since it was written.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, got {type(content).__name__}; restore it with `dvc checkout`")
    if (found := content.get("format", 1)) != FORMATS[kind]:
        raise UserError(
            f"{path}: {kind} format {found!r}, and this version of cola reads {FORMATS[kind]}; "
            "`dvc repro` makes it again, the version of cola that wrote it still reads it"
        )
    if content.pop("checksum", None) != _digest(content):
        raise damaged(path)
    return content


def damaged(path: Path) -> UserError:
    """The one line about a file that is not what was written."""
    what = "changed since it was written" if path.exists() else "missing"
    return UserError(f"{path}: {what}; `dvc checkout` restores it, and `cola chain verify` tells whether the cache can")


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return xxhash.xxh3_128(text.encode()).hexdigest()
