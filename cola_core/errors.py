"""The two failures a user meets: a mistake to mend (exit code 2) and a condition to wait out (exit code 75)."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from cola_core.secrets import mask

__all__ = ["RetryError", "UserError", "suggest"]


class Told(Exception):  # noqa: N818 -- only its kinds are raised
    """What both are: a line without secrets, since it ends in logs, states and records."""

    def __init__(self, line: object = "") -> None:
        super().__init__(mask(str(line)))


class UserError(Told):
    """A mistake in a parameter, a file or a command line, told in one line: what, where, what is allowed."""

    exit_code = 2


class RetryError(Told):
    """Something outside is missing for the moment (network, server, disk); the same call may succeed later."""

    exit_code = 75


def suggest(word: str, allowed: Iterable[str]) -> str:
    """The end of an error line: `; did you mean 'x'?` when one allowed word is close, else `; allowed: a, b`.

    Args:
        word: what the user wrote.
        allowed: every word that would have been right.
    """
    words = [str(a) for a in allowed]
    close = get_close_matches(str(word), words, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(words) or 'nothing'}"
