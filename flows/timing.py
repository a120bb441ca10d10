"""Time one training micro-batch under several machine settings: the only measurement behind `cola plan`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cola_core.arithmetic.shape import Work
from cola_core.config.recipe import BaseStore, LinkConfig, MachineConfig
from cola_core.root import base_manifest

if TYPE_CHECKING:
    from cola_core.batches import Batch

__all__ = ["Timing", "alternatives", "measure", "work_of"]

REPEATS = 3


@dataclass(frozen=True)
class Timing:
    """seconds: of the quickest forward and backward of the micro-batch `work`."""

    machine: MachineConfig
    seconds: float
    work: Work

    @property
    def argument(self) -> str:
        """What makes a run use this setting."""
        return f"-S machine.dtype={self.machine.dtype} -S machine.threads={self.machine.threads}"


def alternatives(machine: MachineConfig) -> list[MachineConfig]:
    """The parameters' own setting first, then both dtypes at every power of two of threads (CPU), or at its own."""
    cores = os.cpu_count() or 1
    threads = [2**k for k in range(cores.bit_length()) if 2**k <= cores] if machine.device == "cpu" else []
    dtypes: tuple[BaseStore, ...] = ("fp32",) if machine.device == "mps" else ("fp32", "bf16")
    others = [
        MachineConfig(device=machine.device, threads=count, dtype=dtype)
        for dtype in dtypes
        for count in sorted({*threads, machine.threads})
    ]
    return [machine, *(other for other in others if other != machine)]


def measure(
    root: Path, config: LinkConfig, ranks: Mapping[str, int], machines: Sequence[MachineConfig]
) -> Iterator[Timing]:
    """Forward and backward of one micro-batch of the training split, with adapters of these ranks.

    Of the micro-batches that one step would be cut into, the one of most rows.

    Raises:
        UserError: the base or the prepared rows are missing or broken.
    """
    import torch

    from cola_core.rows import Task
    from cola_core.scoring import Objective
    from cola_core.split_files import read_rows

    task = Task.read(root / "artifacts/prepare/task.json")
    rows = read_rows(root / "artifacts/prepare/train.arrow")[: config.batch]
    kind = base_manifest(root / "artifacts/fetch/model")["kind"]
    for machine in machines:
        torch.set_num_threads(machine.threads)
        objective = Objective(_adapted(root, ranks, machine, len(task.labels)), kind, task)
        largest = max(objective.groups(rows, config.micro_batch, config.micro_tokens), key=len)
        batch = objective.training_batch([rows[i] for i in largest])
        times = [_step(objective, batch) for _ in range(REPEATS + 1)][1:]
        yield Timing(machine, min(times), work_of(batch))


def work_of(batch: Batch) -> Work:
    """What one batch computes: packed rows as they are, others with their padding."""
    outputs = len(batch.rows) or len(batch.labels)
    if "row_lengths" in batch.inputs:
        return Work.end_to_end(batch.inputs["row_lengths"].tolist(), outputs)
    (rows, length), second = batch.inputs["input_ids"].shape, batch.inputs.get("decoder_input_ids")
    decoder_rows, decoder_length = (0, 0) if second is None else second.shape
    return Work(rows, length, outputs, decoder_rows, decoder_length)


def _step(objective: object, batch: object) -> float:
    import torch

    started = time.perf_counter()
    objective(batch).backward()  # type: ignore[operator]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _adapted(root: Path, ranks: Mapping[str, int], machine: MachineConfig, labels: int):  # type: ignore[no-untyped-def]
    """The base as `link` trains it: placed, frozen, every target with a pair."""
    import torch

    from cola_core.adapters import Pair, attach
    from cola_core.axes.bases import BASES
    from cola_core.models import adaptable, load_base, place, weight_shape

    model = place(load_base(root / "artifacts/fetch/model", machine, labels), machine)
    modules, dtype = adaptable(model), BASES[machine.dtype].adapter
    pairs = {}
    for name, rank in ranks.items():
        out, inner = weight_shape(modules[name])
        pairs[name] = Pair(torch.ones(rank, inner, dtype=dtype), torch.zeros(out, rank, dtype=dtype), 1.0)
    attach(model, pairs)
    return model
