"""Where things stand: outs in this checkout, records and resume state in the main one, whatever workspace runs."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

__all__ = ["ARTIFACTS", "home", "link_dir", "main_checkout"]

ARTIFACTS = Path("artifacts")


@functools.cache
def main_checkout() -> Path:
    """The checkout that owns .git; every worktree of a flow run shares its .cola folder, cache and mlflow.db."""
    command = ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return Path(found.stdout.strip()).parent if found.returncode == 0 else Path.cwd()


def home() -> Path:
    """`.cola` of the main checkout: records, resume state and workspaces; git-ignored, safe to delete when idle."""
    return main_checkout() / ".cola"


def link_dir(key: str, part: str = "adapter") -> Path:
    """`artifacts/links/<key>/<part>`."""
    return ARTIFACTS / "links" / key / part
