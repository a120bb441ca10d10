"""What the links of a chain come to: their knots tied into a model, their pairs, their last head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cola_core.adapter_files import Adapter, write_adapter
from cola_core.adapters import Pair, add_pair
from cola_core.errors import UserError
from cola_core.files import new_dir
from cola_core.lineage import Link
from cola_core.models import head_parameters
from cola_core.root import seal
from cola_core.tensors import load_tensors

__all__ = ["head_of", "pairs_by_module", "tie", "write_link"]


def write_link(folder: Path, adapter: Adapter, record: dict[str, Any], extra: dict[str, str]) -> None:
    """Write one link whole or not at all.

    Args:
        record: link.json without its file hashes.
        extra: more text files by name, such as losses.csv.
    """
    with new_dir(folder) as temporary:
        write_adapter(temporary, adapter)
        for name, text in extra.items():
            (temporary / name).write_text(text, encoding="utf-8")
        seal(temporary, record)


def head_of(chain: Sequence[Link]) -> dict[str, Tensor]:
    """An encoder's head after the last link that was kept, empty for language models."""
    last = next(link for link in reversed(chain) if link.kept)
    if last.number > 0:
        return last.adapter().head
    path = last.folder / "head.safetensors"
    return load_tensors(path) if path.exists() else {}


def tie(model: PreTrainedModel, chain: Sequence[Link]) -> Iterator[tuple[int, dict[str, float]]]:
    """Tie every knot of `chain` into a model in its master dtype, and give it the last head (laws 3 and 5).

    Yields:
        after each link: its number and the relative merge error of every module; nothing merged, no error.

    Raises:
        UserError: a weight is not finite after a merge.
    """
    for link in chain[1:]:
        pairs = _pairs(link)
        yield link.number, {name: _add(model.get_submodule(name), name, pair, link) for name, pair in pairs.items()}
    head = head_parameters(model)
    with torch.no_grad():
        for name, tensor in head_of(chain).items():
            head[name].copy_(tensor)


def pairs_by_module(chain: Sequence[Link]) -> dict[str, list[Pair]]:
    """module -> the pairs that the chain has merged into it, in order."""
    merged: dict[str, list[Pair]] = {}
    for link in chain[1:]:
        for name, pair in _pairs(link).items():
            merged.setdefault(name, []).append(pair)
    return merged


def _pairs(link: Link) -> dict[str, Pair]:
    return link.adapter().pairs if link.kept else {}


def _add(module: nn.Module, name: str, pair: Pair, link: Link) -> float:
    error = add_pair(module, pair)
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"{link.folder}: {name} is not finite after merging link {link.number}; train it again")
    return error
