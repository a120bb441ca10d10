"""A disk that is full, small or read-only: one clear line, nothing half-written, and what was there stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cola_core.errors import RetryError, UserError, of_the_system
from cola_core.files import scratch

ROOT = Path(__file__).parent.parent


def _alone() -> list[str]:
    """The words before a command that give it file systems of its own, or none where that is not allowed."""
    for words in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        if (
            shutil.which(words[0])
            and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
        ):
            return words
    return []


@pytest.mark.skipif(not _alone(), reason="mounting a small disk needs root or user namespaces")
def test_every_writer_on_a_full_and_on_a_read_only_disk() -> None:
    command = [*_alone(), sys.executable, "-m", "tests.chaos.full_disk"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 9 and {kind: wrong for kind, wrong in found.items() if wrong} == {}


def test_a_temporary_that_a_sweeper_took_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no lock yet for an instant."""
    opened, taken = os.open, []

    def late(path: Path, flags: int) -> int:
        if not taken:
            taken.append(path)
            Path(path).rmdir()
        return opened(path, flags)

    monkeypatch.setattr("cola_core.files.os.open", late)
    with scratch(tmp_path, "it") as folder:
        assert folder.is_dir() and taken and folder != taken[0]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), RetryError),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), UserError),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), UserError),
        (ValueError("I/O error: No space left on device (os error 28)"), RetryError),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), RetryError),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), RetryError),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), RetryError),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), RetryError),
        (OSError(errno.EHOSTUNREACH, "No route to host"), RetryError),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), RetryError),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), RetryError),
        (OSError(errno.EMFILE, "Too many open files"), RetryError),
        (OSError(99_999, "a number of no system"), None),
        (ValueError("a bug"), None),
        (OSError("a text and no number"), None),
    ],
)
def test_what_the_system_refuses_is_told_from_a_bug(error: Exception, kind: type[Exception] | None) -> None:
    told = of_the_system(error)
    assert type(told) is (kind or type(None))
    names = ("a/b: ", "the disk: No space", "the network: ", "the system: ")
    assert kind is None or str(told).startswith(names)
