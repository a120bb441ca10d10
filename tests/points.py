"""Any point on the six axes, walked as the stages walk it, on a tiny model: profile, allocate, link."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_core.adapter_files import Adapter
from cola_core.axes.allocators import Question, allocate
from cola_core.chain import pairs_by_module, write_link
from cola_core.config.recipe import AllocateConfig, LinkConfig, MachineConfig, ProfileConfig, ScheduleConfig
from cola_core.directions import activation_directions, sister_directions
from cola_core.job import LinkJob
from cola_core.knot import open_chain
from cola_core.lineage import Link, read_chain
from cola_core.links import run_link
from cola_core.models import adaptable, as_matrix, load_base, weight_shape
from cola_core.probe import probe
from cola_core.train import Training
from tests.lab import FP32, LINK, PROFILE, base_of, die_after, rows_of, task_of

__all__ = ["ALLOCATE", "job_at", "resumes", "walk"]

ALLOCATE = AllocateConfig(allocator="uniform", rank=2, r_min=1, r_max=4, features="sqrt")


def job_at(
    family: str,
    chain: list[Link],
    link: dict[str, Any] | None = None,
    profile: dict[str, Any] | None = None,
    allocation: dict[str, Any] | None = None,
    machine: MachineConfig = FP32,
    schedule: str = "restart",
) -> LinkJob:
    """The next link of `chain`: changes of the laboratory's sections, which are probed and allocated for."""
    config = LinkConfig(**{**LINK.model_dump(), **(link or {})})
    probing = ProfileConfig(**{**PROFILE.model_dump(), "probe": "none", **(profile or {})})
    allocating = AllocateConfig(**{**ALLOCATE.model_dump(), **(allocation or {})})
    found, directions = profiled(family, chain, probing, machine)
    shapes = {n: weight_shape(m) for n, m in adaptable(load_base(base_of(family), FP32, 3)).items()}
    ranks = allocate(Question(shapes, found, allocating, 7, len(chain))).ranks
    return LinkJob(
        base=base_of(family),
        chain=chain,
        task=task_of(family),
        machine=machine,
        schedule=ScheduleConfig(kind="cola", learning_rate=schedule, horizon=config.steps * 2),
        config=config,
        seed=7,
        ranks=ranks,
        directions=directions,
        train=rows_of(family, 16),
        validation=rows_of(family, 6, seed=1),
    )


def profiled(family: str, chain: list[Link], config: ProfileConfig, machine: MachineConfig) -> tuple[Any, Any]:
    """What stage `profile` finds: numbers of every module, and directions."""
    objective = open_chain(base_of(family), chain, task_of(family), machine)
    modules, rows = adaptable(objective.model), rows_of(family, 6, seed=2)
    found: dict[str, dict[str, Any]] = {name: {} for name in modules}
    directions: dict[str, Any] = {}
    if config.probe != "none":
        result = probe(objective, rows, modules, pairs_by_module(chain), config, (7, len(chain)))
        found, directions = result.modules, result.directions
    if "activations" in config.directions:
        kept, _ = activation_directions(objective, rows, modules, config.sketch, 4)
        for name, axes in kept.items():
            directions[name] = {**directions.get(name, {}), **axes}
            found[name]["variance"] = axes["variance"].tolist()
    if "sisters" in config.directions:
        base = {n: as_matrix(m).float() for n, m in adaptable(load_base(base_of(family), FP32, 3)).items()}
        generator = torch.Generator().manual_seed(3)
        sisters = [{n: w + torch.randn(w.shape, generator=generator) for n, w in base.items()} for _ in range(2)]
        directions = sister_directions(base, sisters, config.sketch)
    return found, directions


def walk(job: LinkJob, folder: Path) -> list[Link]:
    """Train the link, write it, and read the longer chain back."""
    adapter, record, progress = run_link(job)
    path = folder / f"links/{len(job.chain)}/adapter"
    write_link(path, adapter, record, {"losses.csv": str([event["loss"] for event in progress.losses])})
    return read_chain(path)


def resumes(job: LinkJob, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """Law 7: killed after steps, stopped after one and in the middle of another, it ends as if it ran undisturbed."""
    whole, record, undisturbed = run_link(job)
    job = replace(job, checkpoint=folder / "state.safetensors")
    for step, how in ((1, GeneratorExit), (3, GeneratorExit), (5, KeyboardInterrupt)):
        with pytest.raises(how):
            run_link(job, die_after(step, how))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Training, "_gradients", _stopped_in(8, Training._gradients))
        run_link(job)
    seen: list[int] = []
    resumed, again, progress = run_link(job, lambda event: seen.append(event["step"]))
    assert seen[0] == 8, "step 7, no checkpoint's own, was kept when the next one was stopped"
    assert progress.losses == undisturbed.losses and again == record
    assert whole.pairs.keys() == resumed.pairs.keys() and whole.bases.keys() == resumed.bases.keys()
    for name, pair in whole.pairs.items():
        assert torch.equal(pair.a, resumed.pairs[name].a) and torch.equal(pair.b, resumed.pairs[name].b), name
    assert all(torch.equal(held.codes, resumed.bases[name].codes) for name, held in whole.bases.items())
    assert all(torch.equal(tensor, resumed.head[name]) for name, tensor in whole.head.items())
    return resumed


def _stopped_in(step: int, honest: Any) -> Any:
    """Ctrl-C right after a batch's gradients, before the step that they are for."""

    def gradients(training: Training, rows: Any) -> Any:
        found = honest(training, rows)
        if training.progress.step == step - 1:
            raise KeyboardInterrupt
        return found

    return gradients
