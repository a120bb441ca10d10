"""Adapters on disk, in PEFT's file format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cola_core.adapters import Pair
from cola_core.errors import UserError
from cola_core.files import read_json, write_json
from cola_core.tensors import load_tensors, save_tensors

__all__ = ["Adapter", "read_adapter", "write_adapter"]

PREFIX = "base_model.model."
TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "SEQ_CLS"}


@dataclass(frozen=True)
class Adapter:
    """One adapter file.

    pairs: module -> (A, B, scale); alpha: PEFT's lora_alpha of a module from its rank; rslora: scale is alpha / sqrt(r)
    instead of alpha / r; head: an encoder's head by parameter name; transposed: weights are kept in x out (Conv1D).
    """

    pairs: dict[str, Pair]
    base: str
    kind: str
    alpha: dict[str, float]
    rslora: bool
    transposed: bool = False
    head: dict[str, Tensor] = field(default_factory=dict)


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write both files into an existing folder; module names are complete and escaped where PEFT reads patterns."""
    write_json(folder / "adapter_config.json", _config(adapter))
    tensors = {}
    for name, pair in adapter.pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.b
        if pair.bias is not None:
            tensors[f"{PREFIX}{name}.bias"] = pair.bias
    tensors |= {f"{PREFIX}{name}": value for name, value in adapter.head.items()}
    save_tensors(folder / "adapter_model.safetensors", tensors)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter that `write_adapter` wrote.

    Raises:
        UserError: a file is missing, truncated or does not fit the other.
    """
    config = read_json(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    short = {name.removeprefix(PREFIX): tensor for name, tensor in load_tensors(path).items()}
    pairs, alpha = {}, {}
    for name in config["target_modules"]:
        if f"{name}.lora_A.weight" not in short or f"{name}.lora_B.weight" not in short:
            raise UserError(f"{path}: {name}: adapter_config.json names it, but its tensors are missing")
        a, b = short.pop(f"{name}.lora_A.weight"), short.pop(f"{name}.lora_B.weight")
        alpha[name] = config["alpha_pattern"].get(re.escape(name), config["lora_alpha"])
        scale = alpha[name] / (math.sqrt(a.shape[0]) if config["use_rslora"] else a.shape[0])
        pairs[name] = Pair(a, b, scale, short.pop(f"{name}.bias", None))
    kind = next(kind for kind, task in TASK_TYPES.items() if task == config["task_type"])
    return Adapter(
        pairs,
        config["base_model_name_or_path"],
        kind,
        alpha,
        config["use_rslora"],
        config["fan_in_fan_out"],
        head=short,
    )


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
    }


def _commonest(values: Mapping[str, Any]) -> Any:
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], value))
