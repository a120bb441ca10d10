"""Fit an encoder's head alone on frozen features, and write the root of the chain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.context import Context, Done
from tasks.places import ARTIFACTS, link_dir
from tasks.stage import run

if TYPE_CHECKING:
    from torch import Tensor

    from cola_core.rows import Task

RETRIES = 0
BASE, PREPARED = ARTIFACTS / "fetch/model", ARTIFACTS / "prepare"


def main(context: Context) -> Done:
    """Write head.json (an empty record for language models) and link 0."""
    from cola_core.files import new_dir, write_json
    from cola_core.root import base_manifest, write_root
    from cola_core.rows import Task

    task = Task.read(PREPARED / "task.json")
    head: dict[str, Tensor] = {}
    found: dict[str, Any] = {}
    if base_manifest(BASE)["kind"] == "encoder":
        head, found = _fit(context, task)
    with new_dir(ARTIFACTS / "head") as folder:
        write_json(folder / "head.json", found)
    write_root(link_dir("0"), BASE, len(task.labels), head)
    metrics = {name: float(value) for name, value in found.items()}
    return Done(metrics, inputs=[BASE, PREPARED / "train.arrow"], outputs=[link_dir("0")])


def _fit(context: Context, task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Only here does the stage need torch."""
    from cola_core.config.recipe import MachineConfig
    from cola_core.config.task import HeadConfig
    from cola_core.head import fit_head
    from cola_core.models import load_base, place
    from cola_core.scoring import Objective
    from cola_core.split_files import read_rows

    machine = context.section(MachineConfig, "machine")
    model = place(load_base(BASE, machine, len(task.labels)), machine)
    rows = read_rows(PREPARED / "train.arrow")
    return fit_head(Objective(model, "encoder", task), rows, context.section(HeadConfig, "head"))


if __name__ == "__main__":
    run(main)
