"""Good files of every kind that the pipeline reads, and how to break them."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import Parameter

from cola_core.adapter_files import Adapter, write_adapter
from cola_core.adapters import Pair
from cola_core.checkpoints import Progress, random_state, save_checkpoint
from cola_core.config.base import load_yaml
from cola_core.sealed import write_sealed
from tests.chaos.mutations import header_of, mutate, respell, with_header

__all__ = ["adapter", "broken_conf", "broken_json", "broken_params", "broken_tensors", "good", "training"]

ROOT = Path(__file__).parents[2]


def params_seeds() -> list[bytes]:
    text = (ROOT / "params.yaml").read_bytes()
    return [text, json.dumps(load_yaml(text.decode()), indent=1).encode()]


def broken_params(draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        value = respell(load_yaml(params_seeds()[0].decode()), draw)
        return json.dumps(value).encode() if draw.random() < 0.5 else yaml.dump(value, allow_unicode=False).encode()
    return mutate(draw.choice(params_seeds()), params_seeds(), draw)


@functools.cache
def method_seeds() -> list[bytes]:
    return [p.read_bytes() for g in ("method", "chain", "task") for p in sorted((ROOT / "conf" / g).glob("*.yaml"))]


def top_seeds() -> list[bytes]:
    return [(ROOT / "conf/config.yaml").read_bytes()]


def broken_conf(seeds: Callable[[], list[bytes]]) -> Callable[[random.Random], bytes]:
    def broken(draw: random.Random) -> bytes:
        seed = draw.choice(seeds())
        if draw.random() < 0.5:
            return b"# @package _global_\n" + json.dumps(respell(load_yaml(seed.decode()), draw)).encode()
        return mutate(seed, seeds(), draw)

    return broken


def adapter() -> Adapter:
    draw = torch.Generator().manual_seed(0)
    pairs = {
        f"layers.{i}.q_proj": Pair(torch.randn(r, 6, generator=draw), torch.randn(5, r, generator=draw), 16 / r)
        for i, r in enumerate((2, 3, 2))
    }
    head = {"score.weight": torch.randn(2, 5, generator=draw)}
    return Adapter(pairs, "hub:org/name@main", "encoder", dict.fromkeys(pairs, 16.0), False, head=head)


def training() -> tuple[dict[str, Parameter], torch.optim.Optimizer]:
    named = {"q.A": Parameter(torch.ones(2, 3)), "q.B": Parameter(torch.zeros(4, 2))}
    return named, torch.optim.AdamW(named.values())


@functools.cache
def good(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        if name == "state.safetensors":
            read_state = Path(folder) / name
            named, optimizer = training()
            for parameter in named.values():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            losses = [{"step": 1, "loss": 0.5, "learning_rate": 1e-3, "tokens": 9, "validation": None}]
            best = {name: p.detach().clone() for name, p in named.items()}
            save_checkpoint(read_state, Progress(1, 9, 1, 0.5, 0, losses, best, random_state()), named, optimizer)
        elif name == "ranks.json":
            write_sealed(Path(folder) / name, "ranks", ranks())
        else:
            write_adapter(Path(folder), adapter())
        return (Path(folder) / name).read_bytes()


def broken_tensors(name: str) -> Callable[[random.Random], bytes]:
    def broken(draw: random.Random) -> bytes:
        seed = good(name)
        if draw.random() < 0.6:
            header, rest = header_of(seed)
            return with_header(respell(header, draw), rest)
        return mutate(seed, [seed], draw)

    return broken


def broken_json(value: Callable[[], Any]) -> Callable[[random.Random], bytes]:
    def broken(draw: random.Random) -> bytes:
        text = json.dumps(value(), indent=1).encode()
        return json.dumps(respell(value(), draw)).encode() if draw.random() < 0.6 else mutate(text, [text], draw)

    return broken


def ranks() -> dict[str, Any]:
    modules = [f"layers.{i}.q_proj" for i in range(4)]
    return {"ranks": dict.fromkeys(modules, 4), "importance": dict.fromkeys(modules, 0.25), "budget": 80, "spent": 80}
