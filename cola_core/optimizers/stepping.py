"""What a link's training asks of an optimizer beside torch's own calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import SGD, AdamW, Optimizer

from cola_core.optimizers.privacy import Reading
from cola_core.rows import Row, order
from cola_core.seeds import derive

if TYPE_CHECKING:
    from cola_core.health import Course

__all__ = ["Adam", "Descent", "Stepping"]


class Stepping(Optimizer):
    """An optimizer whose step is one gradient of one batch, unless it says otherwise."""

    def plan(self, rows: Sequence[Row], course: Course) -> Any:
        """What every step reads, by step: batches of row indices from seeded epochs."""
        config = course.config
        return order(len(rows), config.batch, config.steps, derive(course.seed, course.link, "data"))

    def collect(self, planned: Any, read: Reading) -> tuple[float, int]:
        """Set every `grad`, by as many calls of `read` as that takes; returns mean loss and tokens."""
        return read(planned)

    def record(self, steps: int, earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What link.json tells of the update; `earlier`: the records of the links before this one."""
        return {}


class Adam(Stepping, AdamW):
    """torch's AdamW."""


class Descent(Stepping, SGD):
    """torch's SGD."""
