"""Hostile and broken files: a right answer or one clear line; and hypothesis' own whole files, in every format."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cola_core.checksums import seal_folder
from cola_core.config.base import parse
from cola_core.config.params import check_params
from cola_core.config.reading import load_yaml
from cola_core.config.task import PrepareConfig
from cola_core.data.tables import read_table
from cola_core.data.templates import template
from cola_core.errors import RetryError, UserError
from tasks import prepare
from tasks.context import Context
from tests.chaos import fuzz, readers, rows
from tests.chaos.fuzz import judged, run_kind
from tests.chaos.readers import KINDS

ROOT = Path(__file__).parent.parent
PARAMS = load_yaml((ROOT / "params.yaml").read_text())
# A thousand of every kind take minutes: `python -m tests.chaos.fuzz`. What reads fast is read as often here.
FEW = {
    "params": 120,
    "conf_method": 15,
    "conf_top": 12,
    "csv": 200,
    "tsv": 200,
    "tab": 300,
    "jsonl": 400,
    "json": 400,
}
EXAMPLES = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", KINDS)
def test_spoilt_files_are_answered_or_refused_in_one_line(kind: str) -> None:
    tally = run_kind(kind, FEW.get(kind, 1000))
    assert not tally.failures
    assert tally.accepted and tally.accepted + tally.refused == tally.files == FEW.get(kind, 1000)
    assert tally.refused or kind == "checkpoint"  # where a spoilt file is a fresh start


@pytest.mark.parametrize("kind", KINDS)
def test_every_good_file_is_accepted(kind: str) -> None:
    good = KINDS[kind].seeds()
    assert [judged(KINDS[kind], data) for data in good[:3]] == [("accepted", "")] * len(good[:3])


def _stuck(path: Path) -> None:
    if b"stop" in path.read_bytes():
        os._exit(3)
    if b"hang" in path.read_bytes():
        while True:
            pass
    if b"half" in path.read_bytes():
        (path.parent / "out").mkdir()
        raise UserError("half a folder is left")
    if b"page" in path.read_bytes():
        error = UserError("")
        error.args = ("two\nlines",)
        raise error
    if b"bug" in path.read_bytes():
        raise ZeroDivisionError
    if b"bad" in path.read_bytes():
        raise RetryError("a line")


def test_the_judge_sees_every_way_to_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = [b"fine", b"hang", b"half", b"page", b"bug", b"bad", b"stop", b"fine"]
    monkeypatch.setitem(KINDS, "stuck", readers.Kind("x", lambda: files, lambda draw: b"", _stuck))
    monkeypatch.setattr(fuzz, "made", lambda kind, seed, index: files[index])
    monkeypatch.setattr(fuzz, "HANG", 2.0)
    tally = run_kind("stuck", len(files), save=tmp_path)
    assert (tally.files, tally.accepted, tally.refused) == (8, 2, 1)
    assert list(tally.failures) == [1, 2, 3, 4, 6]
    assert "no answer" in tally.failures[1] and "left ['out']" in tally.failures[2]
    assert "not one clear line" in tally.failures[3] and "ZeroDivisionError" in tally.failures[4]
    assert "died (3)" in tally.failures[6]
    assert (tmp_path / "stuck-0-1").read_bytes() == b"hang"
    assert fuzz.replay("stuck", tmp_path / "stuck-0-4")[0] == "failed"


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
VALUES = st.one_of(TEXT, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False))
TABLE = st.lists(
    st.fixed_dictionaries({"text": TEXT, "label": st.sampled_from(["acq", "earn", 1, 0, True, "other", ""])}),
    min_size=1, max_size=12,
)  # fmt: skip


@EXAMPLES
@given(
    table=st.lists(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4), min_size=1, max_size=8), blank=st.booleans()
)
def test_any_objects_come_back_from_json(
    tmp_path_factory: pytest.TempPathFactory, table: list[dict[str, Any]], blank: bool
) -> None:
    folder = tmp_path_factory.mktemp("j")
    gap = "\n \n" if blank else "\n"
    (folder / "a.jsonl").write_text(gap.join(json.dumps(row) for row in table), encoding="utf-8")
    (folder / "a.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8-sig")
    for name in ("a.json", "a.jsonl"):
        assert read_table(folder / name).rows == table


@EXAMPLES
@given(
    table=st.lists(st.lists(TEXT, min_size=2, max_size=2), min_size=1, max_size=8), end=st.sampled_from(["\n", "\r\n"])
)
def test_any_texts_come_back_from_csv(
    tmp_path_factory: pytest.TempPathFactory, table: list[list[str]], end: str
) -> None:
    path = tmp_path_factory.mktemp("c") / "a.csv"
    frame = pd.DataFrame(table, columns=["a", "b"])
    path.write_bytes(frame.to_csv(index=False, lineterminator=end, quoting=1).encode())
    assert [[row["a"], row["b"]] for row in read_table(path).rows] == table


@EXAMPLES
@given(table=TABLE, ending=st.sampled_from(["csv", "json", "jsonl", "parquet"]))
def test_whole_files_are_prepared_or_refused(table: list[dict[str, Any]], ending: str) -> None:
    if ending in {"csv", "parquet"}:
        table = [{name: str(value) for name, value in row.items()} for row in table]
    data = rows.WRITERS[ending](table)[0]
    verdict, line = judged(KINDS[ending], data)
    assert verdict != "failed", line
    known = all(str(row["label"]) in rows.ANSWERS for row in table)
    kept = {row["text"] for row in table}
    assert known or verdict == "refused"
    assert not (known and len(kept) == len(table) >= 4) or verdict == "accepted", line


@EXAMPLES
@given(
    words=st.lists(st.sampled_from("abcdefghij"), min_size=9, max_size=24),
    tested=st.lists(st.sampled_from("ijkl"), min_size=1, max_size=4),
    labels=st.randoms(use_true_random=False),
    policy=st.sampled_from(["drop_from_train", "keep", "refuse"]),
)
def test_the_manifest_counts_what_train_and_test_share(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], tested: list[str], labels: Any, policy: str
) -> None:
    train = [(word, labels.choice(["acq", "earn"])) for word in words]
    folder = tmp_path_factory.mktemp("p")
    manifest = _staged(folder, train, [(word, "acq") for word in tested], policy)
    earlier = [{label for text, label in train[:i] if text == word} for i, (word, _) in enumerate(train)]
    repeated = sum(label in seen for (_, label), seen in zip(train, earlier, strict=True))
    conflicting = sum(bool(seen) and label not in seen for (_, label), seen in zip(train, earlier, strict=True))
    shared = [word for word, _ in train if word in tested]
    unique = set(words) - set(tested)
    if manifest is None:
        assert len(unique) < 3 or (policy == "refuse" and (repeated or conflicting or shared))
        return
    left = len(train) - len(unique) if policy == "drop_from_train" else 0
    assert manifest["duplicates"] == {
        "repeated": repeated, "conflicting": conflicting, "in_test": len(shared), "test_prompts": len(set(shared)),
        "dropped": left, "policy": policy,
    }  # fmt: skip
    counts = collections.Counter({name: part["rows"] for name, part in manifest["splits"].items()})
    assert counts["train"] + counts["validation"] == len(train) - left and counts["test"] == len(tested)


def _staged(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]], policy: str) -> Any:
    """The manifest of the stage itself, None where it refused and left nothing."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        (folder / prepare.DATA).mkdir(parents=True)
        rows.write_tokenizer(folder / prepare.MODEL)
        for name, table in (("train", train), ("test", test)):
            text = "".join(f"{word}\t{label}\n" for word, label in [("text", "label"), *table])
            (folder / prepare.DATA / f"{name}.tsv").write_text(text)
        seal_folder(folder / prepare.DATA)
        section = {**rows.SECTION, "test": None, "duplicates": policy}
        try:
            prepare.main(Context("prepare", None, {"seed": 0, "prepare": section}))
        except UserError:
            assert [path.name for path in (folder / "artifacts").iterdir()] == ["fetch"]
            return None
        return json.loads((folder / prepare.OUT / "manifest.json").read_text())
    finally:
        os.chdir(here)


