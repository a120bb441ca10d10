"""The chain: an ordered list of links over a root base, each committing to its parent by hash.

Folder k holds link k's adapter and link.json; folder 0 holds the root: which base, and an encoder's first head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cola_core.adapter_files import Adapter, read_adapter, write_adapter
from cola_core.adapters import Pair, add_pair
from cola_core.errors import UserError
from cola_core.files import new_dir, tree_hash
from cola_core.models import head_parameters
from cola_core.root import seal
from cola_core.sealed import damaged, inside, read_sealed
from cola_core.tensors import load_tensors

__all__ = ["Link", "head_of", "pairs_by_module", "read_chain", "tie", "write_link"]


@dataclass(frozen=True)
class Link:
    """One folder of the chain; `record` is link.json, `hash` commits to it, its files and all its ancestors."""

    folder: Path
    record: dict[str, Any]
    hash: str

    @property
    def number(self) -> int:
        """0 for the root."""
        return int(self.record["link"])

    @property
    def kept(self) -> bool:
        """Whether the link is part of the model; one that its policy dropped only keeps its place in the chain."""
        return bool(self.record.get("kept", True))

    def adapter(self) -> Adapter:
        """The adapter's files, read."""
        return read_adapter(self.folder)


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


def read_chain(folder: Path) -> list[Link]:
    """Every link from the root to the one in `folder` (`links/<k>/adapter`), walked by parent, never globbed.

    Raises:
        UserError: a link is missing or changed, or its parent is not the one it was trained on.
    """
    link = _read_link(folder)
    chain = [link]
    while link.number > 0:
        parent = _read_link(folder.parent.parent / str(link.number - 1) / folder.name)
        if parent.hash != link.record["parent"]["hash"]:
            raise UserError(
                f"{link.folder}: was trained on another link {parent.number} "
                f"({link.record['parent']['hash'][:12]}, found {parent.hash[:12]}); run `dvc repro`"
            )
        chain.append(parent)
        link = parent
    return chain[::-1]


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


def _read_link(folder: Path) -> Link:
    record = read_sealed(folder / "link.json", "link")
    for name, expected in record["files"].items():
        path = inside(folder, name)
        if not path.is_file() or tree_hash(path) != expected:
            raise damaged(path)
    return Link(folder, record, tree_hash(folder / "link.json"))
