"""What is known of the base and the rows without loading either: shapes, parameters, lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cola_core.arithmetic.shape import Shape
from cola_core.files import read_json
from cola_core.headers import parameters
from cola_core.root import base_manifest
from cola_core.rows import Task
from cola_core.split_files import read_rows

__all__ = ["Lengths", "Sizes", "sizes"]


@dataclass(frozen=True)
class Lengths:
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
    splits: dict[str, Lengths]
    candidates: list[int]
    generated: int


def sizes(root: Path) -> Sizes | None:
    """Read the sizes below `root`; None before `fetch`.

    Raises:
        UserError: a file of the base or of the prepared rows is broken.
    """
    model, prepared = root / "artifacts/fetch/model", root / "artifacts/prepare"
    if not (model / "cola.json").is_file():
        return None
    base = base_manifest(model)
    config = read_json(model / "config.json") if (model / "config.json").is_file() else {}
    modules = {name: (shape[0], shape[1]) for name, shape in base["modules"].items()}
    files = {name: prepared / f"{name}.arrow" for name in ("train", "validation", "test", "probe")}
    task = Task.read(prepared / "task.json") if all(path.is_file() for path in files.values()) else None
    splits = {name: _lengths(path) for name, path in files.items()} if task else {}
    generated = task.max_new_tokens if task and task.kind == "generate" else 0
    shape, family = Shape.of(modules, base["kind"], config), str(config.get("model_type"))
    candidates = list(map(len, task.candidates)) if task else []
    return Sizes(shape, base["kind"], family, _weights(model), splits, candidates, generated)


def _weights(model: Path) -> int:
    """Parameters in a model's safetensors files, from their headers; a large model comes in several."""
    return sum(map(parameters, model.glob("*.safetensors")))


def _lengths(path: Path) -> Lengths:
    """Lengths alone are read of a prepared split."""
    import pyarrow.compute as pc

    table = read_rows(path).table
    prompt, answer = (pc.list_value_length(table[name]) for name in ("prompt", "answer"))
    longest = pc.max(pc.add(prompt, answer))
    return Lengths(table.num_rows, *(value.as_py() or 0 for value in (pc.sum(prompt), pc.sum(answer), longest)))
