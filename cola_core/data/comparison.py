"""What two free texts are compared by."""

from __future__ import annotations

import re

__all__ = ["comparable"]


def comparable(text: str, extract: str | None) -> str:
    """The part that `extract` finds, without case, commas, surplus spaces and a last full stop.

    Of several matches of `extract` the last whose first group is not empty counts; without one the text is empty.
    """
    if extract:
        found = [match[1] for match in re.finditer(extract, text) if match[1]]
        text = found[-1] if found else ""
    return " ".join(text.replace(",", "").lower().split()).rstrip(".")
