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
from cola_core.chain import write_link
from cola_core.checkpoints import Progress, random_state, save_checkpoint
from cola_core.config.reading import load_yaml
from cola_core.export import chain_manifest
from cola_core.files import new_dir
from cola_core.lineage import Link, read_chain
from cola_core.nola_files import Streams, filled_in
from cola_core.root import seal
from cola_core.sealed import _digest, write_sealed
from cola_core.tensors import save_tensors
from tests.chaos.mutations import header_of, mutate, respell, with_header

__all__ = [
    "adapter",
    "broken_conf",
    "broken_json",
    "broken_params",
    "broken_tensors",
    "good",
    "nola_adapter",
    "training",
]

ROOT = Path(__file__).parents[2]
MODULES = [f"layers.{i}.q_proj" for i in range(4)]


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


def nola_adapter() -> Adapter:
    draw = torch.Generator().manual_seed(0)
    names = [f"layers.{i}.q_proj" for i in range(3)]
    parts = {name: (torch.randn(4, generator=draw), torch.randn(4, generator=draw)) for name in names}
    streams = {"seed": 3, "link": 1, "initialiser": "kaiming", "bases": 4, "shapes": {n: [5, 6] for n in names}}
    tensors = {f"{name}.nola_{letter}": t for name, pair in parts.items() for letter, t in zip("AB", pair, strict=True)}
    drawn = filled_in(tensors, Streams(**streams), dict.fromkeys(names, 2), Path("adapter_model.safetensors"))
    pairs = {n: Pair(tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"], 8.0) for n in names}
    return Adapter(pairs, "hub:org/name@main", "causal", dict.fromkeys(pairs, 16.0), False, drawn=drawn)


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
        elif name in ("link.json", "chain.json"):
            return links()["1/adapter/link.json" if name == "link.json" else name]
        else:
            write_adapter(Path(folder), nola_adapter() if name.startswith("nola/") else adapter())
            name = name.removeprefix("nola/")
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


def resealed(broken: Callable[[random.Random], bytes]) -> Callable[[random.Random], bytes]:
    """Half of what `broken` makes, with a right checksum: a forger's file, which is read beyond its seal."""

    def sealed(draw: random.Random) -> bytes:
        data = broken(draw)
        try:
            content = json.loads(data) if draw.random() < 0.5 else None
        except (ValueError, RecursionError):
            return data
        if not isinstance(content, dict):
            return data
        content.pop("checksum", None)
        return json.dumps({**content, "checksum": _digest(content)}).encode()

    return sealed


def ranks() -> dict[str, Any]:
    few = dict.fromkeys(MODULES, 0.25)
    return {"ranks": dict.fromkeys(MODULES, 4), "importance": few, "budget": 80, "spent": 80}


@functools.cache
def links() -> dict[str, bytes]:
    """The files of a root and of one link on it, in folders 0 and 1."""
    with tempfile.TemporaryDirectory() as folder:
        chain = _write_links(Path(folder))
        write_sealed(Path(folder) / "chain.json", "chain", chain_manifest(chain, {1: {}}))
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _write_links(folder: Path) -> list[Link]:
    base = {"asset": "hub:org/name@main", "hash": "0" * 64, "kind": "encoder", "family": "bert"}
    root, one = (folder / key / "adapter" for key in "01")
    with new_dir(root) as new:
        save_tensors(new / "head.safetensors", adapter().head)
        seal(new, {"link": 0, "parent": None, "base": base, "labels": 2})
    numbers = ("seed", "steps", "kept_step", "tokens", "probe_tokens", "trainable_parameters")
    told = {
        **dict.fromkeys(numbers, 4),
        "validation_before": None,
        "validation_loss": 0.5,
        "kept": True,
        "given_ranks": {},
    }
    parent = {"link": 0, "hash": read_chain(root)[0].hash}
    write_link(
        one,
        adapter(),
        {"link": 1, "parent": parent, "base": base, "link_section": {"steps": 4, "learning_rate": 1e-3}, **told},
        {},
    )
    return read_chain(one)
