"""What two free texts are compared by."""

from __future__ import annotations

import regex

from cola_core.errors import UserError

__all__ = ["comparable"]

PATIENCE = 10.0  # seconds for one text: some expressions need a lifetime, and Python's own cannot be stopped


def comparable(text: str, extract: str | None) -> str:
    """The part that `extract` finds, without case, commas, surplus spaces and a last full stop.

    Of several matches of `extract` the last whose first group is not empty counts; without one the text is empty.

    Raises:
        UserError: `extract` does not come to an end.
    """
    if extract:
        try:
            found = [match[1] for match in regex.finditer(extract, text, timeout=PATIENCE) if match[1]]
        except TimeoutError:
            raise UserError(
                f"prepare.extract: {extract!r} is still at work on {text[:40]!r} after {PATIENCE:.0f} s; "
                "a repeated group that can match the same text in two ways tries them all"
            ) from None
        text = found[-1] if found else ""
    return " ".join(text.replace(",", "").lower().split()).rstrip(".")
