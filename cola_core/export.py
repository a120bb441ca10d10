"""What a chain can be handed on as: one flat adapter, one portable adapter, one merged checkpoint, and chain.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola_core.adapter_files import Adapter, write_adapter
from cola_core.adapters import Pair
from cola_core.chain import head_of, pairs_by_module
from cola_core.errors import UserError
from cola_core.lineage import Link, no_adapter

__all__ = ["chain_manifest", "flat_adapter", "portable_adapter", "write_flat"]

COPIED = (
    *("kept", "steps", "kept_step", "tokens", "probe_tokens", "trainable_parameters"),
    *("validation_before", "validation_loss"),
)


def flat_adapter(chain: Sequence[Link]) -> Adapter:
    """All links as one adapter against the root base: concatenated along rank, each scale folded into B.

    dW = sum_i s_i B_i A_i = [s_1 B_1 ... s_M B_M] [A_1; ...; A_M]; its own scale is 1 (alpha = r in every module).

    Raises:
        UserError: no link was kept, one trained biases, which PEFT's readers do not agree on, or one replaced weights.
    """
    if reason := no_adapter([{"kept": link.kept, "replaces_weights": link.replaces_weights} for link in chain[1:]]):
        raise UserError(f"merge.flat_adapter: {reason}")
    last, merged = chain[-1].adapter(), pairs_by_module(chain)
    if any(pair.bias is not None for parts in merged.values() for pair in parts):
        raise UserError("merge.flat_adapter: links trained with link.bias=lora export as a merged checkpoint only")
    pairs = {name: _concatenate(parts) for name, parts in merged.items()}
    alpha = {name: float(pair.rank) for name, pair in pairs.items()}
    return Adapter(pairs, last.base, last.kind, alpha, False, last.transposed, head_of(chain))


def portable_adapter(flat: Adapter) -> Adapter:
    """The flat adapter zero-padded to one rank with alpha == r: servers such as vLLM read one global scale.

    Raises:
        UserError: the adapter saves a head, which those servers refuse.
    """
    if flat.head:
        raise UserError(
            "merge.portable_adapter: an encoder's head is saved with it, which servers refuse; set it to false"
        )
    rank = max(pair.rank for pair in flat.pairs.values())
    pairs = {name: _pad(pair, rank) for name, pair in flat.pairs.items()}
    return Adapter(pairs, flat.base, flat.kind, dict.fromkeys(pairs, float(rank)), False, flat.transposed)


def write_flat(folder: Path, adapter: Adapter) -> None:
    """Write an adapter into a new folder."""
    folder.mkdir(parents=True)
    write_adapter(folder, adapter)


def chain_manifest(chain: Sequence[Link], errors: dict[int, dict[str, float]]) -> dict[str, Any]:
    """The content of chain.json: base, chain hash (the last link's, which commits to all before it), and every link.

    Args:
        errors: link -> module -> relative merge error, from `tie`.
    """
    return {
        "base": chain[0].record["base"],
        "labels": chain[0].record["labels"],
        "root": chain[0].hash,
        "hash": chain[-1].hash,
        "links": [_entry(link, errors[link.number]) for link in chain[1:]],
    }


def _entry(link: Link, errors: dict[str, float]) -> dict[str, Any]:
    pairs = link.adapter().pairs
    return {
        "link": link.number,
        "hash": link.hash,
        "parent": link.record["parent"]["hash"],
        "path": f"links/{link.number}/adapter",
        "seed": link.record["seed"],
        "ranks": {name: pair.rank for name, pair in pairs.items()},
        "scale": {name: pair.scale for name, pair in pairs.items()},
        "merge_error_max": max(errors.values(), default=0.0),
        "replaces_weights": link.replaces_weights,
        **{key: link.record[key] for key in COPIED},
    }


def _concatenate(parts: Sequence[Pair]) -> Pair:
    a = torch.cat([pair.a for pair in parts], dim=0)
    b = torch.cat([pair.scale * pair.b for pair in parts], dim=1)
    return Pair(a, b, 1.0)


def _pad(pair: Pair, rank: int) -> Pair:
    def grow(matrix: Tensor, dim: int) -> Tensor:
        shape = list(matrix.shape)
        shape[dim] = rank - shape[dim]
        return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim)

    return Pair(grow(pair.a, 0), grow(pair.b, 1), 1.0)
