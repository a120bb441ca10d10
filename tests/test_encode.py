"""Encoding: prompt and answer apart, nothing over max_tokens, cuts in the context only, masks by position."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cola_core.assets.tiny import build_tiny
from cola_core.config.base import parse
from cola_core.config.task import PrepareConfig
from cola_core.data.encode import Codec, candidate_ids, encode
from cola_core.data.examples import Example
from cola_core.data.templates import template
from cola_core.data.tokens import Plain, open_tokenizer
from cola_core.errors import UserError
from cola_core.files import read_json, write_json
from cola_core.sealed import write_sealed

KINDS = {"llama": "causal", "opt": "causal", "gpt2": "causal", "t5": "seq2seq", "bert": "encoder"}
FRAMES = {"llama": ("<s>", ""), "opt": ("</s>", ""), "gpt2": ("", ""), "t5": ("", "</s>"), "bert": ("[CLS]", "[SEP]")}
TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<["), max_size=60
)  # spells no special token


@functools.cache
def codec(family: str) -> Codec:
    with tempfile.TemporaryDirectory() as name:
        build_tiny(family, Path(name))
        write_sealed(Path(name) / "cola.json", "base", {"kind": KINDS[family], "checksums": {}})
        return Codec.load(Path(name))


def config(**changes: Any) -> PrepareConfig:
    base = {
        "kind": "choice", "loss": "answer", "score": "sum", "prompt": "Say: {{ text }}\nAbout {{ who }}\nTopic:",
        "label": "{{ label }}", "answers": {"a": " yes", "b": " never"}, "extract": None, "max_tokens": 48,
        "max_new_tokens": 8, "train": None, "validation": 1, "probe": 1, "test": None, "duplicates": "keep",
    }  # fmt: skip
    return parse(PrepareConfig, {**base, **changes}, "prepare")


def example(settings: PrepareConfig, reference: str = "a", **row: Any) -> Example:
    return Example("x:1", "x.csv:2", row, template("prepare.prompt", settings.prompt).render(row, "x.csv:2"), reference)


def read(family: str, ids: list[int]) -> str:
    text: str = codec(family).tokenizer.decode(ids)
    return text


@settings(max_examples=60, deadline=None)
@given(text=TEXT, who=TEXT, family=st.sampled_from(sorted(KINDS)), label=st.sampled_from("ab"))
def test_choice_laws(text: str, who: str, family: str, label: str) -> None:
    task = config(max_tokens=64, kind="classify" if family == "bert" else "choice")
    row = example(task, label, text=text, who=who)
    [done] = encode([row], task, codec(family))
    longest = max(map(len, candidate_ids(task, codec(family))), default=0)
    assert len(done.prompt) + longest <= 64
    assert done.label == "ab".index(label)
    assert read(family, done.answer) == ("" if family == "bert" else task.answers[label])
    start, end = FRAMES[family]
    seen = read(family, done.prompt)
    assert seen.startswith(f"{start}Say: ")
    assert seen.endswith(f"\nTopic:{end}")
    assert "\nAbout " in seen
    if done.truncated:
        assert len(done.prompt) + longest >= 64 - 3, "more than a character was cut for nothing"
    else:
        assert seen == start + row.prompt + end


@settings(max_examples=40, deadline=None)
@given(text=TEXT, answer=TEXT.filter(str.strip), family=st.sampled_from(["llama", "opt", "gpt2", "t5"]))
def test_generate_laws(text: str, answer: str, family: str) -> None:
    task = config(kind="generate", answers={}, prompt="Q: {{ text }}\nA:", max_tokens=280)
    [done] = encode([example(task, answer, text=text)], task, codec(family))
    end = codec(family).end
    assert len(done.prompt) + max(len(done.answer), 8) <= 280
    assert done.answer[-1] == end
    assert done.answer.count(end) == 1
    assert read(family, done.answer[:-1]) == answer
    assert done.label == -1
    assert done.reference == answer


def test_the_beginning_of_the_longest_column_stays() -> None:
    task = config()
    [done] = encode([example(task, text="the lead, " + "x" * 80 + "the end", who="me")], task, codec("llama"))
    assert read("llama", done.prompt) == "<s>Say: the lead, xxxxxxxxxx\nAbout me\nTopic:"
    assert len(done.prompt) + len(" never") == 48
    assert done.truncated


def test_the_next_column_is_cut_when_the_longest_is_used_up() -> None:
    task = config(max_tokens=36)
    [done] = encode([example(task, text="a" * 30, who="b" * 20)], task, codec("gpt2"))
    assert read("gpt2", done.prompt) == "Say: \nAbout " + "b" * 11 + "\nTopic:"


def test_a_cut_never_splits_a_character() -> None:
    task = config(max_tokens=40)
    for text in ("é" * 40, "\U0001f600" * 12):
        [done] = encode([example(task, text=text, who="")], task, codec("gpt2"))
        assert "\ufffd" not in read("gpt2", done.prompt)


def test_a_test_prompt_does_not_depend_on_the_length_of_its_reference() -> None:
    task = config(kind="generate", answers={}, prompt="Q: {{ text }}\nA:", max_tokens=32, max_new_tokens=10)
    rows = [example(task, reference, text="x" * 99) for reference in ("1", "123456789")]
    short, long = encode(rows, task, codec("gpt2"))
    assert short.prompt == long.prompt


def test_padding_end_and_template_tokens_are_told_by_position() -> None:
    """gpt2 pads with its end token; text that spells it is still prompt, and every answer token is supervised."""
    task = config(kind="generate", answers={}, prompt="{{ text }}", max_tokens=64)
    [done] = encode([example(task, " 7", text="a<|endoftext|>b")], task, codec("gpt2"))
    assert codec("gpt2").pad == codec("gpt2").end
    assert done.prompt.count(codec("gpt2").pad) == 1
    assert done.answer[-1] == codec("gpt2").pad


def test_an_end_token_only_where_one_answer_begins_another() -> None:
    plain = config(answers={"a": " no", "b": " yes"})
    assert [read("llama", ids) for ids in candidate_ids(plain, codec("llama"))] == [" no", " yes"]
    begun = config(answers={"b": " yes", "a": " yesterday"})
    assert [read("llama", ids) for ids in candidate_ids(begun, codec("llama"))] == [" yesterday</s>", " yes</s>"]


def test_labels_are_in_sorted_order_whatever_the_order_of_answers() -> None:
    swapped = config(answers={"b": " never", "a": " yes"})
    assert candidate_ids(swapped, codec("opt")) == candidate_ids(config(), codec("opt"))
    assert encode([example(swapped, "b", text="t", who="w")], swapped, codec("opt"))[0].label == 1


@pytest.mark.parametrize(
    ("changes", "row", "told"),
    [
        ({"answers": {"a": " x", "b": " x"}}, {}, "prepare.answers: 'a' and 'b' have the same tokens"),
        ({"answers": {"a": " x", "b": ""}}, {}, "prepare.answers.b: '' has no tokens"),
        ({"max_tokens": 20}, {}, "x.csv:2: the template and answer alone need 25 tokens; prepare.max_tokens is 20"),
        ({"prompt": "{{ who }}"}, {"who": ""}, "x.csv:2: prepare.prompt: the prompt has no tokens"),
    ],
)
def test_what_cannot_be_encoded_is_one_line(changes: dict[str, Any], row: dict[str, Any], told: str) -> None:
    task = config(**changes)
    with pytest.raises(UserError) as caught:
        encode([example(task, **{"text": "t", "who": "w", **row})], task, codec("gpt2"))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_seq2seq_knows_how_its_decoder_starts(tmp_path: Path) -> None:
    assert codec("t5").start == 0
    assert codec("llama").start is None
    build_tiny("t5", tmp_path)
    write_sealed(tmp_path / "cola.json", "base", {"kind": "seq2seq", "checksums": {}})
    for name in ("config.json", "generation_config.json"):
        if (tmp_path / name).is_file():
            content = read_json(tmp_path / name)
            content.pop("decoder_start_token_id", None)
            write_json(tmp_path / name, content)
    with pytest.raises(UserError, match="decoder_start_token_id: missing"):
        Codec.load(tmp_path)


TEXTS = ["", " ", "a", " a b  c ", "Ünï çødé, 漢字 and 🙂!", "<s> </s> <pad> [SEP]", "don ' t stop , now .", "x\ny\t z"]


@pytest.mark.parametrize("family", KINDS)
def test_the_plain_tokenizer_is_transformers_own(tmp_path: Path, family: str) -> None:
    build_tiny(family, tmp_path)
    plain, whole = open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(plain) is Plain
    assert (plain.pad_token_id, plain.eos_token_id) == (whole.pad_token_id, whole.eos_token_id)
    for special in (False, True):
        asked = {"add_special_tokens": special, "return_offsets_mapping": True}
        found, wanted = plain(TEXTS, **asked), whole(TEXTS, **asked)
        assert found["input_ids"] == wanted["input_ids"] and found["offset_mapping"] == wanted["offset_mapping"]
        assert plain(TEXTS[4], **asked)["input_ids"] == whole(TEXTS[4], **asked)["input_ids"]
    for ids in whole(TEXTS)["input_ids"]:
        assert plain.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(ids)
        for skip in (False, True):
            assert plain.decode(ids, skip_special_tokens=skip) == whole.decode(ids, skip_special_tokens=skip)


def test_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    write_sealed(tmp_path / "cola.json", "base", {"kind": "causal", "checksums": {}})
    with pytest.raises(UserError, match="no tokenizer"):
        Codec.load(tmp_path)


def sentencepiece(legacy: bool) -> Any:
    """A tokenizer that writes the space before the first word itself, as Llama-2 (legacy) and T5 do."""
    words = ["\u2581", "\u2581Yes", *"\u2581YesaNo"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(["<unk>", "</s>", *words, "Ye", "Yes"]))}
    merges = [("Y", "e"), ("Ye", "s"), ("\u2581", "Yes")]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    wrap: Any = PreTrainedTokenizerFast
    return wrap(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("legacy", [True, False])
def test_an_answers_space_is_not_doubled(legacy: bool) -> None:
    tokenizer = sentencepiece(legacy)
    made = Codec.of(tokenizer, "causal")
    assert made.spaced
    assert tokenizer.convert_ids_to_tokens(made.answer(" Yes")) == ["\u2581Yes"]
    assert not codec("gpt2").spaced


def test_a_causal_prompt_drops_the_end_token_that_a_tokenizer_adds() -> None:
    encoder = codec("t5").tokenizer
    assert Codec.of(encoder, "causal").suffix == []
    assert Codec.of(encoder, "seq2seq").suffix == [encoder.eos_token_id]


def test_special_tokens_that_only_the_configuration_knows_are_left_to_transformers(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for more in ({"pad_token": "<filler>"}, {"extra_special_tokens": ["<new>"]}):
        path.write_text(json.dumps({**config, **more}))
        assert not isinstance(open_tokenizer(tmp_path), Plain)
