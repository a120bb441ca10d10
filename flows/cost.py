"""What a stage costs by arithmetic alone, from the base's shapes and the prepared rows: no model is loaded.

The formulas are `cola_core.arithmetic`'s, derived and checked in docs/performance.md. Rows count at their mean length,
without padding; memory at the longest. Ranks are the reference rank, which an allocator spends in its own way.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cola_core.arithmetic.flops import forward, knot, lora_step, probe
from cola_core.arithmetic.memory import ADAM, activations, knot_bytes, logits_bytes, probe_bytes
from cola_core.arithmetic.shape import Shape, Work
from cola_core.config.params import Params
from cola_core.config.recipe import AllocateConfig, LinkConfig, ProfileConfig
from cola_core.files import read_json
from cola_core.targets import select_targets

__all__ = ["Cost", "Sizes", "cost", "reference_ranks", "sizes"]

WIDTH = {"fp32": 4, "bf16": 2, "fp64": 8}  # bytes of a weight in use
MASTER = {"fp32": 4, "bf16": 4, "fp64": 8}  # and while links are merged into it


@dataclass(frozen=True)
class Split:
    """Rows of a prepared split, tokens of their prompts and of their answers, and the longest row's of both."""

    rows: int
    prompt: int
    answer: int
    longest: int


@dataclass(frozen=True)
class Sizes:
    """What the fetched base and the prepared rows tell.

    weights: all of the base's parameters; splits: empty before `prepare`; candidates: tokens of each candidate;
    generated: tokens of a generated answer at most, 0 where none is.
    """

    shape: Shape
    kind: str
    weights: int
    splits: dict[str, Split]
    candidates: list[int]
    generated: int


@dataclass(frozen=True)
class Cost:
    """trainable: parameters; flops: of the whole stage, None before `prepare`; memory: bytes, without libraries."""

    trainable: int
    flops: float | None
    memory: float


def sizes(root: Path) -> Sizes | None:
    """Read the sizes below `root`; None before `fetch`."""
    model, prepared = root / "artifacts/fetch/model", root / "artifacts/prepare"
    if not (model / "cola.json").is_file():
        return None
    base = read_json(model / "cola.json")
    config = read_json(model / "config.json") if (model / "config.json").is_file() else {}
    modules = {name: (shape[0], shape[1]) for name, shape in base["modules"].items()}
    files = {name: prepared / f"{name}.arrow" for name in ("train", "validation", "test", "probe")}
    splits = {name: _split(path) for name, path in files.items() if path.is_file()}
    task = read_json(prepared / "task.json") if splits else {}
    generated = task["max_new_tokens"] if task.get("kind") == "generate" else 0
    shape = Shape.of(modules, base["kind"], config)
    return Sizes(shape, base["kind"], _weights(model), splits, list(map(len, task.get("candidates", []))), generated)


def cost(task: str, key: str | None, params: Params, size: Sizes) -> Cost | None:
    """The cost of one stage; None for a stage that runs no model."""
    return COSTS[task](str(key), params, size) if task in COSTS else None


def reference_ranks(key: str, params: Params, size: Sizes) -> dict[str, int]:
    """The reference rank of a link's every target."""
    rank = AllocateConfig(**{**params.allocate, **params.chain[key].allocate}).rank
    modules = size.shape.modules
    return {name: min(rank, *modules[name]) for name in select_targets(modules, params.targets)}


def _profile(key: str, params: Params, size: Sizes) -> Cost:
    """One pass over the probe rows with weight gradients, in one batch or in several."""
    config = ProfileConfig(**{**params.profile, **params.chain[key].profile})
    if config.probe == "none":
        return Cost(0, 0, 0)
    targets, accumulate = select_targets(size.shape.modules, params.targets), config.probe == "accumulate"
    width, checkpointing = WIDTH[params.machine.dtype], config.activation_checkpointing
    held = probe_bytes(size.shape, targets, width, accumulate)
    if "probe" not in size.splits:
        return Cost(0, None, _memory(params, size, held))
    rows = min(config.micro_batch, size.splits["probe"].rows) if accumulate else size.splits["probe"].rows
    batch = _work(params, size, "probe", rows, longest=True)
    kept = activations(size.shape, batch, {}, width, targets, checkpointing) + logits_bytes(size.shape, batch)
    earlier = sum(max(reference_ranks(k, params, size).values()) for k in params.chain if int(k) < int(key))
    work = _work(params, size, "probe", size.splits["probe"].rows)
    return Cost(0, probe(size.shape, work, targets, config.sketch, earlier), _memory(params, size, held + kept))


