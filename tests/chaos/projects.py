"""Clones for the harness: of the tiny model, and of the default recipe on the real one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tiny import ROOT, project

__all__ = ["prepare", "prepare_real"]


def prepare(folder: Path) -> Path:
    """A clone that `make run` takes for set up, and whose links log live from their first step."""
    folder.mkdir(parents=True)
    root = project(folder)
    _set_up(root)
    task = root / "tasks/link.py"
    task.write_text(task.read_text().replace("LIVE_AFTER = 10.0", "LIVE_AFTER = 0.0"))
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qam", "live"], cwd=root, check=True)
    return root


def prepare_real(folder: Path) -> Path:
    """A clone with the default recipe on the real model, every stage ahead: what its dvc.lock tells of is not there."""
    root = folder / "project"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
    (root / "dvc.lock").unlink()
    _set_up(root)
    return root


def _set_up(root: Path) -> None:
    (root / ".venv").mkdir()
    for part in Path(sys.prefix).glob("[!.]*"):
        (root / ".venv" / part.name).symlink_to(part)
    (root / ".venv/.ready").touch()