def _paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
    return [*([path] if path else []), *(found for key, value in inner for found in _paths(value, (*path, key)))]


YAML_VALUES = st.recursive(
    VALUES | st.just(float("inf")), lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=5
)


@settings(max_examples=80, deadline=None)
@given(path=st.sampled_from(_paths(PARAMS)), value=YAML_VALUES)
def test_any_value_anywhere_in_params_is_taken_or_told(path: tuple[Any, ...], value: Any) -> None:
    changed = json.loads(json.dumps(PARAMS))
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    try:
        params = check_params(changed)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) <= 2000
        return
    assert check_params(load_yaml(yaml.safe_dump(params.model_dump(by_alias=True), allow_unicode=True))) == params


LINES = {
    "a: &a [*a]": "params.yaml:1: not YAML: an alias stands inside what it stands for",
    "a: {b: 1, b: 2}": "params.yaml:1: not YAML: the key 'b' stands here twice",
    "x: 0\na: 9223372036854775808": "params.yaml:2: not YAML: an integer of more than 64 bits",
    f"a: {'9' * 5000}": "params.yaml:1: not YAML: '999",
    "a: 0x_": "params.yaml:1: not YAML: '0x_' is no int",
    "a: !!bool maybe": "params.yaml:1: not YAML: 'maybe' is no bool",
    "a: 2026-99-99": "params.yaml:1: not YAML: '2026-99-99' is no timestamp",
    'a: "\\ud800"': "params.yaml:1: not YAML: half of a surrogate pair",
    "[" * 20000: "params.yaml: not YAML: nested too deep",
    "a: \x07": "params.yaml: not YAML: unacceptable character #x0007: special characters are not allowed in",
    "- 1": "params.yaml: expected keys and values, got list",
}  # fmt: skip