def _link(key: str, params: Params, size: Sizes) -> Cost:
    """Training steps, a forward over the validation rows at every validation, and the knot."""
    config = LinkConfig(**{**params.link, **params.chain[key].link})
    ranks, shape = reference_ranks(key, params, size), size.shape
    trainable = sum(rank * sum(shape.modules[name]) for name, rank in ranks.items())
    if "train" not in size.splits:
        return Cost(trainable, None, _memory(params, size, ADAM * trainable))
    checkpointing = config.activation_checkpointing
    batch = _work(params, size, "train", min(config.batch, config.micro_batch), longest=True)
    kept = activations(shape, batch, ranks, WIDTH[params.machine.dtype], checkpointing=checkpointing)
    steps = config.steps * lora_step(shape, _work(params, size, "train", config.batch), ranks, checkpointing)
    checked = forward(shape, _work(params, size, "validation", size.splits["validation"].rows), ranks)
    flops = steps + math.ceil(config.steps / config.validate_every) * checked + knot(shape, ranks)
    return Cost(trainable, flops, _memory(params, size, ADAM * trainable + kept + logits_bytes(shape, batch)))


def _merge(_: str, params: Params, size: Sizes) -> Cost:
    """Every knot of the chain."""
    knots = sum(knot(size.shape, reference_ranks(key, params, size)) for key in params.chain)
    return Cost(0, knots, knot_bytes(size.shape, size.weights))


def _evaluate(_: str, params: Params, size: Sizes) -> Cost:
    """Every prefix if asked (the whole chain is the last), else the whole chain alone."""
    return _scoring(params, size, len(params.chain) if params.evaluate.prefixes else 1)


def _evaluate_base(_: str, params: Params, size: Sizes) -> Cost:
    return _scoring(params, size, 1)


Count = Callable[[str, Params, Sizes], Cost]
COSTS: dict[str, Count] = {
    "profile": _profile,
    "link": _link,
    "merge": _merge,
    "evaluate": _evaluate,
    "evaluate_base": _evaluate_base,
}


def _scoring(params: Params, size: Sizes, models: int) -> Cost:
    """A forward over the scored test rows: the prompt once, with every candidate; generation reads it once more."""
    if "test" not in size.splits:
        return Cost(0, None, _memory(params, size, 0))
    split = size.splits["test"]
    rows = split.rows if params.evaluate.rows == "all" else min(split.rows, params.evaluate.rows)
    prompt = split.prompt / split.rows
    candidates: Sequence[float] = size.candidates or [split.answer / split.rows]
    passes = forward(size.shape, Work.of(size.kind, rows, prompt, candidates))
    if size.generated:
        passes += forward(size.shape, Work.of(size.kind, rows, prompt, [size.generated]))
    batch = Work.of(size.kind, min(rows, params.evaluate.batch), prompt, candidates)
    return Cost(0, models * passes, _memory(params, size, logits_bytes(size.shape, batch)))


def _work(params: Params, size: Sizes, split: str, rows: int, longest: bool = False) -> Work:
    """So many rows of a split as training reads them, all as long as its mean or its longest."""
    found = size.splits[split]
    compared = params.prepare.loss == "candidates" and size.candidates
    answer = found.answer / found.rows
    prompt = found.longest - answer if longest else found.prompt / found.rows
    return Work.of(size.kind, rows, prompt, size.candidates if compared else [answer])


def _memory(params: Params, size: Sizes, more: float) -> float:
    """Weights and what comes on top; on a CPU the wider master that the weights are cast from is there before."""
    dtype = params.machine.dtype
    loading = size.weights * MASTER[dtype] if params.machine.device == "cpu" else 0
    return max(size.weights * WIDTH[dtype] + more, loading)


def _weights(model: Path) -> int:
    """Parameters in a model's safetensors files, from their headers; a large model comes in several."""
    return sum(map(_parameters, model.glob("*.safetensors")))


def _parameters(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _split(path: Path) -> Split:
    """Lengths alone are read of a prepared split."""
    import pyarrow
    import pyarrow.compute as pc

    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
        table = reader.read_all()
    prompt, answer = (pc.list_value_length(table[name]) for name in ("prompt", "answer"))
    longest = pc.max(pc.add(prompt, answer))
    return Split(table.num_rows, *(value.as_py() or 0 for value in (pc.sum(prompt), pc.sum(answer), longest)))
