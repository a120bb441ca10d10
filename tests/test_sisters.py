"""CoRA with models of the user's: fetched, compared with the base, and what they share becomes a link's B."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cola_core.errors import UserError
from cola_core.lineage import read_chain
from cola_core.models import as_matrix, load_base
from tasks.context import open_context
from tasks.places import main_checkout
from tests.lab import FP32, base_of
from tests.tiny import ROOT, project, small


def sister(folder: Path, seed: int) -> Path:
    """The tiny Llama with a change of rank 3 in every linear map, as a model folder."""
    folder.mkdir()
    for file in base_of("llama").iterdir():
        if file.name not in ("cola.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    weights, generator = load_file(base_of("llama") / "model.safetensors"), torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        if weight.dim() == 2 and "layers" in name:
            out, inner = weight.shape
            change = torch.randn(out, 3, generator=generator) @ torch.randn(3, inner, generator=generator)
            weights[name] = weight + 0.02 * change
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A project of one link that starts from two sisters' common subspace."""
    folder = project(tmp_path / "project")
    raw = small(yaml.safe_load((ROOT / "params.yaml").read_text()))
    raw["fetch"]["sisters"] = {
        name: {"asset": f"path:{sister(tmp_path / name, seed)}", "sha256": None} for seed, name in enumerate("ab")
    }
    raw["profile"] |= {"probe": "none", "directions": ["sisters"]}
    raw["allocate"] |= {"allocator": "uniform"}
    raw["link"] |= {"initialiser": {"kind": "cora", "sisters": "given"}, "parametrisation": "frozen_b", "scale": "lora"}
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLA_CACHE", str(tmp_path / "cache"))
    main_checkout.cache_clear()
    yield folder
    main_checkout.cache_clear()


def run(stage: str, key: str | None = None) -> None:
    import_module(f"tasks.{stage}").main(open_context(stage, key))


def test_b_is_frozen_at_what_the_sisters_share(here: Path) -> None:
    for stage, key in (
        ("fetch", None),
        ("prepare", None),
        ("head", None),
        ("profile", "1"),
        ("allocate", "1"),
        ("link", "1"),
    ):
        run(stage, key)

    (_, link) = read_chain(here / "artifacts/links/1/adapter")
    folders = (here / "artifacts/fetch" / name for name in ("model", "sisters/a", "sisters/b"))
    base, *sisters = (load_base(folder, FP32) for folder in folders)
    for name, pair in link.adapter().pairs.items():
        weights = [as_matrix(model.get_submodule(name)).double() for model in (base, *sisters)]
        left, values, _ = torch.linalg.svd(torch.cat([w - weights[0] for w in weights[1:]], dim=1))
        assert float(values[5]) > 100 * float(values[6])
        span = left[:, : pair.rank]
        torch.testing.assert_close(pair.b.double() @ pair.b.double().T, span @ span.T, atol=1e-4, rtol=0)
        assert pair.a.any()


def test_a_sister_of_another_base_is_one_line(here: Path) -> None:
    raw = yaml.safe_load((here / "params.yaml").read_text())
    raw["fetch"]["sisters"] = {"strange": {"asset": "tiny:opt", "sha256": None}}
    (here / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"fetch\.sisters\.strange: its linear maps are not those of fetch\.model"):
        run("fetch")


def test_sisters_that_are_not_named_are_asked_for(here: Path) -> None:
    raw = yaml.safe_load((here / "params.yaml").read_text())
    del raw["fetch"]["sisters"]
    (here / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"profile\.directions 'sisters' with no fetch\.sisters: name at least one"):
        run("fetch")


def test_a_basis_that_the_sisters_could_not_fill_is_refused(here: Path) -> None:
    raw = yaml.safe_load((here / "params.yaml").read_text())
    raw["profile"]["sketch"] = raw["allocate"]["rank"] - 1
    (here / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"directions is completed by random ones; raise profile\.sketch"):
        run("fetch")
