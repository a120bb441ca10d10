"""The checkout as a commit object, made through a temporary index: the user's index and branch stay untouched."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from cola_core.assets.cache import cache_root
from cola_core.errors import UserError
from cola_core.files import scratch

__all__ = ["checkout", "commit_tree", "git", "main_checkout", "runs", "snapshot", "unpacked"]

PRIVATE = ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "GIT_PREFIX")
AUTHOR = {
    f"GIT_{role}_{part}": value
    for role in ("AUTHOR", "COMMITTER")
    for part, value in (("NAME", "cola"), ("EMAIL", "cola@localhost"))
}


def git(root: Path, *arguments: str, data: bytes = b"", variables: Mapping[str, str] = {}) -> bytes:
    """What one git command prints, run in `root`, without hooks and free of a surrounding git's environment.

    Raises:
        UserError: git's own last line.
    """
    environment = {name: value for name, value in os.environ.items() if name not in PRIVATE} | dict(variables)
    command = ["git", "-c", "core.hooksPath=/dev/null", *arguments]
    done = subprocess.run(command, cwd=root, input=data, capture_output=True, check=False, env=environment)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"git {arguments[0]}: {lines[-1]}")
    return done.stdout


def checkout() -> Path:
    """The checkout that this process stands in.

    Raises:
        UserError: it stands in none.
    """
    return Path(git(Path.cwd(), "rev-parse", "--show-toplevel").decode().strip())


def main_checkout(root: Path) -> Path:
    """The checkout that owns .git, whichever of its worktrees `root` is."""
    found = git(root, "rev-parse", "--path-format=absolute", "--git-common-dir")
    return Path(found.decode().strip()).parent


def runs(root: Path) -> Path:
    """The folder of all workspaces of this repository, in the main checkout."""
    return main_checkout(root) / ".cola" / "workspaces"


def snapshot(root: Path, committed: bool = False) -> str:
    """The tree object of the checkout as it stands: uncommitted and untracked files included, ignored ones not.

    Args:
        committed: take HEAD's tree instead, as a schedule does.

    Raises:
        UserError: not a git checkout, or one without any commit.
    """
    if committed:
        return git(root, "rev-parse", "HEAD^{tree}").decode().strip()
    with scratch(cache_root(), "index") as folder:
        index = {"GIT_INDEX_FILE": str(folder / "index")}
        git(root, "read-tree", "HEAD", variables=index)
        git(root, "add", "--all", variables=index)
        return git(root, "write-tree", variables=index).decode().strip()


def commit_tree(root: Path, tree: str, changes: dict[str, str], message: str) -> str:
    """A commit object on top of HEAD that no branch names: `tree` with the texts of `changes` laid over it."""
    with scratch(cache_root(), "index") as folder:
        index = {"GIT_INDEX_FILE": str(folder / "index")}
        git(root, "read-tree", tree, variables=index)
        for path, text in changes.items():
            blob = git(root, "hash-object", "-w", "--stdin", data=text.encode()).decode().strip()
            git(root, "update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", variables=index)
        changed = git(root, "write-tree", variables=index).decode().strip()
    return git(root, "commit-tree", changed, "-p", "HEAD", "-m", message, variables=AUTHOR).decode().strip()


@contextmanager
def unpacked(root: Path, tree: str, *paths: str) -> Iterator[Path]:
    """A temporary folder with `paths` of `tree`, as far as the tree has them."""
    present = git(root, "ls-tree", "--name-only", tree, "--", *paths).decode().split()
    with scratch(cache_root(), "index") as folder:
        packed = git(root, "archive", "--format=tar", tree, "--", *present) if present else b""
        if packed:
            with tarfile.open(fileobj=BytesIO(packed)) as archive:
                archive.extractall(folder, filter="data")
        yield folder
