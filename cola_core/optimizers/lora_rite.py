"""LoRA-RITE, arXiv 2410.20625: a matrix preconditioner for which the step of W depends on B A alone, not on A and B.

As long as the factors' smallest singular values are above `cutoff` of their largest.

Each factor is taken as a tall matrix, B (out x r) and A^T (in x r), whose partner is the other one. With the partner's
thin QR decomposition Q R, the gradient g of a factor is turned into one with respect to Q, g R^-1: it has forgotten how
large the partner is, and its moments are kept in the coordinates of Q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from cola_core.optimizers.pairwise import Factors, Rule, State, wide

__all__ = ["Numbers", "escaped", "rite", "transported"]


@dataclass(frozen=True)
class Numbers:
    """What the update is set to.

    skip: RMS above which a factor's unmagnified gradient is taken as 0; clip: bound of the norm of all of them; None
    for never. cutoff: share of a factor's largest singular value below which its others count as 0. escape: whether
    the mass that second moments lose when their basis turns is added again.
    """

    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    skip: float | None
    clip: float | None
    cutoff: float
    escape: bool


@dataclass
class Side:
    """One factor and what its step needs: all of it is found before any factor moves.

    parameter: A or B itself; turned: whether it is A, so that A^T is the tall one; rate: the learning rate;
    basis: the partner's Q, its rows x r; inverse: the pseudo-inverse of the partner's R, r x r;
    gradient: the unmagnified gradient g R^-1, own rows x r. Float64.
    """

    parameter: Parameter
    turned: bool
    rate: float
    basis: Tensor
    inverse: Tensor
    gradient: Tensor


def rite(numbers: Numbers) -> Rule:
    """The whole update: no factor is left to AdamW."""

    def rule(state: State, modules: Sequence[Factors]) -> None:
        sides = [side for module in modules for side in _sides(module, numbers)]
        norm = math.sqrt(sum(float(side.gradient.square().sum()) for side in sides))
        share = min(1.0, numbers.clip / norm) if numbers.clip is not None and norm > 0 else 1.0
        for side in sides:
            moved = _momentum(state[side.parameter], side, share * side.gradient, numbers) @ side.inverse.T
            side.parameter.mul_(1 - side.rate * numbers.weight_decay)
            side.parameter.sub_((side.rate * (moved.T if side.turned else moved)).to(side.parameter))
            side.parameter.grad = None

    return rule


def transported(moment: Tensor, turn: Tensor) -> Tensor:
    """Second moments V (r x r) in a new basis, P V P^T for P = Q_new^T Q_old; symmetric again."""
    moved = turn @ moment @ turn.T
    return (moved + moved.T) / 2


def escaped(new: Tensor, old: Tensor) -> float:
    """What second moments lost in transport: the largest eigenvalue's fall or the trace's, whichever is less."""
    fall = (torch.linalg.eigvalsh(old) - torch.linalg.eigvalsh(new)).max()
    return max(0.0, min(float(fall), float(old.trace() - new.trace())))


def _sides(module: Factors, numbers: Numbers) -> tuple[Side, Side]:
    return (
        _side(module.a, True, module.rate, wide(module.b), numbers),
        _side(module.b, False, module.rate, wide(module.a).T, numbers),
    )


def _side(parameter: Parameter, turned: bool, rate: float, partner: Tensor, numbers: Numbers) -> Side:
    """Where the partner is 0, or next to it, R's pseudo-inverse is 0, and the factor stands still.

    1 / R would magnify the rounding of a gradient of lower rank, and what it moves in the other factor's next step.
    """
    assert parameter.grad is not None
    basis, upper = torch.linalg.qr(partner)
    inverse = torch.linalg.pinv(upper, rtol=numbers.cutoff)
    gradient = wide(parameter.grad.T if turned else parameter.grad) @ inverse
    if numbers.skip is not None and float(gradient.square().mean().sqrt()) > numbers.skip:
        gradient = torch.zeros_like(gradient)
    return Side(parameter, turned, rate, basis, inverse, gradient)


def _momentum(state: dict[str, Tensor], side: Side, gradient: Tensor, numbers: Numbers) -> Tensor:
    """M, own rows x r, in the partner's basis: moments are transported, then V takes g in, and M takes g V^(-1/2)."""
    if not state:
        state |= _started(side, numbers)
    one, two = (_decay(beta, float(state["step"])) for beta in numbers.betas)
    turn, old, lost = side.basis.T @ wide(state["basis"]), wide(state["second"]), 0.0
    second = transported(old, turn)
    if numbers.escape:
        lost = two * (float(state["escaped"]) + escaped(second, old))
        state["escaped"].fill_(lost)
    second = two * second + (1 - two) * (gradient.T @ gradient) / len(gradient)
    first = one * wide(state["first"]) @ turn.T + (1 - one) * gradient @ _inverse_root(second, lost, numbers.epsilon)
    for name, tensor in {"basis": side.basis, "second": second, "first": first}.items():
        state[name].copy_(tensor)
    state["step"] += 1
    return first


def _started(side: Side, numbers: Numbers) -> dict[str, Tensor]:
    """Empty state, in the factor's own dtype and on its device."""
    rank = len(side.inverse)
    shapes = {"basis": side.basis.shape, "second": (rank, rank), "first": side.gradient.shape}
    shapes |= {"escaped": ()} if numbers.escape else {}
    state = {name: side.parameter.new_zeros(shape) for name, shape in shapes.items()}
    return state | {"step": torch.tensor(0.0)}


def _decay(beta: float, done: float) -> float:
    """The decay after `done` steps for a mean without bias (Adafactor, arXiv 1804.04235, section 7.1); 0 at first."""
    decay: float = beta * (1 - beta**done) / (1 - beta ** (done + 1))
    return decay


def _inverse_root(second: Tensor, lost: float, epsilon: float) -> Tensor:
    """(V + lost I)^(-1/2), r x r; epsilon is added to the roots of the eigenvalues."""
    values, vectors = torch.linalg.eigh(second)
    roots = (values.clamp(min=0) + lost).sqrt() + epsilon
    inverse: Tensor = vectors / roots @ vectors.T
    return inverse
