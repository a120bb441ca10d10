"""What is to be done for one link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cola_core.config.recipe import LinkConfig, MachineConfig, ScheduleConfig
from cola_core.lineage import Link
from cola_core.rows import Row, Task

__all__ = ["LinkJob"]


@dataclass(frozen=True)
class LinkJob:
    """Everything that decides one link.

    chain: the root and all earlier links; ranks: module -> r; directions: module -> what the link's profile kept for
    its initialiser, by name (`sketch`: S), or empty;
    checkpoint: where the resume state is kept, None for nowhere; probe_tokens: what this link's own probe has cost.
    """

    base: Path
    chain: Sequence[Link]
    task: Task
    machine: MachineConfig
    schedule: ScheduleConfig
    config: LinkConfig
    seed: int
    ranks: Mapping[str, int]
    directions: Mapping[str, Mapping[str, Tensor]]
    train: Sequence[Row]
    validation: Sequence[Row]
    checkpoint: Path | None = None
    probe_tokens: int = 0
