"""Tensors on disk as safetensors, and what tells whether they are whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, uint8

from cola_core.headers import whole

__all__ = ["digest", "load_tensors", "save_tensors"]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device and stride; `metadata` is by default what transformers and PEFT look for."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(dense, path, metadata=dict(metadata or {"format": "pt"}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU, in memory of its own.

    Where a tensor stands in its file would else decide how it is aligned, and with that how a product of it is summed.

    Raises:
        UserError: missing, or not a whole safetensors file.
    """
    with whole(path):
        return {name: tensor.clone() for name, tensor in load_file(path).items()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """XXH3 over names, types, shapes and contents, which tells whether a tensor is what was saved."""
    found = xxhash.xxh3_128()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        found.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
    return found.hexdigest()
