"""Ranks as ranks.json holds them: anybody may have written it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cola_core.errors import UserError, suggest

__all__ = ["check_ranks"]


def check_ranks(ranks: Any, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """`ranks`, once it is known to be module -> r with 0 <= r <= min(out, in), and not 0 for all.

    Args:
        shapes: (out, in) of every module that the base has.

    Raises:
        UserError: the first module or rank that cannot be.
    """
    if not isinstance(ranks, Mapping) or not any(ranks.values()):
        raise UserError("ranks.json: ranks: names no module to train; run `dvc repro allocate`")
    for name, rank in ranks.items():
        if name not in shapes:
            raise UserError(f"ranks.json: ranks: the base has no module {name!r}{suggest(name, shapes)}")
        if type(rank) is not int or not 0 <= rank <= min(shapes[name]):
            raise UserError(f"ranks.json: ranks: {name}: {rank!r} is no rank; allowed: 0 to {min(shapes[name])}")
    return dict(ranks)
