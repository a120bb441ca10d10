"""Workspaces: every flow run works in a git worktree of its own under `.cola/workspaces`, sharing the DVC cache.

A workspace's name ends in the hash of its files and parameters, so the same run started again goes on in its place.
Its lock file is held while it works, and says `made` once it is whole and `finished` once all its stages ended well.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from cola_core.errors import RetryError, UserError, suggest
from cola_core.files import new_dir, new_file
from cola_core.locks import try_lock
from flows.mend import mend
from flows.project import project
from flows.snapshot import commit_tree, git, runs

__all__ = ["Workspace", "adopt", "opened"]

RESULTS = ("params.yaml", "dvc.lock")
DYING = 3.0  # seconds in which what a killed run has started ends too


@dataclass(frozen=True)
class Workspace:
    """A worktree that this process holds; children that inherit `lock` keep holding it if this process is killed."""

    path: Path
    lock: TextIO

    @property
    def run(self) -> str:
        """The run's name, as `cola adopt` takes it."""
        return self.path.name

    def finish(self) -> None:
        """Say that every stage ended well, so that `cola clean` may remove the workspace."""
        _say(self.lock, "finished")


@contextmanager
def opened(root: Path, tree: str, params: str, title: str) -> Iterator[Workspace]:
    """The workspace of `tree` with `params` as its params.yaml, made now or found as an interrupted run left it.

    Args:
        tree: from `snapshot`; the commit object made of it and `params` is the run, and reproduces it.
        title: the readable part of its name, such as `cola_gora/r8/seed0`.

    Raises:
        UserError: git or DVC refuse.
        RetryError: the same run is already going.
    """
    commit = commit_tree(root, tree, {"params.yaml": params}, f"cola run {title}")
    changed = git(root, "rev-parse", f"{commit}^{{tree}}").decode().strip()
    _hide(runs(root).parent)
    path = runs(root) / f"{title.replace('/', '-')}-{changed[:8]}"
    lock = try_lock(path.with_name(f"{path.name}.lock"), DYING)
    if lock is None:
        raise RetryError(f"{path.name}: the same run is already going; wait for it or change a parameter")
    with lock:
        whole = bool(_said(lock))
        lock.truncate(0)
        if whole and _reusable(path, changed):
            mend(path)
        else:
            _make(root, path, commit)
        _say(lock, "made")
        yield Workspace(path, lock)


def adopt(root: Path, run: str, force: bool = False) -> list[Path]:
    """Bring a run's params.yaml, dvc.lock and outs into the checkout; returns the paths written.

    Raises:
        UserError: no such run, or it would overwrite changes that neither git nor the run knows (unless `force`);
            then nothing is written.
        RetryError: the run is still going.
    """
    place = runs(root) / run
    if not place.is_dir():
        there = suggest(run, [p.name for p in runs(root).glob("*/")])
        raise UserError(f"{run}: no such workspace; if it was cleaned, the same `cola run` restores it{there}")
    lock = try_lock(place.with_name(f"{run}.lock"), DYING)
    if lock is None:
        raise RetryError(f"{run}: still running; adopt it when it has ended")
    with lock:
        files = [name for name in RESULTS if (place / name).is_file()]
        lost = [] if force else [name for name in files if _would_be_lost(root, place, name)]
        if lost:
            raise UserError(f"{', '.join(lost)}: has changes that the run did not have; commit them, or add --force")
        return _bring(root, place, files, force)


def _bring(root: Path, place: Path, files: list[str], force: bool) -> list[Path]:
    """Copy `files`, check DVC's outs out, copy the others; if DVC refuses, put the old files back."""
    before = {name: _bytes(root / name) for name in files}
    for name in files:
        _write(root / name, (place / name).read_bytes())
    try:
        with project(root) as repo:
            repo.checkout(force=force)
    except (UserError, RetryError):
        for name, old in before.items():
            _write(root / name, old) if old is not None else (root / name).unlink()
        raise
    copied = [out for out in _uncached_outs(place) if (place / out).exists()]
    for out in copied:
        _copy(place / out, root / out)
    return [*(Path(name) for name in files), *copied]


def _uncached_outs(root: Path) -> list[Path]:
    """Outs with `cache: false`, which only a copy can carry; relative to `root`."""
    with project(root) as repo:
        outs = [Path(out.fs_path) for stage in repo.index.stages for out in stage.outs if not out.use_cache]
        return [path.relative_to(repo.root_dir) for path in outs]


def _would_be_lost(root: Path, place: Path, name: str) -> bool:
    """Whether the checkout's file is neither the committed one, nor the one the run started from, nor its result."""
    known = [_bytes(place / name)]
    for tree, folder in (("HEAD", root), ("HEAD", place)):
        try:
            known.append(git(folder, "show", f"{tree}:./{name}"))
        except UserError:
            continue
    return (root / name).exists() and _bytes(root / name) not in known


def _hide(home: Path) -> None:
    """Keep git's eyes off workspaces, whatever .gitignore says: a snapshot must not hold another run's worktree."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / ".gitignore").exists():
        _write(home / ".gitignore", b"*\n")


def _reusable(path: Path, tree: str) -> bool:
    """Whether `path` is the worktree of `tree`; its sources are put back as they were, its dvc.lock and outs stay."""
    if not (path / ".git").is_file():
        return False
    try:
        if git(path, "rev-parse", "HEAD^{tree}").decode().strip() != tree:
            return False
        git(path, "restore", "--source=HEAD", "--staged", "--worktree", "--", ".", ":(exclude)dvc.lock")
    except UserError:
        return False
    return True


def _make(root: Path, path: Path, commit: str) -> None:
    """A worktree of `commit` with the checkout's own DVC settings, its cache, and every out that the cache has."""
    shutil.rmtree(path, ignore_errors=True)
    git(root, "worktree", "prune")
    git(root, "worktree", "add", "--quiet", "--force", "--detach", str(path), commit)
    if (settings := root / ".dvc" / "config.local").is_file():
        shutil.copy(settings, path / ".dvc" / "config.local")
    with project(root) as repo:
        cache = repo.cache.local_cache_dir
    with project(path) as repo, repo.config.edit("local") as local:
        local.setdefault("cache", {})["dir"] = cache
    mend(path)  # the checkout's DVC may have been writing dvc.lock when it was copied
    with project(path) as repo:
        repo.checkout(allow_missing=True)


def _said(lock: TextIO) -> str:
    lock.seek(0)
    return lock.read()


def _say(lock: TextIO, word: str) -> None:
    lock.truncate(0)
    lock.write(word)
    lock.flush()


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _write(path: Path, content: bytes) -> None:
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        with new_dir(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
    else:
        _write(target, source.read_bytes())
