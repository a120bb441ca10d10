"""Everything a link needs to go on bit for bit, in one safetensors file that is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cola_core.errors import RetryError, of_the_system
from cola_core.files import new_file
from cola_core.tensors import digest, save_tensors

__all__ = ["Progress", "load_checkpoint", "random_state", "save_checkpoint", "usable"]

FORMAT = "2"


@dataclass
class Progress:
    """Where a link stands: the data cursor is `step`, since the order of rows is fixed by the seed.

    losses: one {step, loss, learning_rate, tokens, validation} per step done; best_step, best_loss: of the adapter kept
    so far; waiting: validations since it improved; rounds: of pruning that were run; best: its tensors by name; random:
    the generators' states after the last step.
    """

    step: int = 0
    tokens: int = 0
    best_step: int = 0
    best_loss: float | None = None
    waiting: int = 0
    losses: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    random: dict[str, Tensor] = field(default_factory=dict)
    rounds: int = 0


Named = Mapping[str, Tensor]
TENSORS = ("best", "random")
BROKEN = (SafetensorError, OSError, KeyError, TypeError, ValueError)


def random_state() -> dict[str, Tensor]:
    """The states of torch's global generators, which dropout draws from."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def save_checkpoint(path: Path, progress: Progress, named: Named, optimizer: torch.optim.Optimizer) -> None:
    """Write parameters, optimizer state, best adapter, random state and progress; the old file stays until it is whole.

    Args:
        named: everything that changes while the link trains, parameters and what else layers hold, by name.

    Raises:
        OSError: what the disk refused.
    """
    tensors: dict[str, Tensor] = {f"parameter/{name}": p.detach() for name, p in named.items()}
    for part in TENSORS:
        tensors |= {f"{part}/{name}": tensor for name, tensor in getattr(progress, part).items()}
    tensors |= dict(_optimizer_tensors(optimizer, named))
    state = {f.name: getattr(progress, f.name) for f in fields(progress) if f.name not in TENSORS}
    stored = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(state)
    with new_file(path) as temporary:
        save_tensors(temporary, stored, {"format": FORMAT, "progress": text, "checksum": _checksum(stored, text)})


def load_checkpoint(path: Path, named: Named, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a saved state back into `named` and `optimizer`; a fresh start, and a line, where the file is not usable.

    A link repeats its steps then, and ends the same.

    Raises:
        RetryError: the system cannot read it for the moment.
    """
    if not path.exists():
        return Progress()
    try:
        progress, tensors = _read(path)
        if named.keys() != _below(tensors, "parameter/").keys():
            raise ValueError("its parameters are not this link's")
    except BROKEN as error:
        if isinstance(passing := of_the_system(error), RetryError):
            raise passing from error  # too many open files, no memory: the checkpoint itself may be whole
        print(f"{path}: not usable ({error}); the link starts from its first step", flush=True)
        return Progress()
    for name, tensor in named.items():  # of another shape where ranks have changed
        tensor.data = tensors[f"parameter/{name}"].to(tensor.device).clone()
        if saved := _below(tensors, f"optimizer/{name}/"):
            optimizer.state[tensor] = {k: v if k == "step" else v.to(tensor.device) for k, v in saved.items()}
    torch.set_rng_state(progress.random["cpu"])
    if "cuda" in progress.random and torch.cuda.is_available():
        torch.cuda.set_rng_state(progress.random["cuda"])
    return progress


def usable(path: Path) -> str | None:
    """Why a checkpoint cannot be gone on from; None if it can."""
    try:
        _read(path)
    except BROKEN as error:
        return f"not usable ({error})"
    return None


def _read(path: Path) -> tuple[Progress, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        told = file.metadata() or {}
        if told.get("format") != FORMAT:
            raise ValueError(f"format {told.get('format')!r}, this version reads {FORMAT!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    if told["checksum"] != _checksum(tensors, told["progress"]):
        raise ValueError("changed since it was written")
    state: dict[str, Any] = json.loads(told["progress"])
    return Progress(**state, best=_below(tensors, "best/"), random=_below(tensors, "random/")), tensors


def _checksum(tensors: Mapping[str, Tensor], progress: str) -> str:
    return digest({**tensors, "progress": torch.frombuffer(bytearray(progress.encode()), dtype=torch.uint8)})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _optimizer_tensors(optimizer: torch.optim.Optimizer, named: Named) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named.items():
        for key, value in optimizer.state.get(tensor, {}).items():
            yield f"optimizer/{name}/{key}", value
