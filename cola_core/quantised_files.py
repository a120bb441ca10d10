"""Quantised weights on disk: quantised.safetensors holds codes, scales and shape of every module that it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cola_core.axes.bases import QUANTISERS
from cola_core.errors import UserError
from cola_core.lineage import QUANTISED
from cola_core.quantisation import Quantised, sizes
from cola_core.tensors import load_tensors, save_tensors

__all__ = ["read_quantised", "write_quantised"]


def write_quantised(folder: Path, bases: Mapping[str, Quantised]) -> None:
    """Write `<module>.<kind>.{codes,scales,shape}` into an existing folder; no file where there is no module."""
    tensors: dict[str, Tensor] = {}
    for name, held in bases.items():
        shape = torch.tensor(held.shape, dtype=torch.int64)
        parts = {"codes": held.codes, "scales": held.scales, "shape": shape}
        tensors |= {f"{name}.{held.kind}.{part}": tensor for part, tensor in parts.items()}
    if tensors:
        save_tensors(folder / QUANTISED, tensors)


def read_quantised(folder: Path) -> dict[str, Quantised]:
    """What `write_quantised` wrote; nothing where there is no file.

    Raises:
        UserError: truncated, or not what it claims to be.
    """
    path = folder / QUANTISED
    if not path.exists():
        return {}
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in load_tensors(path).items():
        stem, _, part = key.rpartition(".")
        name, _, kind = stem.rpartition(".")
        parts.setdefault(name, {}).setdefault(kind, {})[part] = tensor
    return {name: _held(path, name, kinds) for name, kinds in parts.items()}


def _held(path: Path, name: str, kinds: Mapping[str, Mapping[str, Tensor]]) -> Quantised:
    """One module, once every part of it fits the others."""
    (kind, parts), *more = kinds.items()
    if more or kind not in QUANTISERS or parts.keys() != {"codes", "scales", "shape"}:
        found = ", ".join(f"{kind}.{part}" for kind, parts in kinds.items() for part in parts)
        raise UserError(
            f"{path}: {name}: {found} are not the codes, scales and shape of one of {', '.join(QUANTISERS)}; "
            "restore it with `dvc checkout`"
        )
    codes, scales, shape = parts["codes"], parts["scales"], _shape(parts["shape"])
    fits = shape is not None and (codes.shape, scales.shape) == sizes(shape, kind)
    if shape is None or not fits or (codes.dtype, scales.dtype) != (torch.uint8, torch.float32):
        told = f"codes {list(codes.shape)} {codes.dtype}, scales {list(scales.shape)} {scales.dtype}"
        raise UserError(f"{path}: {name}: {told} are no {kind} of {shape}; restore it with `dvc checkout`")
    if not bool(torch.isfinite(scales).all()):
        raise UserError(f"{path}: {name}: a scale is not finite; restore it with `dvc checkout`")
    return Quantised(codes, scales, shape, kind)


def _shape(told: Tensor) -> tuple[int, int] | None:
    """(out, in), if it can be one."""
    if told.dtype != torch.int64 or told.shape != (2,) or int(told.min()) < 1:
        return None
    rows, columns = told.tolist()
    return rows, columns