@pytest.mark.parametrize(("text", "told"), LINES.items(), ids=[line[30:60] for line in LINES.values()])
def test_yaml_is_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_yaml(text)
    assert str(caught.value).startswith(told) and str(caught.value).isprintable()


def test_aliases_are_counted_before_they_are_written_out() -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UserError, match=r"params\.yaml:5: not YAML: more than 100000 values"):
        load_yaml("\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *levels]))
    assert load_yaml("a: &a {b: 1}\nc: {<<: *a, d: *a}") == {"a": {"b": 1}, "c": {"b": 1, "d": {"b": 1}}}


@pytest.mark.parametrize("value", ["(" * 5000, "(a", "(a{99999999999999999999})", "a"])
def test_a_bad_extract_is_one_line(value: str) -> None:
    section = {**rows.SECTION, "kind": "generate", "answers": {}, "extract": value}
    with pytest.raises(UserError, match=r"^params\.yaml: prepare\.extract: (not a regular expression|needs one)"):
        parse(PrepareConfig, section, "prepare")


@pytest.mark.parametrize(
    "source",
    ["{{ (" * 3000, "{{ " + "(" * 5000 + "a" + ")" * 5000 + " }}", "{% for i in a %}" * 25 + "{% endfor %}" * 25,
     "{{ 'x' * 10**14 }}", "{{ '\\ud800' }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ a|random }}",
     "{{ lipsum() }}", "{{ binary }}", "{{ missing }}", "{{ deep }}"],
    ids=lambda source: source[:12],
)  # fmt: skip
def test_a_hostile_template_is_one_line(source: str) -> None:
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    row = {"a": "x", "binary": b"x", "missing": float("nan"), "deep": deep}
    with pytest.raises(UserError, match=r"prepare\.prompt: ") as caught:
        template("prepare.prompt", source).render(row, "a.csv:2")
    assert str(caught.value).isprintable()


BAD = {
    "twins.jsonl": (b'{"a": 1, "b": {"c": 1, "c": 2}}\n', "twins.jsonl:1: two columns are called 'c'"),
    "half.jsonl": (b'{"a": 1}\n{"a": "\\ud800"}\n', "half.jsonl:2: half of a surrogate pair"),
    "digits.jsonl": (b'{"a": ' + b"9" * 5000 + b"}\n", "digits.jsonl:1: not JSON: Exceeds the limit"),
    "deep.json": (b"[" * 20000, "deep.json: not JSON: maximum recursion"),
    "wide.tsv": (b"\t" * 1_000_000 + b"a\n1\n", "wide.tsv:1: two columns are called ''"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_hostile_table_is_one_line(tmp_path: Path, name: str) -> None:
    content, told = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_table(tmp_path / name)
    assert told in str(caught.value) and str(caught.value).isprintable()


def test_a_line_keeps_its_beginning_and_its_end() -> None:
    line = str(UserError("begin\n" + "x" * 10**6 + "\x1b[31m; allowed: a, b"))
    assert line.startswith("begin x") and line.endswith("\\x1b[31m; allowed: a, b") and len(line) <= 2000


@pytest.mark.slow
def test_atheris_drives_the_same_readers(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="the extra `chaos` is for Linux on x86-64")
    command = [sys.executable, "-m", "tests.chaos.coverage_fuzz", "--kind", "ranks", "--runs", "300"]
    done = subprocess.run([*command, "--save", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "DONE" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_number_of_params_is_infinite(value: float) -> None:
    with pytest.raises(UserError, match=r"^params\.yaml: link\.alpha: Input should be a finite number"):
        check_params({**PARAMS, "link": {**PARAMS["link"], "alpha": value}})
