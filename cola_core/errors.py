"""The two failures a user meets: a mistake to mend (exit code 2) and a condition to wait out (exit code 75)."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from socket import gaierror

from cola_core.secrets import mask

__all__ = ["RetryError", "TrainingError", "UserError", "of_the_system", "suggest", "system_told"]

RUST = re.compile(r"\(os error (\d+)\)")
DISK = ("ENOSPC", "EDQUOT", "EIO", "ESTALE")
NETWORK = ("ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "ENETDOWN", "ENETUNREACH", "EHOSTUNREACH", "ETIMEDOUT")
SYSTEM = ("EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "EBUSY", "EPIPE")
ELSE = "the system"
# What passes, and who refused it where no file is named.
PASSING = {name: who for names, who in ((DISK, "the disk"), (NETWORK, "the network"), (SYSTEM, ELSE)) for name in names}

LONGEST = 2000  # characters of a line; what a file holds may be quoted in it, and a file may hold anything
SEEN = 10_000  # characters of either end that are looked at
TAIL = 500  # of them from the end, where it is told what is allowed
CLOSE = 100  # a longer word is no slip of the pen, and to compare it takes its length squared


class Told(Exception):  # noqa: N818 -- only its kinds are raised
    """What both are: one line without secrets, whatever text was put into it: it ends in logs, states and records."""

    def __init__(self, line: object = "") -> None:
        text = str(line)
        if len(text) > 2 * SEEN:  # so much more than is shown that what is cut here, half a secret, is not shown
            text = text[:SEEN] + text[-SEEN:]
        super().__init__(_one_line(mask(text)))


class UserError(Told):
    """A mistake in a parameter, a file or a command line, told in one line: what, where, what is allowed."""

    exit_code = 2


class TrainingError(UserError):
    """Training that went wrong with these settings, such as a loss that diverged: in a study, one outcome of many."""


class RetryError(Told):
    """Something outside is missing for the moment (network, server, disk); the same call may succeed later."""

    exit_code = 75


def of_the_system(error: Exception) -> UserError | RetryError | None:
    """What the operating system refused: a full disk may have room later, a read-only folder is the user's to mend.

    Returns:
        None if it was not the system; safetensors tells of it in a text alone.
    """
    number = _number(error)
    name = errno.errorcode.get(number) if number is not None else None
    if number is None or name is None:
        return None
    line = f"{getattr(error, 'filename', None) or PASSING.get(name, ELSE)}: {os.strerror(number)}"
    if name in PASSING:
        return RetryError(f"{line}; nothing written before is lost, the same command goes on once this is mended")
    return UserError(line)


@contextmanager
def system_told() -> Iterator[None]:
    """What the operating system refuses in the block, as one of the two failures that a user meets.

    Raises:
        UserError, RetryError: see `of_the_system`.
    """
    try:
        yield
    except OSError as error:
        if refused := of_the_system(error):
            raise refused from error
        raise


def suggest(word: str, allowed: Iterable[str]) -> str:
    """The end of an error line: `; did you mean 'x'?` when one allowed word is close, else `; allowed: a, b`.

    Args:
        word: what the user wrote.
        allowed: every word that would have been right.
    """
    words = [str(a) for a in islice(allowed, LONGEST)]
    close = get_close_matches(word, words, n=1, cutoff=0.6) if len(word) <= CLOSE else []
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(words) or 'nothing'}"


def _number(error: Exception) -> int | None:
    if isinstance(error, gaierror):
        return errno.EHOSTUNREACH  # it has numbers of its own for a host whose name nobody knows at the moment
    hidden = RUST.search(str(error))
    return error.errno if isinstance(error, OSError) else int(hidden[1]) if hidden else None


def _one_line(text: str) -> str:
    """Without line breaks, control characters and its middle, where it has any of them or too much of it."""
    text = _short(text)
    if text.isprintable():
        return text
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return _short("".join(shown))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - TAIL]}[...]{text[5 - TAIL :]}"
