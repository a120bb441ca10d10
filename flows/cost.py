"""What a stage costs by arithmetic alone, from the base's shapes and the prepared rows: no model is loaded.

The formulas are `cola_core.arithmetic`'s, derived and checked in docs/performance.md. Rows count at their mean length,
which leaves out the padding of families and devices where rows are not packed; memory at the longest. Ranks are the
reference rank, which an allocator spends in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cola_core.arithmetic.flops import forward, knot, lora_step, probe, sampled_probe
from cola_core.arithmetic.memory import ADAM, activations, knot_bytes, logits_bytes, probe_bytes, sampled_bytes
from cola_core.arithmetic.shape import Work
from cola_core.config.params import Params, knot_of
from cola_core.config.recipe import LinkConfig, ProfileConfig
from cola_core.rows import PACKABLE
from cola_core.targets import select_targets
from flows.sizes import Sizes

__all__ = ["Cost", "cost", "reference_ranks"]

WIDTH = {"fp32": 4, "bf16": 2, "fp64": 8}  # bytes of a weight in use
MASTER = {"fp32": 4, "bf16": 4, "fp64": 8}  # and while links are merged into it


@dataclass(frozen=True)
class Cost:
    """trainable: parameters; flops: of the whole stage, None before `prepare`; memory: bytes, without libraries."""

    trainable: int
    flops: float | None
    memory: float


def cost(task: str, key: str | None, params: Params, size: Sizes) -> Cost | None:
    """The cost of one stage; None for a stage that runs no model."""
    return COSTS[task](str(key), params, size) if task in COSTS else None


def reference_ranks(key: str, params: Params, size: Sizes) -> dict[str, int]:
    """The reference rank of a link's every target."""
    config, modules = knot_of(params, key).allocate, size.shape.modules
    rank = math.inf if config.allocator.kind == "full" else config.rank
    return {name: int(min(rank, *modules[name])) for name in select_targets(modules, params.targets)}


def _profile(key: str, params: Params, size: Sizes) -> Cost:
    """One pass over the probe rows with weight gradients, in one batch or in several."""
    config = knot_of(params, key).profile
    if config.probe == "none":
        return Cost(0, 0, 0)
    if "probe" not in size.splits:
        return Cost(0, None, _memory(params, size, _probing(config, params, size, Work(0, 0, 0))))
    rows = size.splits["probe"].rows
    at_once = rows if config.probe == "one_batch" else min(config.micro_batch, rows)
    held = _probing(config, params, size, _work(params, size, "probe", at_once, longest=True))
    earlier = sum(max(reference_ranks(k, params, size).values()) for k in params.chain if int(k) < int(key))
    targets, work = select_targets(size.shape.modules, params.targets), _work(params, size, "probe", rows)
    if config.probe == "sampled":
        flops = sampled_probe(size.shape, work, targets, config.sketch, config.row_share, earlier)
    else:
        flops = probe(size.shape, work, targets, config.sketch, earlier)
    return Cost(0, flops, _memory(params, size, held))


def _probing(config: ProfileConfig, params: Params, size: Sizes, batch: Work) -> float:
    """Bytes beside weights, where `batch` is computed at once."""
    targets, width = select_targets(size.shape.modules, params.targets), WIDTH[params.machine.dtype]
    if config.probe == "sampled":
        return sampled_bytes(size.shape, batch, targets, width, config.sketch, config.row_share)
    accumulated, checkpointing = config.probe == "accumulate", config.activation_checkpointing
    return probe_bytes(size.shape, batch, targets, width, checkpointing, accumulated)


def _link(key: str, params: Params, size: Sizes) -> Cost:
    """Training steps, a forward over the validation rows at every validation (and without the link), and the knot."""
    config = knot_of(params, key).link
    ranks, shape = reference_ranks(key, params, size), size.shape
    trained = TRAINED.get(config.parametrisation.kind, TRAINED["plain"])
    trainable = sum(trained(config, rank, *shape.modules[name]) for name, rank in ranks.items())
    if "train" not in size.splits:
        return Cost(trainable, None, _memory(params, size, ADAM * trainable))
    checkpointing = config.activation_checkpointing
    longest = _work(params, size, "train", 1, longest=True).tokens
    batch = _work(
        params, size, "train", _limit(min(config.batch, config.micro_batch), config.micro_tokens, longest), longest=True
    )
    kept = activations(shape, batch, ranks, WIDTH[params.machine.dtype], checkpointing=checkpointing)
    reads = config.steps * config.update.batches
    steps = reads * lora_step(shape, _work(params, size, "train", config.batch), ranks, checkpointing)
    rows = _work(params, size, "validation", size.splits["validation"].rows)
    checked = math.ceil(config.steps / config.validate_every) * forward(shape, rows, ranks)
    before = forward(shape, rows) if config.keep_link == "if_better" else 0
    flops = steps + checked + before + knot(shape, ranks)
    return Cost(trainable, flops, _memory(params, size, ADAM * trainable + kept + logits_bytes(shape, batch)))


# Numbers that train in a module: the recipe's link, r, out, in.
TRAINED: dict[str, Callable[[LinkConfig, int, int, int], int]] = {
    "plain": lambda config, rank, out, inner: rank * (out + inner),
    "frozen_a": lambda config, rank, out, inner: rank * out,
    "frozen_b": lambda config, rank, out, inner: rank * inner,
    "gated": lambda config, rank, out, inner: rank * (out + inner + 1),
    "softmax_gated": lambda config, rank, out, inner: rank * (out + inner + 1),
    "dense": lambda config, rank, out, inner: out * inner,
    "nola": lambda config, rank, out, inner: 2 * config.parametrisation.bases,  # type: ignore[union-attr]
}


def _merge(_: str, params: Params, size: Sizes) -> Cost:
    """Every knot of the chain."""
    knots = sum(knot(size.shape, reference_ranks(key, params, size)) for key in params.chain)
    wider = MASTER[params.machine.dtype] / MASTER["fp32"]
    return Cost(0, knots, wider * knot_bytes(size.shape, size.weights))


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
    together = _limit(min(rows, params.evaluate.batch), params.evaluate.batch_tokens, prompt + max(candidates))
    batch = Work.of(size.kind, together, prompt, candidates)
    return Cost(0, models * passes, _memory(params, size, logits_bytes(size.shape, batch)))


def _work(params: Params, size: Sizes, split: str, rows: int, longest: bool = False) -> Work:
    """So many rows of a split as training reads them, all as long as its mean or its longest."""
    found = size.splits[split]
    compared = params.prepare.loss == "candidates" and size.candidates
    answer = found.answer / found.rows
    prompt = found.longest - answer if longest else found.prompt / found.rows
    work = Work.of(size.kind, rows, prompt, size.candidates if compared else [answer])
    return replace(work, packed=size.family in PACKABLE and params.machine.device == "cpu")


def _limit(rows: int, tokens: int | None, length: float) -> int:
    """So many rows as `tokens` allow, at least one."""
    return rows if tokens is None else max(1, min(rows, int(tokens / length)))


def _memory(params: Params, size: Sizes, more: float) -> float:
    """Weights and what comes on top; on a CPU the wider master that the weights are cast from is there before."""
    dtype = params.machine.dtype
    loading = size.weights * MASTER[dtype] if params.machine.device == "cpu" else 0
    return max(size.weights * WIDTH[dtype] + more, loading)
