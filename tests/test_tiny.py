"""The random models that other tests stand on: loadable, the same for the same seed, shaped as their families are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from cola_core.assets.tiny import FAMILIES, build_tiny
from cola_core.errors import UserError
from cola_core.files import tree_hash

LOADERS = {
    "llama": AutoModelForCausalLM,
    "opt": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "bert": AutoModelForSequenceClassification,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        build_tiny(family, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_whole_and_computes(folders: dict[str, Path], family: str) -> None:
    model, report = LOADERS[family].from_pretrained(folders[family], output_loading_info=True)
    new = {"classifier.weight", "classifier.bias"} if family == "bert" else set()
    assert set(report["missing_keys"]) == new and not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    ids = tokenizer("a b", return_tensors="pt")["input_ids"]
    more = {"decoder_input_ids": ids} if family == "t5" else {}
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, **more).logits
    assert torch.isfinite(logits).all() and logits.std() > 0
    assert sum(p.numel() for p in model.parameters()) < 100_000


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_bytes_and_leaves_the_global_generator_alone(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    build_tiny(family, tmp_path / "again")
    build_tiny(family, tmp_path / "other", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert tree_hash(tmp_path / "again") == tree_hash(folders[family])
    weights = {name: tree_hash(tmp_path / name / "model.safetensors") for name in ("again", "other")}
    assert weights["again"] != weights["other"]
    assert tree_hash(tmp_path / "again/tokenizer.json") == tree_hash(tmp_path / "other/tokenizer.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_names_no_version_and_no_path(folders: dict[str, Path], family: str) -> None:
    text = "".join(file.read_text() for file in sorted(folders[family].glob("*.json")))
    assert "transformers_version" not in text and str(folders[family].parent) not in text


def test_the_families_have_their_marks(folders: dict[str, Path]) -> None:
    configs = {family: json.loads((folder / "config.json").read_text()) for family, folder in folders.items()}
    assert (configs["llama"]["num_attention_heads"], configs["llama"]["num_key_value_heads"]) == (4, 2)
    assert not configs["llama"]["tie_word_embeddings"]
    for family in ("gpt2", "opt", "t5"):
        model = LOADERS[family].from_pretrained(folders[family])
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    bert = AutoModelForSequenceClassification.from_pretrained(folders["bert"])
    assert bert.bert.pooler is not None and configs["bert"]["architectures"] == ["BertModel"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_frames_a_text_as_its_family_does(folders: dict[str, Path], family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    frame = {"llama": "<s>|", "opt": "</s>|", "gpt2": "|", "t5": "|</s>", "bert": "[CLS]|[SEP]"}[family]
    plain, framed = (tokenizer("xy", add_special_tokens=special)["input_ids"] for special in (False, True))
    assert len(plain) == 2 and tokenizer.pad_token_id is not None
    assert "".join(tokenizer.convert_ids_to_tokens(framed)) == frame.replace("|", "xy")


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_is_its_bytes_and_comes_back(folders: dict[str, Path], text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["gpt2"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_an_unknown_family_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tiny:gtp2: no such family; did you mean 'gpt2'"):
        build_tiny("gtp2", tmp_path)
