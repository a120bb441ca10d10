"""What trains in one process only."""

from __future__ import annotations

from torch import distributed

from cola_core.errors import UserError

__all__ = ["check_alone"]


def check_alone(what: str, reason: str) -> None:
    """Refuse `what` where several processes train one link.

    Raises:
        UserError: they do, with the reason.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise UserError(f"{what} with more than one process: {reason}")
