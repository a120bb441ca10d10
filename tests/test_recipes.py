"""Every recipe of conf/method: it trains, chains, resumes bit for bit and is handed on as a file that PEFT loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftModel

from cola_core.adapter_files import read_adapter
from cola_core.chain import write_link
from cola_core.errors import UserError
from cola_core.export import flat_adapter, write_flat
from cola_core.lineage import Link, read_chain
from cola_core.links import run_link
from tests.lab import FP32, logits_of, model_of, root_of, rows_of
from tests.points import job_at, resumes

METHODS = {path.stem: path for path in (Path(__file__).parent.parent / "conf/method").glob("*.yaml")}
MERGED_ONLY = {"loftq"}  # their links replace the frozen weights
# Rounds and bounds that conf/method sets for links of tens of steps on models of hundreds of modules.
ADALORA = {"kind": "adalora", "rank": 1, "first": 1, "last": 2, "every": 2, "smoothing": 0.8, "orthogonal": 0.1}
SHORT: dict[str, dict[str, Any]] = {
    "adalora": {"update": ADALORA},
    "beam_lora": {"pruning": {"kind": "beam_lora", "every": 3, "share": 0.6, "schedule": "rising"}},
    "lora_plus": {"learning_rate": 1e-3},  # B's is 16 times that
    "lora_rite": {"learning_rate": 5e-3},
    "ffa_lora_federated": {"checkpoint_every": 2},
    "alora": {"pruning": {"kind": "alora", "first": 2, "every": 2, "rounds": 2, "ranks": 3}},
}


def job_of(recipe: str, chain: list[Link], **more: Any) -> Any:
    """The next link of a recipe, eight steps on the tiny Llama."""
    told = yaml.safe_load(METHODS[recipe].read_text())
    link = {"steps": 8, "validate_every": 4, "checkpoint_every": 2, "learning_rate": 2e-2, **told.get("link", {})}
    allocation = {key: value for key, value in told.get("allocate", {}).items() if key == "allocator"}
    rate = told.get("schedule", {}).get("learning_rate", "restart")
    changes = {**link, **SHORT.get(recipe, {}), **more}
    return job_at("llama", chain, changes, told.get("profile"), allocation, FP32, rate)


def grown(recipe: str, chain: list[Link], folder: Path) -> list[Link]:
    adapter, record, progress = run_link(job_of(recipe, chain))
    losses = [event["loss"] for event in progress.losses]
    assert min(losses[-3:]) < losses[0], "it learned nothing"
    path = folder / f"links/{len(chain)}/adapter"
    write_link(path, adapter, record, {})
    for name, pair in read_adapter(path).pairs.items():
        assert pair.scale == pytest.approx(adapter.pairs[name].scale), "PEFT's alpha and rank give the scale back"
    return read_chain(path)


@pytest.mark.parametrize("recipe", sorted(METHODS))
def test_a_recipe_trains_chains_and_is_loaded_by_peft(recipe: str, tmp_path: Path) -> None:
    root = root_of("llama", tmp_path)
    chain = grown(recipe, grown(recipe, root, tmp_path), tmp_path)
    if recipe in MERGED_ONLY:
        with pytest.raises(UserError, match=r"merge\.flat_adapter: .*merged checkpoint"):
            flat_adapter(chain)
        return
    write_flat(tmp_path / "flat", flat_adapter(chain))
    loaded = PeftModel.from_pretrained(model_of("llama", root, FP32), str(tmp_path / "flat")).eval()
    rows = rows_of("llama", 3, seed=3)
    plain, merged = (logits_of(model_of("llama", links, FP32), "llama", rows) for links in (root, chain))
    for ours, theirs, base in zip(merged, logits_of(loaded, "llama", rows), plain, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(ours.abs().max()))
        assert float((ours - base).abs().max()) > 1e-2


@pytest.mark.parametrize("recipe", sorted(METHODS))
def test_law_7_a_recipe_resumes_bit_for_bit(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second link of a chain, killed and stopped, where it has rounds of pruning between them too."""
    chain = grown(recipe, root_of("llama", tmp_path), tmp_path)
    resumes(job_of(recipe, chain), tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", ["res_is", "res_ms"])
def test_law_7_shortcuts_resume_bit_for_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = {"kind": kind, **({} if kind == "res_is" else {"previous": 1})}
    resumes(job_of("lora", root_of("llama", tmp_path), parametrisation=form), tmp_path, monkeypatch)
