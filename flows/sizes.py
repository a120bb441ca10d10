"""What is known of the base and the rows without loading either: shapes, parameters, lengths."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from cola_core.arithmetic.shape import Shape
from cola_core.files import read_json

__all__ = ["Sizes", "Split", "sizes"]


@dataclass(frozen=True)
class Split:
    """Rows of a prepared split, tokens of their prompts and of their answers, and the longest row's of both."""

    rows: int
    prompt: int
    answer: int
    longest: int


@dataclass(frozen=True)
class Sizes:
    """What the fetched base and the prepared rows tell.

    family: config.json's model type; weights: all of the base's parameters; splits: empty before `prepare`;
    candidates: tokens of each candidate; generated: tokens of a generated answer at most, 0 where none is.
    """

    shape: Shape
    kind: str
    family: str
    weights: int
    splits: dict[str, Split]
    candidates: list[int]
    generated: int


def sizes(root: Path) -> Sizes | None:
    """Read the sizes below `root`; None before `fetch`."""
    model, prepared = root / "artifacts/fetch/model", root / "artifacts/prepare"
    if not (model / "cola.json").is_file():
        return None
    base = read_json(model / "cola.json")
    config = read_json(model / "config.json") if (model / "config.json").is_file() else {}
    modules = {name: (shape[0], shape[1]) for name, shape in base["modules"].items()}
    files = {name: prepared / f"{name}.arrow" for name in ("train", "validation", "test", "probe")}
    splits = {name: _split(path) for name, path in files.items() if path.is_file()}
    task = read_json(prepared / "task.json") if splits else {}
    generated = task["max_new_tokens"] if task.get("kind") == "generate" else 0
    shape, family = Shape.of(modules, base["kind"], config), str(config.get("model_type"))
    candidates = list(map(len, task.get("candidates", [])))
    return Sizes(shape, base["kind"], family, _weights(model), splits, candidates, generated)


def _weights(model: Path) -> int:
    """Parameters in a model's safetensors files, from their headers; a large model comes in several."""
    return sum(map(_parameters, model.glob("*.safetensors")))


def _parameters(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _split(path: Path) -> Split:
    """Lengths alone are read of a prepared split."""
    import pyarrow
    import pyarrow.compute as pc

    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
        table = reader.read_all()
    prompt, answer = (pc.list_value_length(table[name]) for name in ("prompt", "answer"))
    longest = pc.max(pc.add(prompt, answer))
    return Split(table.num_rows, *(value.as_py() or 0 for value in (pc.sum(prompt), pc.sum(answer), longest)))
