"""Adapters on disk, in PEFT's file format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from cola_core.adapters import Pair
from cola_core.config.base import Strict, parse
from cola_core.errors import UserError
from cola_core.files import read_json, write_json
from cola_core.nola_files import Drawn, Streams, described, filled_in
from cola_core.quantisation import Quantised
from cola_core.quantised_files import read_quantised, write_quantised
from cola_core.tensors import load_tensors, save_tensors

__all__ = ["Adapter", "read_adapter", "write_adapter"]

PREFIX = "base_model.model."
TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "SEQ_CLS"}


class Stored(Strict, extra="ignore"):
    """What is read back of adapter_config.json; the rest is for PEFT."""

    peft_type: Literal["LORA", "NOLA"]
    nola: Streams | None = None
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"]
    base_model_name_or_path: str
    r: int = Field(ge=1)
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]]
    lora_alpha: float = Field(gt=0)
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]]
    use_rslora: bool
    fan_in_fan_out: bool
    target_modules: list[str]
    modules_to_save: list[str] | None

    def rank(self, name: str) -> int:
        """Of one module."""
        return self.rank_pattern.get(re.escape(name), self.r)

    def alpha(self, name: str) -> float:
        """Of one module."""
        return self.alpha_pattern.get(re.escape(name), self.lora_alpha)


@dataclass(frozen=True)
class Adapter:
    """One adapter file.

    pairs: module -> (A, B, scale); alpha: PEFT's lora_alpha of a module from its rank; rslora: scale is alpha / sqrt(r)
    instead of alpha / r; head: an encoder's head by parameter name; transposed: weights are kept in x out (Conv1D);
    drawn: what the file holds instead of A and B, where they can be drawn again;
    bases: module -> the quantised weight that takes the place of its own before the pair is added.
    """

    pairs: dict[str, Pair]
    base: str
    kind: str
    alpha: dict[str, float]
    rslora: bool
    transposed: bool = False
    head: dict[str, Tensor] = field(default_factory=dict)
    drawn: Drawn | None = None
    bases: dict[str, Quantised] = field(default_factory=dict)


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write its files into an existing folder; module names are complete and escaped where PEFT reads patterns."""
    write_json(folder / "adapter_config.json", _config(adapter))
    tensors: dict[str, Tensor] = {}
    for name, pair in adapter.pairs.items():
        matrices = {"lora_A.weight": pair.a, "lora_B.weight": pair.b}
        parts = adapter.drawn.tensors(name) if adapter.drawn else matrices
        tensors |= {f"{PREFIX}{name}.{part}": tensor for part, tensor in parts.items()}
        if pair.bias is not None:
            tensors[f"{PREFIX}{name}.bias"] = pair.bias
    tensors |= {f"{PREFIX}{name}": value for name, value in adapter.head.items()}
    save_tensors(folder / "adapter_model.safetensors", tensors)
    write_quantised(folder, adapter.bases)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter that `write_adapter` wrote.

    Raises:
        UserError: a file is missing, truncated or does not fit the other.
    """
    config = _read_config(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    short = {name.removeprefix(PREFIX): tensor for name, tensor in load_tensors(path).items()}
    ranks = {name: config.rank(name) for name in config.target_modules}
    drawn = filled_in(short, config.nola, ranks, path) if config.nola else None
    pairs = {name: _pair(short, name, config, path) for name in config.target_modules}
    if strange := sorted(name for name in short if name.split(".")[0] not in (config.modules_to_save or ())):
        raise UserError(f"{path}: {strange[0]}: adapter_config.json does not name it; restore both with `dvc checkout`")
    alpha = {name: config.alpha(name) for name in pairs}
    kind = next(kind for kind, task in TASK_TYPES.items() if task == config.task_type)
    return Adapter(
        pairs, config.base_model_name_or_path, kind, alpha, config.use_rslora, config.fan_in_fan_out, short, drawn,
        read_quantised(folder),
    )  # fmt: skip


def _read_config(path: Path) -> Stored:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, got {type(content).__name__}; restore it with `dvc checkout`")
    config = parse(Stored, content, "", file=str(path))
    if (config.peft_type == "NOLA") != (config.nola is not None):
        raise UserError(f"{path}: peft_type {config.peft_type!r} and nola do not fit; restore it with `dvc checkout`")
    return config


def _pair(tensors: dict[str, Tensor], name: str, config: Stored, path: Path) -> Pair:
    """Take the tensors of one module out of `tensors`."""
    a, b = (tensors.pop(f"{name}.lora_{letter}.weight", None) for letter in "AB")
    if a is None or b is None:
        raise UserError(f"{path}: {name}: adapter_config.json names it, but its tensors are missing")
    rank, bias = config.rank(name), tensors.pop(f"{name}.bias", None)
    fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] == rank and a.is_floating_point()
    if not fits or b.dtype != a.dtype or (bias is not None and bias.shape != b.shape[:1]):
        shapes = f"A {list(a.shape)} {a.dtype}, B {list(b.shape)} {b.dtype}"
        raise UserError(f"{path}: {name}: {shapes} are no pair of rank {rank}; restore both files with `dvc checkout`")
    return Pair(a, b, config.alpha(name) / (math.sqrt(rank) if config.use_rslora else rank), bias)


def _config(adapter: Adapter) -> dict[str, Any]:
    """PEFT's LoraConfig as JSON; the commonest rank is `r`, the others stand in `rank_pattern`."""
    ranks = {name: pair.rank for name, pair in adapter.pairs.items()}
    rank = _commonest(ranks)
    alpha = _commonest(adapter.alpha)
    trained_bias = any(pair.bias is not None for pair in adapter.pairs.values())
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES[adapter.kind],
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {re.escape(name): a for name, a in adapter.alpha.items() if a != alpha},
        "use_rslora": adapter.rslora,
        "lora_dropout": 0.0,
        "bias": "lora_only" if trained_bias else "none",
        "fan_in_fan_out": adapter.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(adapter.pairs),
        "modules_to_save": sorted({name.split(".")[0] for name in adapter.head}) or None,
        **(described(adapter.drawn, adapter.pairs) if adapter.drawn else {}),
    }


def _commonest(values: Mapping[str, Any]) -> Any:
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], value))
