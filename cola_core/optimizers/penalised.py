"""AdamW with a penalty of its own: L2 on the factors, or L1 on gates by a proximal step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from cola_core.optimizers.stepping import Adam

__all__ = ["Penalised", "Proximal", "hard_masks", "soft_threshold"]


class Penalised(Adam):
    """AdamW on the loss + l2/2 (||A||^2 + ||B||^2): XGBLoRA's penalty (arXiv 2410.19694, equation 7).

    Unlike weight decay it passes through Adam's normalisation. The losses that are shown do not hold it.
    """

    def __init__(self, groups: Any, l2: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.l2 = l2

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Add the penalty's gradient, then AdamW's step."""
        for group in self.param_groups:
            if group["role"] in ("A", "B"):
                for parameter in group["params"]:
                    parameter.grad.add_(parameter.detach(), alpha=self.l2)
        super().step(closure)


class Proximal(Adam):
    """AdamW, then a proximal step for xi ||g||_1 on the gates (SoRA, arXiv 2311.11696, equation 5).

    soft: g <- soft(g, learning rate * xi), the proximal operator. official: the authors' code: three masks one after
    the other, the threshold xi itself, and with l1 also a subgradient l1 sign(g) / n in the loss, n gates in all.
    """

    def __init__(
        self, groups: Any, threshold: float, rule: Literal["soft", "official"], l1: float, **settings: Any
    ) -> None:
        super().__init__(groups, **settings)
        self.threshold, self.rule, self.l1 = threshold, rule, l1

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """AdamW's step, and the gates' threshold."""
        groups = [group for group in self.param_groups if group["role"] == "gate"]
        gates = [(gate, group["lr"]) for group in groups for gate in group["params"]]
        count = sum(gate.numel() for gate, _ in gates)
        for gate, _ in gates:
            if self.l1:
                gate.grad.add_(gate.detach().sign(), alpha=self.l1 / count)
        super().step(closure)
        with torch.no_grad():
            for gate, rate in gates:
                soft = self.rule == "soft"
                gate.copy_(soft_threshold(gate, rate * self.threshold) if soft else hard_masks(gate, self.threshold))


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """sign(v) max(|v| - threshold, 0): argmin_u (u - v)^2 / 2 + threshold |u|."""
    return values.sign() * (values.abs() - threshold).clamp_min(0)


def hard_masks(values: Tensor, threshold: float) -> Tensor:
    """SoRA's released code: shrink what is above, then what is below, then drop what is left under the threshold.

    Everything between -2 and 2 thresholds ends at 0, and the rest is shrunk by one: no soft threshold.
    """
    shrunk = torch.where(values > threshold, values - threshold, values)
    shrunk = torch.where(shrunk < -threshold, shrunk + threshold, shrunk)
    return torch.where(shrunk.abs() < threshold, 0.0, shrunk)
