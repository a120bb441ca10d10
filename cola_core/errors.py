"""The two failures a user meets: a mistake to mend (exit code 2) and a condition to wait out (exit code 75)."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["RetryError", "UserError", "of_the_system", "suggest"]

PASSING = {"ENOSPC", "EDQUOT", "EIO", "EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "ESTALE", "ETIMEDOUT", "EBUSY"}


class UserError(Exception):
    """A mistake in a parameter, a file or a command line, told in one line: what, where, what is allowed."""

    exit_code = 2


class RetryError(Exception):
    """Something outside is missing for the moment (network, server, disk); the same call may succeed later."""

    exit_code = 75


def of_the_system(error: OSError) -> UserError | RetryError:
    """What the operating system refused: a full disk may have room later, a read-only folder is the user's to mend."""
    name = errno.errorcode.get(error.errno or 0, "")
    line = f"{error.filename or 'the disk'}: {error.strerror or error}"
    if name in PASSING:
        return RetryError(f"{line}; nothing written before is lost, the same command goes on once this is mended")
    return UserError(line)


def suggest(word: str, allowed: Iterable[str]) -> str:
    """The end of an error line: `; did you mean 'x'?` when one allowed word is close, else `; allowed: a, b`.

    Args:
        word: what the user wrote.
        allowed: every word that would have been right.
    """
    words = [str(a) for a in allowed]
    close = get_close_matches(str(word), words, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(words) or 'nothing'}"
