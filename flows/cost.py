"""What a stage costs by arithmetic alone, from the base's shapes and the prepared rows: no model is loaded.

Per token, with P weights in the adapted model's linear maps and p in the adapters: forward 2P, activation gradient 2P,
weight gradient 2P (of the probe; frozen weights get none in training), and the adapters' own 6p.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cola_core.config.params import Params
from cola_core.config.recipe import AllocateConfig, LinkConfig, ProfileConfig
from cola_core.files import read_json
from cola_core.targets import select_targets

__all__ = ["Cost", "Sizes", "cost", "sizes"]

BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
ADAM = 16  # bytes per trained parameter: fp32 value, gradient and two moments


@dataclass(frozen=True)
class Sizes:
    """What the fetched base and the prepared rows tell.

    modules: adaptable module -> (out, in); weights: all of the base's parameters; tokens, rows: of each prepared split,
    empty before `prepare`; candidates: tokens of all candidates together, scored on top of a prompt.
    """

    modules: dict[str, tuple[int, int]]
    weights: int
    tokens: dict[str, int]
    rows: dict[str, int]
    candidates: int

    @property
    def linear(self) -> int:
        """P."""
        return sum(out * inner for out, inner in self.modules.values())


@dataclass(frozen=True)
class Cost:
    """trainable: parameters; flops: of the whole stage, None before `prepare`; memory: bytes without activations."""

    trainable: int
    flops: float | None
    memory: int


def sizes(root: Path) -> Sizes | None:
    """Read the sizes below `root`; None before `fetch`."""
    model, prepared = root / "artifacts/fetch/model", root / "artifacts/prepare"
    if not (model / "cola.json").is_file():
        return None
    shapes = {name: (shape[0], shape[1]) for name, shape in read_json(model / "cola.json")["modules"].items()}
    splits = ("train", "validation", "test", "probe")
    counted = {name: _count(prepared / f"{name}.arrow") for name in splits if (prepared / f"{name}.arrow").is_file()}
    candidates = read_json(prepared / "task.json")["candidates"] if counted else []
    return Sizes(
        shapes,
        _weights(model),
        {name: tokens for name, (_, tokens) in counted.items()},
        {name: rows for name, (rows, _) in counted.items()},
        sum(map(len, candidates)),
    )


def cost(task: str, key: str | None, params: Params, size: Sizes) -> Cost | None:
    """The cost of one stage; None for a stage that runs no model."""
    return COSTS[task](key, params, size) if task in COSTS else None


def _profile(key: str | None, params: Params, size: Sizes) -> Cost:
    """One forward and backward with weight gradients; freed module by module unless they are accumulated."""
    config = ProfileConfig(**{**params.profile, **params.chain[str(key)].profile})
    if config.probe == "none":
        return Cost(0, 0.0, 0)
    targets = select_targets(size.modules, params.targets)
    held = (sum if config.probe == "accumulate" else max)(math.prod(size.modules[name]) for name in targets)
    return Cost(0, _flops(size, "probe", 6 * size.linear), _base(params, size) + 4 * held)


def _link(key: str | None, params: Params, size: Sizes) -> Cost:
    """Training steps at 4P + 6p per token, and a forward over the validation rows at every validation."""
    config = LinkConfig(**{**params.link, **params.chain[str(key)].link})
    adapters = _adapters(key, params, size)
    memory = _base(params, size) + ADAM * adapters
    if not size.rows.get("train"):
        return Cost(adapters, None, memory)
    tokens = config.steps * config.batch * size.tokens["train"] / size.rows["train"]
    validations = math.ceil(config.steps / config.validate_every)
    checked = _flops(size, "validation", 2 * (size.linear + adapters) * validations) or 0.0
    return Cost(adapters, tokens * (4 * size.linear + 6 * adapters) + checked, memory)


def _merge(_: str | None, params: Params, size: Sizes) -> Cost:
    """s B A of every module and link; the masters are fp32 and held once."""
    ranks = sum(_rank(key, params) for key in params.chain)
    return Cost(0, 2.0 * ranks * size.linear, 4 * size.weights)


def _evaluate(_: str | None, params: Params, size: Sizes) -> Cost:
    """Every prefix if asked (the whole chain is the last), else the whole chain alone."""
    models = len(params.chain) if params.evaluate.prefixes else 1
    return Cost(0, _scoring(params, size, models), _base(params, size))


def _evaluate_base(_: str | None, params: Params, size: Sizes) -> Cost:
    return Cost(0, _scoring(params, size, 1), _base(params, size))


Count = Callable[[str | None, Params, Sizes], Cost]
COSTS: dict[str, Count] = {
    "profile": _profile,
    "link": _link,
    "merge": _merge,
    "evaluate": _evaluate,
    "evaluate_base": _evaluate_base,
}


def _scoring(params: Params, size: Sizes, models: int) -> float | None:
    """A forward over the scored test rows: the prompt once, then every candidate."""
    rows = size.rows.get("test")
    if not rows:
        return None
    scored = rows if params.evaluate.rows == "all" else min(rows, params.evaluate.rows)
    per_row = size.tokens["test"] / rows + size.candidates
    return models * scored * per_row * 2.0 * size.linear


def _flops(size: Sizes, split: str, per_token: float) -> float | None:
    return size.tokens[split] * per_token if split in size.tokens else None


def _rank(key: str, params: Params) -> int:
    return AllocateConfig(**{**params.allocate, **params.chain[key].allocate}).rank


def _adapters(key: str | None, params: Params, size: Sizes) -> int:
    """p at the reference rank: what uniform ranks cost, and what an allocator has to spend."""
    targets = select_targets(size.modules, params.targets)
    return _rank(str(key), params) * sum(sum(size.modules[name]) for name in targets)


def _base(params: Params, size: Sizes) -> int:
    return size.weights * BYTES[params.machine.dtype]


def _weights(model: Path) -> int:
    """Parameters in a model's safetensors files, from their headers; a large model comes in several."""
    return sum(map(_parameters, model.glob("*.safetensors")))


def _parameters(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _count(path: Path) -> tuple[int, int]:
    """Rows and tokens of a prepared split."""
    import pyarrow
    import pyarrow.compute

    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
        table = reader.read_all()
    lengths = [pyarrow.compute.sum(pyarrow.compute.list_value_length(table[name])) for name in ("prompt", "answer")]
    return table.num_rows, sum(length.as_py() or 0 for length in lengths)
