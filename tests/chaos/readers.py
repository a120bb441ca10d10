"""One table of everything the pipeline reads from disk: good seeds, how to break them, and how to read one."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from dvc.utils.serialize import parse_yaml
from safetensors import deserialize
from torch.nn import Parameter

from cola_core.adapter_files import Adapter, read_adapter, write_adapter
from cola_core.adapters import Pair
from cola_core.chain import Link, head_of
from cola_core.checkpoints import Progress, load_checkpoint, random_state, save_checkpoint
from cola_core.config.base import load_yaml, read_yaml
from cola_core.config.params import check_params
from cola_core.sealed import read_sealed, write_sealed
from flows.compose import compose
from tests.chaos import rows
from tests.chaos.mutations import header_of, mutate, respell, with_header

__all__ = ["KINDS", "Kind"]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Kind:
    """name: of the file; seeds: good files; broken: a spoilt one; read: as the pipeline does, asserting the answer."""

    name: str
    seeds: Callable[[], list[bytes]]
    broken: Callable[[random.Random], bytes]
    read: Callable[[Path], None]


def read_params(path: Path) -> None:
    """params.yaml: what is accepted is what DVC reads, and survives being written and read again."""
    raw = read_yaml(path)
    params = check_params(raw)
    assert parse_yaml(path.read_text(encoding="utf-8"), path) == raw
    again = yaml.safe_dump(params.model_dump(by_alias=True), allow_unicode=True)
    assert check_params(load_yaml(again)) == params


def read_method(path: Path) -> None:
    """A file of conf/method, composed."""
    with _conf(path.parent) as root:
        shutil.copyfile(path, root / "conf/method/spoilt.yaml")
        text = compose(root, {"method": "spoilt"})
    assert check_params(load_yaml(text))


def read_top(path: Path) -> None:
    """conf/config.yaml, composed."""
    with _conf(path.parent) as root:
        shutil.copyfile(path, root / "conf/config.yaml")
        text = compose(root, {"method": "gora"})
    assert check_params(load_yaml(text))


def read_ranks(path: Path) -> None:
    """ranks.json, as tasks/link.py reads it."""
    assert read_sealed(path, "ranks")["ranks"]


def read_pair(name: str) -> Callable[[Path], None]:
    """An adapter's folder, of whose two files `name` is the spoilt one."""

    def read(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            write_adapter(Path(folder), _adapter())
            shutil.copyfile(path, Path(folder) / name)
            found = read_adapter(Path(folder))
            for pair in found.pairs.values():
                assert (pair.scale * pair.b.double() @ pair.a.double()).shape[1] == pair.a.shape[1]
            write_adapter(Path(folder), found)
            assert _plain(read_adapter(Path(folder))) == _plain(found)

    return read


def read_head(path: Path) -> None:
    """An encoder's first head."""
    head = head_of([Link(path.parent, {"link": 0}, "")])
    assert {name for name, _ in deserialize(path.read_bytes())} == set(head)


def read_checkpoint(path: Path) -> None:
    """A link's resume state: whole, or a fresh start that touched nothing."""
    named, optimizer = _training()
    before = {name: p.detach().clone() for name, p in named.items()}
    generator = torch.get_rng_state()
    progress = load_checkpoint(path, named, optimizer)
    if progress == Progress():
        assert all(torch.equal(p, before[name]) for name, p in named.items()) and not optimizer.state
        assert torch.equal(generator, torch.get_rng_state())
        return
    assert isinstance(progress.step, int) and isinstance(progress.losses, list)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _params_seeds() -> list[bytes]:
    text = (ROOT / "params.yaml").read_bytes()
    return [text, json.dumps(load_yaml(text.decode()), indent=1).encode()]


def _broken_params(draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        value = respell(load_yaml(_params_seeds()[0].decode()), draw)
        return json.dumps(value).encode() if draw.random() < 0.5 else yaml.dump(value, allow_unicode=False).encode()
    return mutate(draw.choice(_params_seeds()), _params_seeds(), draw)


@functools.cache
def _method_seeds() -> list[bytes]:
    return [p.read_bytes() for g in ("method", "chain", "task") for p in sorted((ROOT / "conf" / g).glob("*.yaml"))]


def _top_seeds() -> list[bytes]:
    return [(ROOT / "conf/config.yaml").read_bytes()]


def _broken_conf(seeds: Callable[[], list[bytes]]) -> Callable[[random.Random], bytes]:
    def broken(draw: random.Random) -> bytes:
        seed = draw.choice(seeds())
        if draw.random() < 0.5:
            return b"# @package _global_\n" + json.dumps(respell(load_yaml(seed.decode()), draw)).encode()
        return mutate(seed, seeds(), draw)

    return broken


@contextmanager
def _conf(place: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=place) as folder:
        shutil.copytree(ROOT / "conf", Path(folder) / "conf", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "params.yaml").write_bytes(_committed())
        yield Path(folder)


@functools.cache
def _committed() -> bytes:
    return (ROOT / "params.yaml").read_bytes()


def _adapter() -> Adapter:
    draw = torch.Generator().manual_seed(0)
    pairs = {
        f"layers.{i}.q_proj": Pair(torch.randn(r, 6, generator=draw), torch.randn(5, r, generator=draw), 16 / r)
        for i, r in enumerate((2, 3, 2))
    }
    head = {"score.weight": torch.randn(2, 5, generator=draw)}
    return Adapter(pairs, "hub:org/name@main", "encoder", dict.fromkeys(pairs, 16.0), False, head=head)


def _plain(adapter: Adapter) -> Any:
    pairs = {n: (p.a.tolist(), p.b.tolist(), p.scale, p.bias) for n, p in adapter.pairs.items() if p.bias is None}
    return pairs, adapter.base, adapter.kind, adapter.alpha, adapter.rslora, adapter.transposed, sorted(adapter.head)


def _training() -> tuple[dict[str, Parameter], torch.optim.Optimizer]:
    named = {"q.A": Parameter(torch.ones(2, 3)), "q.B": Parameter(torch.zeros(4, 2))}
    return named, torch.optim.AdamW(named.values())


@functools.cache
def _files(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        if name == "state.safetensors":
            read_state = Path(folder) / name
            named, optimizer = _training()
            for parameter in named.values():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            losses = [{"step": 1, "loss": 0.5, "learning_rate": 1e-3, "tokens": 9, "validation": None}]
            best = {name: p.detach().clone() for name, p in named.items()}
            save_checkpoint(read_state, Progress(1, 9, 1, 0.5, 0, losses, best, random_state()), named, optimizer)
        elif name == "ranks.json":
            write_sealed(Path(folder) / name, "ranks", _ranks())
        else:
            write_adapter(Path(folder), _adapter())
        return (Path(folder) / name).read_bytes()


def _broken_tensors(name: str) -> Callable[[random.Random], bytes]:
    def broken(draw: random.Random) -> bytes:
        seed = _files(name)
        if draw.random() < 0.6:
            header, rest = header_of(seed)
            return with_header(respell(header, draw), rest)
        return mutate(seed, [seed], draw)

    return broken


def _broken_json(value: Callable[[], Any]) -> Callable[[random.Random], bytes]:
    def broken(draw: random.Random) -> bytes:
        text = json.dumps(value(), indent=1).encode()
        return json.dumps(respell(value(), draw)).encode() if draw.random() < 0.6 else mutate(text, [text], draw)

    return broken


def _ranks() -> dict[str, Any]:
    modules = [f"layers.{i}.q_proj" for i in range(4)]
    return {"ranks": dict.fromkeys(modules, 4), "importance": dict.fromkeys(modules, 0.25), "budget": 80, "spent": 80}


def _table(ending: str) -> Kind:
    return Kind(
        f"train.{ending}", functools.partial(rows.seeds, ending), functools.partial(rows.broken, ending), rows.prepare
    )


def _tensors(name: str, read: Callable[[Path], None]) -> Kind:
    return Kind(name, lambda: [_files(name)], _broken_tensors(name), read)


CONFIG, RANKS = "adapter_config.json", "ranks.json"
WEIGHTS = "adapter_model.safetensors"
KINDS: dict[str, Kind] = {
    "params": Kind("params.yaml", _params_seeds, _broken_params, read_params),
    **{ending: _table(ending) for ending in ("tab", "tsv", "csv", "jsonl", "json", "parquet")},
    "ranks": Kind(RANKS, lambda: [_files(RANKS)], _broken_json(lambda: json.loads(_files(RANKS))), read_ranks),
    "adapter_config": Kind(
        CONFIG, lambda: [_files(CONFIG)], _broken_json(lambda: json.loads(_files(CONFIG))), read_pair(CONFIG)
    ),
    "adapter_model": _tensors(WEIGHTS, read_pair(WEIGHTS)),
    "head": Kind("head.safetensors", lambda: [_files(WEIGHTS)], _broken_tensors(WEIGHTS), read_head),
    "checkpoint": _tensors("state.safetensors", read_checkpoint),
    "conf_method": Kind("spoilt.yaml", _method_seeds, _broken_conf(_method_seeds), read_method),
    "conf_top": Kind("config.yaml", _top_seeds, _broken_conf(_top_seeds), read_top),
}
