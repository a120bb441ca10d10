"""One table of everything the pipeline reads from disk, and how it reads it."""

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

from cola_core.adapter_files import Adapter, read_adapter, write_adapter
from cola_core.chain import head_of
from cola_core.checkpoints import Progress, load_checkpoint
from cola_core.config.params import check_params
from cola_core.config.reading import load_yaml, read_yaml
from cola_core.lineage import ADAPTER, Link, check_manifest, read_chain, read_manifest
from cola_core.ranks import check_ranks
from cola_core.sealed import read_sealed
from flows.compose import compose
from tests.chaos import rows
from tests.chaos.samples import (
    MODULES,
    ROOT,
    adapter,
    broken_conf,
    broken_json,
    broken_params,
    broken_tensors,
    good,
    links,
    method_seeds,
    nola_adapter,
    params_seeds,
    resealed,
    top_seeds,
    training,
)  # fmt: skip

__all__ = ["KINDS", "Kind"]


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
    assert check_ranks(read_sealed(path, "ranks").get("ranks"), dict.fromkeys(MODULES, (8, 8)))


def read_links(path: Path) -> None:
    """link.json of a chain of one link, as whoever opens the chain reads it."""
    with _chain(path.parent) as folder:
        shutil.copyfile(path, folder / "1/adapter/link.json")
        chain = read_chain(folder / "1/adapter")
    assert [link.number for link in chain] == [0, 1] and chain[1].record["parent"]["hash"] == chain[0].hash
    assert isinstance(chain[1].kept, bool) and set(ADAPTER) <= set(chain[1].record["files"])


def read_chain_json(path: Path) -> None:
    """chain.json beside its links."""
    with _chain(path.parent) as folder:
        chain = read_chain(folder / "1/adapter")
        check_manifest(path, chain)
    assert read_manifest(path)["links"][-1]["hash"] == chain[-1].hash


def read_pair(name: str, whole: Callable[[], Adapter] = adapter) -> Callable[[Path], None]:
    """An adapter's folder, of whose two files `name` is the spoilt one."""

    def read(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            write_adapter(Path(folder), whole())
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
    named, optimizer = training()
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


@contextmanager
def _chain(place: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for name, data in links().items():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_bytes(data)
        yield Path(folder)


@contextmanager
def _conf(place: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=place) as folder:
        shutil.copytree(ROOT / "conf", Path(folder) / "conf", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "params.yaml").write_bytes(_committed())
        yield Path(folder)


@functools.cache
def _committed() -> bytes:
    return (ROOT / "params.yaml").read_bytes()


def _plain(adapter: Adapter) -> Any:
    pairs = {n: (p.a.tolist(), p.b.tolist(), p.scale, p.bias) for n, p in adapter.pairs.items() if p.bias is None}
    return pairs, adapter.base, adapter.kind, adapter.alpha, adapter.rslora, adapter.transposed, sorted(adapter.head)


def _table(ending: str) -> Kind:
    return Kind(
        f"train.{ending}", functools.partial(rows.seeds, ending), functools.partial(rows.broken, ending), rows.prepare
    )


def _tensors(name: str, read: Callable[[Path], None]) -> Kind:
    return Kind(name, lambda: [good(name)], broken_tensors(name), read)


def _sealed(name: str, read: Callable[[Path], None]) -> Kind:
    return Kind(name, lambda: [good(name)], resealed(broken_json(lambda: json.loads(good(name)))), read)


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KINDS: dict[str, Kind] = {
    "params": Kind("params.yaml", params_seeds, broken_params, read_params),
    **{ending: _table(ending) for ending in ("tab", "tsv", "csv", "jsonl", "json", "parquet")},
    "ranks": _sealed("ranks.json", read_ranks),
    "link": _sealed("link.json", read_links),
    "chain": _sealed("chain.json", read_chain_json),
    "adapter_config": Kind(
        CONFIG, lambda: [good(CONFIG)], broken_json(lambda: json.loads(good(CONFIG))), read_pair(CONFIG)
    ),
    "adapter_model": _tensors(WEIGHTS, read_pair(WEIGHTS)),
    "nola_config": Kind(
        CONFIG,
        lambda: [good(f"nola/{CONFIG}")],
        broken_json(lambda: json.loads(good(f"nola/{CONFIG}"))),
        read_pair(CONFIG, nola_adapter),
    ),
    "nola_model": Kind(
        WEIGHTS, lambda: [good(f"nola/{WEIGHTS}")], broken_tensors(f"nola/{WEIGHTS}"), read_pair(WEIGHTS, nola_adapter)
    ),
    "head": Kind("head.safetensors", lambda: [good(WEIGHTS)], broken_tensors(WEIGHTS), read_head),
    "checkpoint": _tensors("state.safetensors", read_checkpoint),
    "conf_method": Kind("spoilt.yaml", method_seeds, broken_conf(method_seeds), read_method),
    "conf_top": Kind("config.yaml", top_seeds, broken_conf(top_seeds), read_top),
}
