"""A bf16 chain beside the same chain in fp32: what it scores, through the project's own files and merges."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.pairs import Pairs
from benchmarks.results import Row, compared
from benchmarks.setting import Setting
from cola_core.chain import write_link
from cola_core.config.recipe import MachineConfig, ScheduleConfig
from cola_core.evaluation.answers import answer
from cola_core.job import LinkJob
from cola_core.knot import open_chain
from cola_core.lineage import Link, read_chain
from cola_core.links import run_link
from cola_core.root import base_manifest, write_root
from cola_core.scoring import mean_loss
from cola_core.targets import select_targets

__all__ = ["quality"]

LINKS, RANK = 2, 8


def quality(where: Setting, folder: Path, steps: int, rows: int) -> Row:
    """Validation loss of a chain of two links, bf16 / fp32; accuracies stand in the note."""
    losses, scores = [], []
    for dtype in ("bf16", "fp32"):
        machine = MachineConfig(device="cpu", threads=torch.get_num_threads(), dtype=dtype)  # type: ignore[arg-type]
        chain = _train(where, folder / dtype, machine, steps)
        objective = open_chain(where.base, chain, where.task, machine)
        config = where.link(steps=steps)
        losses.append(mean_loss(objective, where.validation[:rows], config))
        given = answer(objective, where.test[:rows], config.micro_batch, str)
        scores.append(sum(given.correct) / rows)
    note = f"2 x {steps} steps; accuracy on {rows} test rows: bf16 {scores[0]:.3f}, fp32 {scores[1]:.3f}"
    what = "SST-2, validation loss of a bf16 chain beside the fp32 chain"
    return compared("bf16-quality", what, Pairs([losses[0]], [losses[1]]), None, unit="nats", note=note)


def _train(where: Setting, folder: Path, machine: MachineConfig, steps: int) -> list[Link]:
    """Links of uniform rank, trained, checked and written as the pipeline does."""
    write_root(folder / "links/0/adapter", where.base, len(where.task.labels), {})
    chain = read_chain(folder / "links/0/adapter")
    names = select_targets(base_manifest(where.base)["modules"], where.params.targets)
    for number in range(1, LINKS + 1):
        job = LinkJob(
            base=where.base,
            chain=chain,
            task=where.task,
            machine=machine,
            schedule=ScheduleConfig(kind="cola", learning_rate="restart", horizon=LINKS * steps),
            config=where.link(steps=steps, initialiser="kaiming"),
            seed=where.params.seed,
            ranks=dict.fromkeys(names, RANK),
            directions={},
            train=where.train,
            validation=where.validation[:8],
        )
        adapter, record, _ = run_link(job)
        write_link(folder / f"links/{number}/adapter", adapter, record, {})
        chain = read_chain(folder / f"links/{number}/adapter")
    return chain
