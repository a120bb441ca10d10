"""LoRA-Pro, arXiv 2407.18242: steps of A and B whose sum s B hA + s hB A is as near the gradient of W as can be.

For G = dL/dW (never formed: gA = s B^T G and gB = s G A^T are enough) the least ||s B hA + s hB A - G||_F is reached by

    hA = (B^T B)^-1 gA / s^2 + X A,    hB = (I - B (B^T B)^-1 B^T) gB (A A^T)^-1 / s^2 - B X

for every X (r x r), all with the same equivalent gradient P_B G + G P_A - P_B G P_A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_core.optimizers.pairwise import Factors, Rule, State, wide

__all__ = ["MODES", "Moments", "directions", "equivalent"]

# Of the largest eigenvalue of B^T B or A A^T. The authors' is 1e-8, not relative: it outweighs B^T B while B is small.
# Relative, it has to be larger: where gradients have a lower rank than B, 1e-8 let entries of A grow to 100.
RIDGE = 1e-6
TINY = torch.finfo(torch.float64).tiny  # of a factor that is 0, whose gradients' products are 0 too


@dataclass(frozen=True)
class Moments:
    """Adam's numbers, and the decoupled weight decay of A and B."""

    betas: tuple[float, float]
    epsilon: float
    weight_decay: float


def directions(
    a: Tensor, b: Tensor, g_a: Tensor, g_b: Tensor, scale: float, nearest: bool = True, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """hA (r x in) and hB (out x r) of the closed form.

    A factor that is 0 has the gradient 0 in the other one, so the first step of a link with B = 0 is hA = gA = 0 and
    hB = gB (A A^T)^-1 / s^2.

    Args:
        a, b, g_a, g_b: A, B and their gradients, float64.
        nearest: with the X of B^T B X + X A A^T = -(B^T B)^-1 gA A^T / s^2, which minimises ||hA - gA||^2 +
            ||hB - gB||^2; X = 0 otherwise.
        ridge: share of their largest eigenvalue that is added to B^T B and A A^T.
    """
    of_b, of_a = _eigen(b.T @ b, ridge), _eigen(a @ a.T, ridge)
    h_a = _inverse(of_b) @ g_a / scale**2
    h_b = g_b @ _inverse(of_a) / scale**2
    h_b = h_b - b @ (_inverse(of_b) @ (b.T @ h_b))
    if not nearest:
        return h_a, h_b
    x = _sylvester(of_b, of_a, -h_a @ a.T)
    return h_a + x @ a, h_b - b @ x


def equivalent(a: Tensor, b: Tensor, h_a: Tensor, h_b: Tensor, scale: float) -> Tensor:
    """The equivalent gradient s B hA + s hB A, out x in: what the steps hA and hB do to W, to first order."""
    return scale * (b @ h_a + h_b @ a)


def _eigen(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues, raised by the ridge, and eigenvectors of a symmetric r x r matrix."""
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp(min=0) + max(ridge * float(values[-1]), TINY), vectors


def _inverse(eigen: tuple[Tensor, Tensor]) -> Tensor:
    values, vectors = eigen
    return vectors / values @ vectors.T


def _sylvester(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], c: Tensor) -> Tensor:
    """The X of L X + X R = C, for L and R by their eigenvalues and eigenvectors."""
    (l_values, l_vectors), (r_values, r_vectors) = left, right
    inner = l_vectors.T @ c @ r_vectors / (l_values[:, None] + r_values[None, :])
    return l_vectors @ inner @ r_vectors.T


def efficient(numbers: Moments) -> Rule:
    """AdamW on (hA, hB) in the place of (gA, gB): state and decay as in LoRA."""

    def rule(state: State, modules: Sequence[Factors]) -> None:
        for m in modules:
            assert m.a.grad is not None and m.b.grad is not None
            h_a, h_b = directions(wide(m.a), wide(m.b), wide(m.a.grad), wide(m.b.grad), m.scale)
            m.a.grad.copy_(h_a)
            m.b.grad.copy_(h_b)

    return rule


def full(numbers: Moments) -> Rule:
    """Adam on the equivalent gradient, whose step g is brought back to A and B: two out x in matrices of state.

    A, B <- (1 - lr decay) (A, B) - lr (hA, hB) for the gradients s B^T g and s g A^T.
    """

    def rule(state: State, modules: Sequence[Factors]) -> None:
        for m in modules:
            assert m.a.grad is not None and m.b.grad is not None
            a, b = wide(m.a), wide(m.b)
            h_a, h_b = directions(a, b, wide(m.a.grad), wide(m.b.grad), m.scale, nearest=False)
            g = wide(_adam(state[m.a], equivalent(a, b, h_a, h_b, m.scale).to(m.a), numbers))
            h_a, h_b = directions(a, b, m.scale * b.T @ g, m.scale * g @ a.T, m.scale)
            kept = 1 - m.rate * numbers.weight_decay
            m.a.copy_(kept * a - m.rate * h_a)
            m.b.copy_(kept * b - m.rate * h_b)
            m.a.grad = m.b.grad = None

    return rule


# How Adam's moments meet the closed form.
MODES: dict[str, Callable[[Moments], Rule]] = {"efficient": efficient, "full": full}


def _adam(state: dict[str, Tensor], gradient: Tensor, numbers: Moments) -> Tensor:
    """Adam's bias-corrected step of an out x in gradient; `state` is the module's, under its A."""
    if not state:
        state["step"] = torch.tensor(0.0)
        state["first"], state["second"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["step"] += 1
    (one, two), step = numbers.betas, float(state["step"])
    state["first"].lerp_(gradient, 1 - one)
    state["second"].mul_(two).addcmul_(gradient, gradient, value=1 - two)
    root = state["second"].sqrt() / math.sqrt(1 - two**step) + numbers.epsilon
    step_of_w: Tensor = state["first"] / (1 - one**step) / root
    return step_of_w
