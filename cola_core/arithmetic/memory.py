"""Bytes that a training step, a probe and a knot hold, by arithmetic; derived for Llama's blocks, rough for others.

A block keeps for its backward, per token: the fp32 input of both norms, the input of whatever learns, queries, keys,
values and what attention makes of them (a kernel that keeps no T x T scores), an MLP's expanded values (three times
where it is gated: gate, silu(gate), up), and r numbers of each adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cola_core.arithmetic.shape import Group, Map, Shape, Work, walk

__all__ = ["ADAM", "activations", "knot_bytes", "logits_bytes", "probe_bytes"]

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
    kept = sum(_inputs(group, width) + _results(group, shape.heads, width) for group in groups)
    last = work.tokens * FP32 * (shape.hidden + 1)  # the norm before the output layer
    if not checkpointing:
        return kept + last
    blocks = sum(group.role == "expand" for group in groups) or 1
    return kept / blocks + blocks * work.tokens * shape.hidden * width + last


def logits_bytes(shape: Shape, work: Work) -> float:
    """The fp32 logits, their gradient, and two more of their size while it is computed."""
    return 4 * FP32 * work.outputs * shape.vocabulary


def probe_bytes(shape: Shape, targets: Collection[str], width: int, accumulate: bool) -> float:
    """What a probe holds beside weights and activations: one module's turn, and all mean gradients if accumulated.

    A turn: the gradient and its mean, fp32 if they are narrower, float64 for the spectral norm, and twice the Gram
    matrix of its shorter side. Sketches leave for the host.
    """
    turn = max(map(_turn, (shape.modules[name] for name in targets), [width] * len(targets)))
    held = sum(shape.modules[name][0] * shape.modules[name][1] for name in targets) if accumulate else 0
    return turn + FP32 * held


def knot_bytes(shape: Shape, weights: int) -> float:
    """Of the host: the fp32 master of all `weights`, and what measuring one merge's error takes."""
    return FP32 * weights + 4 * FP64 * max(out * inner for out, inner in shape.modules.values())


def _turn(size: tuple[int, int], width: int) -> int:
    out, inner = size
    each = 2 * width + (FP32 if width < FP32 else 0) + FP64
    return each * out * inner + 2 * FP64 * min(out, inner) ** 2


def _inputs(group: Group, width: int) -> float:
    """The norm's input and the one of what learns; what attention gives is kept anyway, and counted there."""
    first, learning = group.maps[0], [m for m in group.maps if m.learns]
    norm = FP32 * first.tokens * (first.inner + 1) * (first.below and group.role in ("attention", "expand"))
    given = group.role == "result" and first.below
    shared = width * first.tokens * first.inner * (bool(learning) and not given)
    return norm + shared + sum(_adapter(m, width) for m in learning)


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
