"""What the links of a chain come to: their knots tied into a model, their pairs, their last head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from cola_core.models import adaptable, head_parameters, weight_shape
from cola_core.quantisation import Quantised, restore
from cola_core.root import seal
from cola_core.tensors import load_tensors

__all__ = ["earlier_pairs", "head_of", "moved", "pairs_by_module", "tie", "write_link"]


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
        UserError: an adapter or a head is not of this model, or a weight is not finite after a merge.
    """
    modules = adaptable(model)
    shapes = {name: weight_shape(module) for name, module in modules.items()}
    for link in chain[1:]:
        pairs, bases = _merged(link)
        _check_shapes(link, {name: (p.b.shape[0], p.a.shape[1]) for name, p in pairs.items()}, shapes)
        _check_shapes(link, {name: held.shape for name, held in bases.items()}, shapes)
        for name, held in bases.items():
            restore(modules[name], held)
        yield link.number, {name: _add(modules[name], name, pair, link) for name, pair in pairs.items()}
    head, told = head_parameters(model), head_of(chain)
    _check_shapes(chain[-1], {n: tuple(t.shape) for n, t in told.items()}, {n: tuple(p.shape) for n, p in head.items()})
    with torch.no_grad():
        for name, tensor in told.items():
            head[name].copy_(tensor)


def pairs_by_module(chain: Sequence[Link]) -> dict[str, list[Pair]]:
    """module -> the pairs that the chain has merged into it, in order."""
    return _by_module([_merged(link)[0] for link in chain[1:]])


def earlier_pairs(chain: Sequence[Link]) -> tuple[dict[str, list[Pair]], dict[str, Pair]]:
    """The same, and module -> what the last link trained: its pair without the ranks by which W gave up its start."""
    links, given = [_merged(link)[0] for link in chain[1:]], chain[-1].record.get("given_ranks", {})
    last = links[-1] if links else {}
    return _by_module(links), {name: _first_ranks(pair, pair.rank - given.get(name, 0)) for name, pair in last.items()}


def moved(chain: Sequence[Link]) -> dict[str, list[Pair] | None]:
    """module -> W - W_0 as pairs, in order; None where a link has replaced W: no sum of pairs tells it."""
    replaced = {name for link in chain[1:] if link.replaces_weights for name in link.adapter().bases}
    return {**pairs_by_module(chain), **dict.fromkeys(replaced)}


def _merged(link: Link) -> tuple[dict[str, Pair], dict[str, Quantised]]:
    """What the link adds to weights, and what it puts in their place: nothing where it was dropped."""
    if not link.kept:
        return {}, {}
    adapter = link.adapter()
    return adapter.pairs, adapter.bases


def _by_module(links: Sequence[Mapping[str, Pair]]) -> dict[str, list[Pair]]:
    merged: dict[str, list[Pair]] = {}
    for pairs in links:
        for name, pair in pairs.items():
            merged.setdefault(name, []).append(pair)
    return merged


def _first_ranks(pair: Pair, count: int) -> Pair:
    count = max(0, count)  # a stranger's link.json may tell of more ranks than there are
    return replace(pair, a=pair.a[:count], b=pair.b[:, :count])


def _check_shapes(link: Link, told: Mapping[str, tuple[int, ...]], known: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse what a stranger's files may name: a module or a shape that the base does not have."""
    for name, shape in told.items():
        if known.get(name) != shape:
            fits = f"the base's is {list(known[name])}" if name in known else "the base has none of that name"
            raise UserError(f"{link.folder}: {name}: {list(shape)} does not fit: {fits}; it is of another base")


def _add(module: nn.Module, name: str, pair: Pair, link: Link) -> float:
    error = add_pair(module, pair)
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not bool(torch.isfinite(weight).all()):
        step, rate = link.record["kept_step"], link.record["link_section"]["learning_rate"]
        raise UserError(
            f"{link.folder}: link {link.number}, step {step}: {name} is not finite after merging it; "
            f"link.learning_rate was {rate:g}: train it again with a tenth of it or machine.dtype=fp32"
        )
    return error
