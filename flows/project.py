"""DVC in process: the project at a folder, its errors told in one line and its own chatter off."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cola_core.errors import RetryError, UserError

if TYPE_CHECKING:
    from dvc.repo import Repo

__all__ = ["project"]


@contextmanager
def project(root: Path) -> Iterator[Repo]:
    """The DVC project at `root`.

    Raises:
        UserError: what DVC refuses, such as a broken dvc.yaml or an out that the cache does not have.
        RetryError: another process works on the same files.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    logs = [logging.getLogger(name) for name in ("dvc", "dvc_data", "dvc_objects")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with Repo(str(root)) as repo:
            yield repo
    except LockError as error:
        raise RetryError(f"dvc: another process works here: {_line(error)}") from None
    except DvcException as error:
        raise UserError(f"dvc: {_line(error)}") from None
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
