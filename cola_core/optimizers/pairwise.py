"""Updates that look at A and B of a module together: a rule ahead of torch's AdamW, which trains all the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from cola_core.adapters import LoRA
from cola_core.optimizers.stepping import Adam

__all__ = ["Factors", "Rule", "State", "pairwise", "wide"]

Groups = list[dict[str, Any]]
State = MutableMapping[Tensor, dict[str, Tensor]]  # parameter -> its own, as in torch.optim


@dataclass(frozen=True)
class Factors:
    """A (r x in) and B (out x r) of one module as they train, each with its gradient; s; this step's learning rate."""

    a: Parameter
    b: Parameter
    scale: float
    rate: float


# The optimizer's state and the factors of every module. A rule takes the step of A and B itself and sets their
# gradients to None, or replaces the gradients and leaves the step to AdamW.
Rule = Callable[[State, Sequence[Factors]], None]


def pairwise(groups: Groups, layers: Mapping[str, LoRA], settings: Mapping[str, Any], rule: Rule) -> Adam:
    """AdamW that first lets `rule` see A and B of every module, whatever their order in the groups.

    Args:
        groups: one per role, with `names` beside `params`.
        layers: module -> its layer, for the scale.
        settings: what AdamW takes, of biases and a head too.
    """
    optimizer = Adam(groups, **settings)

    def before(optimizer: Optimizer, *_: Any) -> None:
        with torch.no_grad():
            rule(optimizer.state, list(_factors(optimizer, layers)))

    optimizer.register_step_pre_hook(before)
    return optimizer


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64, for products such as A A^T square a condition; in main memory where MPS has no float64."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _factors(optimizer: Optimizer, layers: Mapping[str, LoRA]) -> Iterator[Factors]:
    found = {
        name: (parameter, group["lr"])
        for group in optimizer.param_groups
        if group["role"] in ("A", "B")
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    for name, layer in layers.items():
        (a, rate), (b, _) = found[f"{name}.A"], found[f"{name}.B"]
        if len(a):
            yield Factors(a, b, layer.scale, rate)
        else:  # ALoRA took every rank of the module away: nothing is left to step
            a.grad = b.grad = None
