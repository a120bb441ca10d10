"""COLA's own measure of convergence: the Frank-Wolfe gap of one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cola_core.adapters import Pair

__all__ = ["decomposable", "frank_wolfe_gap"]

BLOCK, ROUNDS = 8, 100
PRECISION = {torch.float32: 1e-6, torch.float64: 1e-12}


def frank_wolfe_gap(gradient: Tensor, pairs: Sequence[Pair] | None, radius: float) -> dict[str, Any]:
    """max over V in K of <G, W - V>, with K the nuclear-norm ball of `radius` about the root weights W_0.

    The oracle is V = W_0 - radius u_1 v_1^T, so the gap is <G, W - W_0> + radius ||G||_2 (COLA, section 4; the ball is
    our choice). It is zero only at a stationary point of K, and means nothing once W has left K.

    Args:
        gradient: G, out x in.
        pairs: everything merged so far, W - W_0 = sum s B A; None where a link has replaced W by a quantised one.

    Returns:
        gap, update_nuclear_norm = ||W - W_0||_*, and gap_valid: whether W still lies in K; none where W was replaced.
    """
    if pairs is None:
        return {"gap": None, "update_nuclear_norm": None, "gap_valid": False}
    moved = sum(float((p.scale * (p.b.to(gradient).T @ gradient) * p.a.to(gradient)).sum()) for p in pairs)
    size = _nuclear_norm(pairs)
    return {
        "gap": moved + radius * _spectral_norm(gradient),
        "update_nuclear_norm": size,
        "gap_valid": size <= radius,
    }


def decomposable(matrix: Tensor) -> Tensor:
    """The matrix where torch can decompose it: Apple's GPUs lack singular values, and share their memory."""
    return matrix.cpu() if matrix.device.type == "mps" else matrix


def _spectral_norm(matrix: Tensor) -> float:
    """Largest singular value, by subspace iteration until it moves by less than PRECISION of itself.

    Ten to twenty times faster than the eigenvalues of the smaller Gram matrix: gradients have few large singular
    values, so that a block of BLOCK vectors from a fixed start settles in two or three rounds.
    """
    matrix = decomposable(matrix)
    start = torch.randn(matrix.shape[1], min(BLOCK, *matrix.shape), generator=torch.Generator().manual_seed(0))
    right, found = start.to(matrix), 0.0
    for _ in range(ROUNDS):
        left = torch.linalg.qr(matrix @ right).Q
        right, core = torch.linalg.qr(matrix.T @ left)
        before, found = found, float(torch.linalg.matrix_norm(core, 2))
        if abs(found - before) <= PRECISION[matrix.dtype] * found:
            break
    return found


def _nuclear_norm(pairs: Sequence[Pair]) -> float:
    """||sum s B A||_* from the factors alone: the singular values of R_B R_A^T, where B = Q_B R_B, A^T = Q_A R_A."""
    if not pairs:
        return 0.0
    b = torch.cat([p.scale * p.b.double() for p in pairs], dim=1)
    a = torch.cat([p.a.double() for p in pairs], dim=0)
    core = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
    return float(torch.linalg.svdvals(core).sum())
