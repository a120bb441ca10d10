"""AdaLoRA, arXiv 2303.10512: singular values that matter least are set to 0, on a budget that falls as a cube."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cola_core.adapters import LoRA
from cola_core.config.training_values import AdaLora as Options
from cola_core.errors import UserError
from cola_core.optimizers.privacy import Reading
from cola_core.optimizers.stepping import Adam

__all__ = ["AdaLora", "budget"]


class AdaLora(Adam):
    """AdamW for dW = s P diag(g) Q, here B, the gates and A, with P and Q held near orthogonality (section 3).

    The loss takes on `orthogonal` times the mean of ||P^T P - I||_F and ||Q Q^T - I||_F over modules. After each step a
    number counts as its sensitivity |w dL/dw|, smoothed, times the smoothed distance from that mean; a triplet's score
    is its gate's plus the means over its row of Q and its column of P. Gates beyond the budget become 0 at every
    `every`th step, and may grow again until the budget is final, `last` steps before the end.
    """

    def __init__(self, groups: Any, layers: Mapping[str, LoRA], options: Options, steps: int, **settings: Any) -> None:
        """Count the gates.

        Raises:
            UserError: there are no more of them than the budget keeps.
        """
        super().__init__(groups, **settings)
        self.layers, self.options, self.steps = layers, options, steps
        self.whole = sum(len(layer.gate) for layer in layers.values())
        self.target = options.rank * len(layers)
        if self.whole <= self.target:
            raise UserError(
                f"link.update.rank {options.rank}: keeps {self.target} ranks in {len(layers)} modules, which start "
                f"with {self.whole}: none would be closed; lower it or raise allocate.rank"
            )

    def collect(self, rows: Sequence[int], read: Reading) -> tuple[float, int]:
        """Gradients of the rows' loss, and of the penalty, which the loss that is told does not hold."""
        told = read(rows)
        parts = [_skew(factor) for layer in self.layers.values() for factor in (layer.A, layer.B.T)]
        (self.options.orthogonal * torch.stack(parts).mean()).backward()  # type: ignore[no-untyped-call]
        return told

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """AdamW's step, the scores, and the budget."""
        super().step(closure)
        done = int(self.state[next(iter(self.layers.values())).gate]["step"])
        options, last = self.options, self.steps - self.options.last
        with torch.no_grad():
            if done < last or done == 1:
                for layer in self.layers.values():
                    for parameter in (layer.A, layer.B, layer.gate):
                        self._notice(parameter)
            if done >= last or (done > options.first and done % options.every == 0):
                self._keep(budget(done, self.whole, self.target, options, self.steps))

    def _notice(self, parameter: Parameter) -> None:
        """Smoothed sensitivity, and its smoothed distance from what it is now (equations 8 to 10)."""
        assert parameter.grad is not None
        state, options, now = self.state[parameter], self.options, (parameter * parameter.grad).abs()
        for name in ("sensitivity", "uncertainty"):
            state.setdefault(name, torch.zeros_like(parameter))
        state["sensitivity"].lerp_(now, 1 - options.smoothing)
        state["uncertainty"].lerp_((now - state["sensitivity"]).abs(), 1 - options.smoothing)

    def _keep(self, count: int) -> None:
        """Close every gate whose score is not among the `count` largest."""
        if count >= self.whole:
            return
        scores = {name: self._score(layer) for name, layer in self.layers.items()}
        floor = torch.cat(list(scores.values())).kthvalue(self.whole - count).values
        for name, layer in self.layers.items():
            layer.gate.masked_fill_(scores[name] <= floor, 0.0)

    def _score(self, layer: LoRA) -> Tensor:
        """Of every triplet, r."""
        a, b, gate = (
            self.state[p]["sensitivity"] * self.state[p]["uncertainty"] for p in (layer.A, layer.B, layer.gate)
        )
        found: Tensor = gate + a.mean(1) + b.mean(0)
        return found


def budget(step: int, whole: int, target: int, options: Options, steps: int) -> int:
    """Open gates after `step` steps: all at first, then a cube's fall to the target, which the last steps keep."""
    if step <= options.first:
        return whole
    if step >= steps - options.last:
        return target
    left = 1 - (step - options.first) / (steps - options.last - options.first)
    return int((whole - target) * left**3 + target)


def _skew(factor: Tensor) -> Tensor:
    """||F F^T - I||_F for F, r x n."""
    distance: Tensor = torch.linalg.matrix_norm(factor @ factor.T - torch.eye(len(factor)).to(factor))
    return distance
