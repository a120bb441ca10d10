"""FLOPs of a pass, a training step, a probe and a knot: matrix products, at two per multiplication and addition.

Per token, with P weights in linear maps, p in adapters, and a = heads x head size in each of L layers: forward
2P + 4 T a L, gradients of activations as much again (4 products for attention's 2), gradients of trained weights 2P;
adapters 6p. Attention counts all T x T pairs: a causal kernel may skip half of them, and one that keeps no scores
computes them a second time on the way back. Softmax, norms, activations, Adam, QR and SVD are no products and not
counted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from cola_core.arithmetic.shape import Group, Map, Shape, Work, walk

__all__ = ["forward", "full_step", "knot", "lora_step", "probe", "sampled_probe", "taken"]

BLOCK = 8  # columns of the subspace iteration for the gap, as in `cola_core.gap`
ROUNDS = 3  # of it; measured on SmolLM2-135M: two or three for almost every module, seven at most


def forward(shape: Shape, work: Work, ranks: Mapping[str, int] | None = None) -> float:
    """2P + 2p per token, 4 T a per token and layer, 2 V d per output; ranks: adapted module -> rank."""
    blocks = sum(_forward(group) for group in walk(shape, work, ranks or {}))
    return blocks + 2 * shape.head * work.outputs


def lora_step(shape: Shape, work: Work, ranks: Mapping[str, int], checkpointing: bool = False) -> float:
    """4P + 6p per token, 12 T a per token and layer, 4 V d per output, less what lies below the first adapter.

    Args:
        checkpointing: blocks are computed twice (torch stops each a product before its end), and since transformers
            then lets the embeddings' output ask for a gradient, nothing is saved below the first adapter.
    """
    again = sum(_forward(group) for group in walk(shape, work, ranks)) if checkpointing else 0
    return forward(shape, work, ranks) + _backward(shape, work, ranks, embeddings=checkpointing) + again


def full_step(shape: Shape, work: Work) -> float:
    """6P per token, 12 T a per token and layer, 6 V d per output: every weight trains, embeddings too."""
    backward = _backward(shape, work, {}, shape.modules, embeddings=True)
    return forward(shape, work) + backward + 2 * shape.head * work.outputs


def probe(shape: Shape, work: Work, targets: Collection[str], sketch: int, earlier: int = 0) -> float:
    """6P per token where all is probed, and the reduction of each gradient, once.

    Args:
        targets: modules whose gradients are taken; sketch: rows of A_max;
        earlier: rank that was merged into every module before.
    """
    sizes = [shape.modules[name] for name in targets]
    passes = forward(shape, work) + _backward(shape, work, {}, targets)
    return passes + sum(2 * math.prod(size) * min(sketch, *size) + _gap(*size, earlier) for size in sizes)


def sampled_probe(
    shape: Shape, work: Work, targets: Collection[str], sketch: int, share: float, earlier: int = 0
) -> float:
    """4P per token, and of every probed module 2 k in + 2 s (in + out) for k rows of its gradient and its sketch.

    Args:
        targets, sketch, earlier: as in `probe`; share: of a gradient's rows, those that are taken.
    """
    maps = [m for group in walk(shape, work, {}, targets) for m in group.maps if m.trains]
    spared = sum(2 * m.tokens * m.out * m.inner for m in maps)
    kept = sum(2 * m.tokens * taken(m.out, share) * m.inner for m in maps)
    sketched = sum(2 * m.tokens * min(sketch, m.out, m.inner) * (m.out + m.inner) for m in maps)
    passes = forward(shape, work) + _backward(shape, work, {}, targets) - spared + kept + sketched
    return passes + sum(_approximate(m.out, m.inner, sketch, share) + _gap(m.out, m.inner, earlier) for m in maps)


def taken(out: int, share: float) -> int:
    """How many rows a sampled probe takes of a gradient of `out` rows."""
    return max(2, math.ceil(share * out))


def knot(shape: Shape, ranks: Mapping[str, int]) -> float:
    """s B A of every adapted module: 2 r per weight."""
    return sum(2 * rank * shape.modules[name][0] * shape.modules[name][1] for name, rank in ranks.items())


def _forward(group: Group) -> float:
    maps = sum(2 * m.tokens * (m.out * m.inner + m.rank * (m.out + m.inner)) for m in group.maps)
    return maps + 2 * _product(group)


def _backward(
    shape: Shape, work: Work, ranks: Mapping[str, int], trained: Collection[str] = (), embeddings: bool = False
) -> float:
    """Gradients of the outputs' and blocks' activations, and of what trains."""
    groups = walk(shape, work, ranks, trained, embeddings)
    blocks = sum(_products(group) * _product(group) + sum(map(_gradients, group.maps)) for group in groups)
    return blocks + 2 * shape.head * work.outputs


def _gradients(m: Map) -> float:
    """dX = dY W and dW = dY^T X; of an adapter dB, dA and the gradient between them, and its own part of dX."""
    weight, adapter = m.out * m.inner, m.rank * (m.out + m.inner)
    into = (weight + m.rank * m.inner) * m.below
    return 2 * m.tokens * (into + weight * m.trains + adapter + m.rank * m.out)


def _product(group: Group) -> float:
    """Scores of every pair of tokens, or as much for their weighted values: 2 T T' a."""
    if group.role != "attention":
        return 0
    return 2 * group.query.tokens * group.key.length * group.width


def _products(group: Group) -> int:
    """How many such products gradients take: those of queries and keys, both through the scores', and of values."""
    if group.role != "attention":
        return 0
    query, key = group.query.above, group.key.above
    values = any(m.above for m in group.maps if group.query is group.key or m not in (group.query, group.key))
    return (query or key) + query + key + values


def _approximate(out: int, inner: int, sketch: int, share: float) -> float:
    """Leading singular vectors of the sketch, half as many as rows were taken, times what fits the taken rows.

    That is their pseudo-inverse on these rows (a decomposition, not counted) times the rows.
    """
    rows = taken(out, share)
    vectors = min(max(1, rows // 2), sketch, out, inner)
    return 2 * vectors * (out + rows) * inner


def _gap(out: int, inner: int, earlier: int) -> float:
    """<G, B A> of earlier pairs, G and G^T times a block in every round for ||G||_2, and ||sum s B A||_*."""
    return 2 * out * inner * (earlier + 2 * ROUNDS * min(BLOCK, out, inner)) + 2 * earlier**3
