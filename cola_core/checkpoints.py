"""Everything a link needs to go on bit for bit, in one safetensors file that is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from cola_core.files import new_file

__all__ = ["Progress", "load_checkpoint", "save_checkpoint"]


@dataclass
class Progress:
    """Where a link stands: the data cursor is `step`, since the order of rows is fixed by the seed.

    losses: one {step, loss, learning_rate, tokens, validation} per step done; best_step, best_loss: of the adapter kept
    so far; waiting: validations since it improved; best: its tensors by parameter name.
    """

    step: int = 0
    tokens: int = 0
    best_step: int = 0
    best_loss: float | None = None
    waiting: int = 0
    losses: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


Named = dict[str, Parameter]


def save_checkpoint(path: Path, progress: Progress, named: Named, optimizer: torch.optim.Optimizer) -> None:
    """Write parameters, optimizer state, best adapter, random state and progress; the old file stays until it is whole.

    Args:
        named: every trained parameter by name.
    """
    tensors = {f"parameter/{name}": p.detach() for name, p in named.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in progress.best.items()}
    tensors |= dict(_optimizer_tensors(optimizer, named))
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    state = {f.name: getattr(progress, f.name) for f in fields(progress) if f.name != "best"}
    stored = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    with new_file(path) as temporary:
        save_file(stored, temporary, metadata={"progress": json.dumps(state), "tensors": json.dumps(sorted(stored))})


def load_checkpoint(path: Path, named: Named, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a saved state back into `named` and `optimizer`; a fresh start where there is no usable file."""
    if not path.exists():
        return Progress()
    try:
        with safe_open(path, framework="pt") as file:
            state, names = (json.loads(file.metadata()[key]) for key in ("progress", "tensors"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        progress = Progress(**state)
        _refuse_misfits(tensors, named, names)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
        return Progress()  # cut off before its rename was durable: the link repeats its steps and ends the same
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"parameter/{name}"])
    for name, parameter in named.items():
        prefix = f"optimizer/{name}/"
        saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in saved.items()}
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    best = {key.removeprefix("best/"): value for key, value in tensors.items() if key.startswith("best/")}
    progress.best = best
    return progress


def _refuse_misfits(tensors: dict[str, Tensor], named: Named, names: list[str]) -> None:
    """Before anything is put back: half a state is worse than none."""
    if sorted(tensors) != names:
        raise ValueError("names")
    wanted: dict[str, Tensor] = {"random/cpu": torch.get_rng_state()}
    wanted |= {f"parameter/{name}": parameter for name, parameter in named.items()}
    for name, tensor in wanted.items():
        if (tensors[name].shape, tensors[name].dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(name)


def _optimizer_tensors(optimizer: torch.optim.Optimizer, named: Named) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"optimizer/{name}/{key}", value
