"""Prove what stands in artifacts/: every file and cache object of DVC by its hash, then the chain by its scores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from cola_core.config.params import check_params
from cola_core.config.reading import read_yaml
from cola_core.errors import UserError
from flows.child import quiet
from flows.project import project

__all__ = ["verify"]


def verify(root: Path) -> Iterator[str]:
    """Lines about what was found, the good news last.

    Raises:
        UserError: no chain yet, a damaged file (each has had its line), or a prefix whose scores moved.
    """
    params = check_params(read_yaml(root / "params.yaml"))
    last = root / "artifacts/links" / params.final / "adapter"
    if not last.is_dir():
        raise UserError(f"{last}: no chain here; run `dvc repro merge`, or bring a run's results with `cola adopt`")
    yield from _checked(root)
    quiet()
    from cola_core.lineage import check_manifest, read_chain
    from cola_core.verify import verify_chain

    check_manifest(root / "artifacts/merge/chain.json", read_chain(last))
    for verdict in verify_chain(last, root / "artifacts/fetch/model", root / "artifacts/prepare", params.machine):
        yield f"links 1..{verdict.link}: {verdict.hash[:12]}, scores moved by {verdict.change:.1e}"
    yield "the chain is what it was"


def _checked(root: Path) -> Iterator[str]:
    """A line for every file that is not what was written, or one that there is none."""
    bad = [*_changed(root), *_bad_states(root)]
    yield from bad
    if bad:
        raise UserError(
            f"{len(bad)} file(s) are not what was written; delete them, then `dvc repro`: it restores what the cache "
            "still has and makes the rest again"
        )
    yield "every file is what dvc.lock says"


def _changed(root: Path) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    for path, expected in _files(root):
        name = path.relative_to(root) if path.is_relative_to(root) else path
        if not path.is_file():
            yield f"{name}: missing"
            continue
        inode = (path.stat().st_dev, path.stat().st_ino)
        if inode not in seen and _md5(path) != expected:  # the checkout's file may be the cache's own
            yield f"{name}: changed since it was written"
        seen.add(inode)


def _files(root: Path) -> Iterator[tuple[Path, str]]:
    """(path, md5) of every file below an out of dvc.lock, and of every cache object behind one."""
    with project(root) as repo:
        cache = repo.cache.local
        for out in (out for stage in repo.index.stages for out in stage.outs if out.use_cache and out.hash_info):
            place, oid = Path(out.fs_path), out.hash_info.value
            yield from _stored(cache, oid)
            if not out.hash_info.isdir:
                yield place, oid
                continue
            whole = all(_md5(path) == expected for path, expected in _stored(cache, oid))
            for key, _, hashed in (whole and out.get_obj()) or ():
                yield from _stored(cache, hashed.value)
                yield place.joinpath(*key), hashed.value


def _stored(cache: object, oid: str) -> Iterator[tuple[Path, str]]:
    """An object that the cache does not have is no damage: it may lie in a remote."""
    path = Path(cache.oid_to_path(oid))  # type: ignore[attr-defined]
    if path.is_file():
        yield path, oid.removesuffix(".dir")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _bad_states(root: Path) -> Iterator[str]:
    """Checkpoints of interrupted links that could not be gone on from."""
    states = sorted((root / ".cola/resume").glob("*/state.safetensors"))
    if states:
        from cola_core.checkpoints import usable

        yield from (f"{path.relative_to(root)}: {reason}" for path in states if (reason := usable(path)))
