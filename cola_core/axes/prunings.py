"""Axis 'schedule', inside a link: what happens to ranks while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch.optim import Optimizer

from cola_core.adapters import LoRA
from cola_core.health import Course
from cola_core.pruning.alora import Ablation
from cola_core.pruning.beam import Beam

__all__ = ["PRUNINGS", "Pruning"]


class Pruning(Protocol):
    """Rounds of a link, each run once."""

    def rounds(self, step: int) -> int:
        """How many rounds have had their turn once `step` steps are done."""

    def measured(self, number: int) -> Callable[[], None]:
        """What one round, the first is 0, finds to do: to be done whole, with the optimizer's state, or not at all."""


class Never:
    """Ranks stay as they are."""

    def __init__(self, *_: object) -> None:
        pass

    def rounds(self, step: int) -> int:
        """None."""
        return 0

    def measured(self, number: int) -> Callable[[], None]:
        """Never called."""
        raise AssertionError


# The link's layers, its optimizer, what gives the loss of one validation batch, and its course -> the rounds.
PRUNINGS: dict[str, Callable[[Mapping[str, LoRA], Optimizer, Callable[[], float], Course], Pruning]] = {
    "none": Never,
    "beam_lora": Beam,
    "alora": Ablation,
}
