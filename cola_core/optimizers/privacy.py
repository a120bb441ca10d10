"""Example-level differential privacy: gradients of bounded, noisy sums (DP-SGD), and the epsilon that they cost."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence

import torch
from torch.nn import Parameter

from cola_core.config.training_values import Privacy
from cola_core.errors import UserError

__all__ = ["Reading", "check_accountant", "epsilon", "private_gradient"]

# Row indices -> the mean loss over them and their tokens; adds its gradient to every parameter's `grad`.
Reading = Callable[[Sequence[int]], tuple[float, int]]


def private_gradient(
    parameters: Sequence[Parameter], rows: Sequence[int], read: Reading, privacy: Privacy, expected: float
) -> list[tuple[float, int]]:
    """DP-SGD, arXiv 1607.00133, Algorithm 1: grad = (sum_i g_i / max(1, ||g_i|| / C) + N(0, (noise C)^2)) / expected.

    g_i: gradient of row i's own mean loss; ||g_i||: over all parameters together; C: `max_norm`. One row at a time. The
    noise comes from torch's global generator on the processor, whose state checkpoints keep.

    Args:
        rows: the batch as it was drawn, which may be empty: the noise comes all the same.
        expected: rows of a batch on average; its own size tells of the rows.

    Returns:
        loss and tokens of every row.
    """
    sums, told = [torch.zeros_like(p) for p in parameters], []
    for row in rows:
        _clear(parameters)
        told.append(read([row]))
        found = [(total, p.grad) for total, p in zip(sums, parameters, strict=True) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([gradient for _, gradient in found])
        for total, gradient in found:
            total += gradient / (norm / privacy.max_norm).clamp(min=1)
    for parameter, total in zip(parameters, sums, strict=True):
        noise = torch.randn(total.shape, dtype=total.dtype).to(total.device)
        parameter.grad = (total + privacy.noise * privacy.max_norm * noise) / expected
    return told


def _clear(parameters: Sequence[Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def epsilon(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """The epsilon at `delta` of sampled Gaussian mechanisms one after the other, by Opacus' accountant.

    Renyi differential privacy (Mironov et al., arXiv 1908.10530) turned into (epsilon, delta) by arXiv 1905.09982,
    theorem 21: an upper bound. Two data sets are neighbours when one has one row more.

    Args:
        history: (noise over bound, probability of a row to be drawn, steps).

    Raises:
        UserError: Opacus is not installed.
    """
    check_accountant()
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the first or last it tries; the bound holds
        return float(accountant.get_epsilon(delta=delta))


def check_accountant() -> None:
    """Refuse, before anything is trained, what could not be accounted for.

    Raises:
        UserError: Opacus is not installed.
    """
    if importlib.util.find_spec("opacus") is None:
        raise UserError(
            "link.update.privacy: opacus, which computes epsilon, is not installed; it is in the extra `privacy`: "
            "python -m pip install -e '.[privacy]'"
        )
