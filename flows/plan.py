"""`cola plan`: what would run, what it costs, how long it may take, and which machine setting is fastest here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cola_core.arithmetic.flops import lora_step
from cola_core.config.params import Params, check_params, knot_of
from cola_core.config.reading import read_yaml
from flows.child import quiet
from flows.cost import Cost, cost, reference_ranks
from flows.graph import Fate, plan, stages
from flows.sizes import Sizes, sizes
from flows.timing import Timing, alternatives, measure

__all__ = ["Line", "Plan", "make_plan", "speed_of"]

WORTH = 0.95  # another setting is proposed only where it takes less than this share of the time


@dataclass(frozen=True)
class Line:
    """One stage: what would happen to it, and its cost where a model runs and its sizes are known."""

    stage: str
    fate: Fate
    cost: Cost | None
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """lines: one per stage; unknown: what cannot be said yet; timings: the parameters' own setting first."""

    lines: list[Line]
    unknown: list[str]
    timings: list[Timing]

    @property
    def better(self) -> Timing | None:
        """The fastest setting, where it is clearly faster than the parameters' own."""
        best = min(self.timings, key=lambda timing: timing.seconds, default=None)
        return best if best and best.seconds < WORTH * self.timings[0].seconds else None


def make_plan(root: Path, timed: bool = True) -> Plan:
    """Plan a run of the project at `root` as its files stand.

    Args:
        timed: run the micro-steps; needs the outs of `fetch` and `prepare`.

    Raises:
        UserError: a mistake in params.yaml or dvc.yaml.
        RetryError: another process works on the same files.
    """
    params = check_params(read_yaml(root / "params.yaml"))
    size = sizes(root)
    ready = size is not None and "train" in size.splits
    quiet()
    busy = os.getloadavg()[0]
    timings: list[Timing] = []
    if size is not None and ready and timed:
        ranks = reference_ranks("1", params, size)
        timings = list(measure(root, knot_of(params, "1").link, ranks, alternatives(params.machine)))
    speed = speed_of(params, size, timings[0]) if size and timings else None
    fates = plan(root)
    lines = [
        _line(stage.name, fates[stage.name], cost(stage.task, stage.key, params, size) if size else None, speed)
        for stage in stages(root)
    ]
    unknown = [*_unknown(size, busy if timings else 0.0, timed), *_uncounted(params)]
    return Plan(lines, unknown, timings)


def _uncounted(params: Params) -> Iterator[str]:
    """Values of the axes whose own work and memory the formulas leave out."""
    found: dict[str, None] = {}
    for key in params.chain:
        knot = knot_of(params, key)
        for name, counted in COUNTED.items():
            value = getattr(knot.link, name) if name != "allocator" else knot.allocate.allocator
            kind = value if isinstance(value, str) else value.kind
            found |= {kind: None} if kind not in counted else {}
    if found:
        yield f"{', '.join(found)}: counted as LoRA with AdamW at the reference rank; their own work comes on top"


# What the formulas count, or what is nothing beside it.
COUNTED = {
    "allocator": ("uniform", "gora", "eva"),
    "initialiser": ("kaiming", "random_b", "gora", "eva", "cora"),
    "parametrisation": ("plain", "frozen_a", "frozen_b", "gated", "softmax_gated"),
    "update": ("adamw", "sgd", "lora_plus", "penalised", "proximal", "fedavg"),
    "pruning": ("none",),
    "quantise": ("none",),
}


def speed_of(params: Params, size: Sizes, timing: Timing) -> float:
    """FLOP per second of a training micro-step, by the same arithmetic as the costs."""
    return lora_step(size.shape, timing.work, reference_ranks("1", params, size)) / timing.seconds


def _line(name: str, fate: Fate, found: Cost | None, speed: float | None) -> Line:
    known = found is not None and found.flops is not None and speed is not None
    return Line(name, fate, found, found.flops / speed if known else None)  # type: ignore[union-attr, operator]


def _unknown(size: Sizes | None, busy: float, timed: bool) -> Iterator[str]:
    if size is None:
        yield "parameters, memory and FLOPs: known after `dvc repro fetch`, which brings the base model's shapes"
    if timed and (size is None or "train" not in size.splits):
        yield "FLOPs of whole stages, times and the best machine setting: known after `dvc repro prepare`"
    if size is not None:
        yield "memory is an estimate: weights, what trains or a probe keeps, the longest micro-batch; not the libraries"
        if "train" not in size.splits:
            yield "activations and logits: known after `dvc repro prepare`"
        if not size.shape.complete:
            yield "attention or the output layer of this model is not known by name: only its linear maps are counted"
        yield "times hold for the arithmetic alone: loading, reading and writing come on top"
    if busy > (os.cpu_count() or 1) / 2:
        yield f"other work kept {busy:.1f} of {os.cpu_count()} cores busy: times measured now are too long"
