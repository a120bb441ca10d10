"""NOLA's links on disk: coefficients and seeds, from which A and B are made again as they were trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from cola_core.config.base import Strict
from cola_core.draws import DRAWN
from cola_core.errors import UserError
from cola_core.forms.nola import excess, expand
from cola_core.seeds import of_layer

if TYPE_CHECKING:
    from cola_core.adapters import Pair

__all__ = ["Drawn", "Streams", "described", "filled_in"]

Size = Annotated[int, Field(ge=1)]


class Streams(Strict):
    """Key `nola` of adapter_config.json: where A_0, B_0 and the bases come from.

    bases: coefficients of each factor; shapes: module -> [out, in], which coefficients do not tell.
    """

    seed: int = Field(ge=-(2**63), lt=2**63)
    link: int = Field(ge=1, lt=2**63)
    initialiser: Literal["kaiming", "random_b"]
    bases: Size
    shapes: dict[str, Annotated[list[Size], Field(min_length=2, max_length=2)]]


@dataclass(frozen=True)
class Drawn:
    """What a link's file holds instead of A and B.

    seed, link, initialiser: what they are drawn from; coefficients: module -> (a, b), `bases` numbers each.
    """

    seed: int
    link: int
    initialiser: str
    coefficients: Mapping[str, tuple[Tensor, Tensor]]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Of one module, by the ending of their names in adapter_model.safetensors."""
        a, b = self.coefficients[name]
        return {"nola_A": a, "nola_B": b}


def described(drawn: Drawn, pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """What adapter_config.json says more than for matrices; PEFT knows no such type, and refuses it."""
    bases = max(len(a) for a, _ in drawn.coefficients.values())
    shapes = {name: [len(pair.b), pair.a.shape[1]] for name, pair in pairs.items()}
    streams = {"seed": drawn.seed, "link": drawn.link, "initialiser": drawn.initialiser}
    return {"peft_type": "NOLA", "nola": {**streams, "bases": bases, "shapes": shapes}}


def filled_in(tensors: dict[str, Tensor], streams: Streams, ranks: Mapping[str, int], path: Path) -> Drawn:
    """Replace the coefficients in `tensors` by the A and B that they stand for.

    Args:
        tensors: of adapter_model.safetensors, by names without prefix.
        ranks: module -> r.
        path: of that file, for messages.

    Raises:
        UserError: a module without shape or coefficients, coefficients of another number or type, or sizes that no
            training could have written.
    """
    _check_sizes(streams, ranks, path)
    if matrices := sorted(name for name in tensors if name.endswith((".lora_A.weight", ".lora_B.weight"))):
        raise UserError(f"{path}: {matrices[0]}: stands beside coefficients; restore it with `dvc checkout`")
    coefficients = {name: _take(tensors, name, streams.bases, path) for name in ranks}
    for name, rank in ranks.items():
        for letter, matrix in zip("AB", _matrices(streams, name, rank, *coefficients[name]), strict=True):
            tensors[f"{name}.lora_{letter}.weight"] = matrix
    return Drawn(streams.seed, streams.link, streams.initialiser, coefficients)


def _check_sizes(streams: Streams, ranks: Mapping[str, int], path: Path) -> None:
    """Before anything of these sizes is made."""
    config = path.with_name("adapter_config.json")
    if strange := sorted(streams.shapes.keys() ^ ranks.keys()):
        raise UserError(f"{config}: nola.shapes: {strange[0]}: is not in target_modules, or has no shape")
    if wrong := [name for name, rank in ranks.items() if rank > min(streams.shapes[name])]:
        raise UserError(f"{config}: {wrong[0]}: rank {ranks[wrong[0]]} of a matrix of {streams.shapes[wrong[0]]}")
    if reason := excess(_sizes(streams, ranks), streams.bases):
        raise UserError(f"{config}: nola: {reason}; restore it with `dvc checkout`")


def _sizes(streams: Streams, ranks: Mapping[str, int]) -> Iterator[tuple[int, int, int]]:
    return ((rank, *streams.shapes[name]) for name, rank in ranks.items())  # type: ignore[misc]


def _take(tensors: dict[str, Tensor], name: str, bases: int, path: Path) -> tuple[Tensor, Tensor]:
    """The coefficients of one module, taken out of `tensors`."""
    a, b = (tensors.pop(f"{name}.nola_{letter}", None) for letter in "AB")
    if a is None or b is None:
        raise UserError(f"{path}: {name}: adapter_config.json names it, but its coefficients are missing")
    if not a.shape == b.shape == (bases,) or a.dtype != b.dtype or a.dtype not in (torch.float32, torch.float64):
        told = f"{list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype} are no coefficients of {bases} bases"
        raise UserError(f"{path}: {name}: {told}; restore both files with `dvc checkout`")
    return a, b


def _matrices(streams: Streams, name: str, rank: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A (r x in) and B (out x r) of one module, bit for bit those of the layer that was trained."""
    rows, columns = streams.shapes[name]
    a_0, b_0 = DRAWN[streams.initialiser](streams.seed, streams.link, name, rank, (rows, columns))
    return expand(a_0.to(a.dtype), b_0.to(b.dtype), a, b, of_layer(streams.seed, streams.link, name))
