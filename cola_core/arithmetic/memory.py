"""Bytes that a training step, a probe and a knot hold, by arithmetic; derived for Llama's blocks, rough for others.

A block keeps for its backward, per token: the fp32 input of both norms, the input of whatever learns, queries, keys,
values and what attention makes of them (a kernel that keeps no T x T scores; where rows are packed, and the next map
learns, once more end to end), an MLP's expanded values (three times where it is gated: gate, silu(gate), up), and r
numbers of each adapter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from cola_core.arithmetic.flops import taken
from cola_core.arithmetic.shape import Group, Map, Shape, Work, walk

__all__ = ["ADAM", "activations", "knot_bytes", "logits_bytes", "probe_bytes", "sampled_bytes"]

ADAM = 16  # bytes per trained parameter: fp32 value, gradient and two moments
FP32, FP64 = 4, 8


def activations(
    shape: Shape,
    work: Work,
    ranks: Mapping[str, int],
    width: int,
    trained: Collection[str] = (),
    checkpointing: bool = False,
) -> float:
    """Bytes kept between forward and backward, logits apart.

    Args:
        ranks, trained: as in `walk`; width: bytes of a number of the compute dtype.
        checkpointing: of every block its input alone, and all of the block whose turn it is.
    """
    groups = list(walk(shape, work, ranks, trained, checkpointing))
    kept = sum(_inputs(group, width, work.packed) + _results(group, shape.heads, width) for group in groups)
    last = work.tokens * FP32 * (shape.hidden + 1)  # the norm before the output layer
    if not checkpointing:
        return kept + last
    blocks = sum(group.role == "expand" for group in groups) or 1
    return kept / blocks + blocks * work.tokens * shape.hidden * width + last


def logits_bytes(shape: Shape, work: Work) -> float:
    """The fp32 logits, their gradient, and two more of their size while it is computed."""
    return 4 * FP32 * work.outputs * shape.vocabulary


def probe_bytes(
    shape: Shape, work: Work, targets: Collection[str], width: int, checkpointing: bool, accumulate: bool
) -> float:
    """What a probe holds beside weights, at most. Sketches leave for the host.

    One batch: activations, and logits before or one module's turn after: its gradient and W * G, both and W in fp32
    where they are narrower. Accumulated: the sums, and a micro-batch, or at the end one sum's mean and W.
    """
    most = max(math.prod(shape.modules[name]) for name in targets)
    wide, cast = max(width, FP32), FP32 if width < FP32 else 0
    kept, logits = activations(shape, work, {}, width, targets, checkpointing), logits_bytes(shape, work)
    if not accumulate:
        return kept + max(logits, (width + 2 * cast + wide) * most)
    sums = wide * sum(math.prod(shape.modules[name]) for name in targets)
    return sums + max(kept + max(logits, (width + cast) * most), (wide + cast) * most)


def sampled_bytes(shape: Shape, work: Work, targets: Collection[str], width: int, sketch: int, share: float) -> float:
    """What a sampled probe holds beside weights, at most.

    The taken rows and sketches, and a micro-batch, or at the end one module's gradient made up from them, and its W.
    """
    maps = [m for group in walk(shape, work, {}, targets) for m in group.maps if m.trains]
    wide, cast = max(width, FP32), FP32 if width < FP32 else 0
    kept, logits = activations(shape, work, {}, width, targets), logits_bytes(shape, work)
    sums = sum(_sampled(m, wide, sketch, share) for m in maps)
    turn = max(cast * m.tokens * (m.out + m.inner) + wide * _sampling(m, share) for m in maps)
    last = max(m.inner * ((wide + cast) * m.out + wide * taken(m.out, share)) for m in maps)
    return sums + max(kept + max(logits, turn), last)


def knot_bytes(shape: Shape, weights: int) -> float:
    """Of the host: the fp32 master of all `weights`, and what measuring one merge's error takes."""
    return FP32 * weights + 4 * FP64 * max(out * inner for out, inner in shape.modules.values())


def _sampled(m: Map, wide: int, sketch: int, share: float) -> float:
    """G[rows], S and A_max."""
    return wide * (taken(m.out, share) * m.inner + min(sketch, m.out, m.inner) * (m.out + m.inner))


def _sampling(m: Map, share: float) -> float:
    """Numbers that a module's turn takes: dY^2 for the choice of rows, or dY[:, rows] and its product, or the sum."""
    rows = taken(m.out, share)
    return max(m.tokens * m.out, m.tokens * rows + rows * m.inner, 2 * rows * m.inner)


def _inputs(group: Group, width: int, packed: bool) -> float:
    """The norm's input and the one of what learns; what attention gives is kept anyway, and counted there.

    Not so where rows are packed: what is kept there is every row's own result, what is read here all of them in one.
    """
    first = group.maps[0]
    norm = FP32 * first.tokens * (first.inner + 1) * (first.below and group.role in ("attention", "expand"))
    given = group.role == "result" and first.below and not packed
    shared = 0 if given else _read(group, width)
    return norm + shared + sum(_adapter(m, width) for m in group.maps if m.learns)


def _read(group: Group, width: int) -> float:
    """The input of a group of which any map learns."""
    return width * group.maps[0].tokens * group.maps[0].inner * any(m.learns for m in group.maps)


def _adapter(m: Map, width: int) -> float:
    """The r numbers per token, s B and, where A is cast, A for its own part of dX."""
    return width * m.rank * (m.tokens + m.out + m.inner * (m.below and width < FP32))


def _results(group: Group, heads: int, width: int) -> float:
    """What attention or an MLP's expansion keeps of its own results; all of it as soon as one part needs a gradient."""
    if group.role not in ("attention", "expand") or not any(m.above for m in group.maps):
        return 0
    given = width * sum(m.tokens * m.out for m in group.maps)
    if group.role == "expand":
        return given * (1.5 if len(group.maps) > 1 else 1)
    return given + group.query.tokens * (width * group.width + FP32 * heads)
