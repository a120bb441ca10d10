"""Axis 'update': how the gradients of a link become steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter

from cola_core.config.recipe import LinkConfig

__all__ = ["UPDATES", "Update", "build_optimizer"]

# What a parameter is (A, B, bias or head) -> its learning rate at the peak.
Update = Callable[[LinkConfig], dict[str, float]]


def adamw(config: LinkConfig) -> dict[str, float]:
    """One learning rate for A and B."""
    rate = config.learning_rate
    return {"A": rate, "B": rate, "bias": rate, "head": config.head_learning_rate}


def lora_plus(config: LinkConfig) -> dict[str, float]:
    """LoRA+: B learns `ratio` times as fast as A, lr(B) = ratio * lr(A)."""
    return {**adamw(config), "B": config.ratio * config.learning_rate}


UPDATES: dict[str, Update] = {"adamw": adamw, "lora_plus": lora_plus}


def build_optimizer(parameters: Iterable[tuple[str, str, Parameter]], config: LinkConfig) -> torch.optim.Optimizer:
    """A new optimizer with empty state, one group per role (law 4).

    Args:
        parameters: (name, role, parameter) of everything that trains; role is A, B, bias or head.
    """
    rates = UPDATES[config.update](config)
    groups: dict[str, dict[str, Any]] = {}
    for name, role, parameter in parameters:
        group = groups.setdefault(
            role, {"params": [], "names": [], "role": role, "lr": rates[role], "peak": rates[role]}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(
        list(groups.values()), betas=betas, eps=config.epsilon, weight_decay=config.weight_decay, foreach=True
    )
