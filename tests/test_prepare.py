"""The stage prepare and `inspect`: exact artifacts, the same bytes twice, and nothing at all after a mistake."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from cola_core.assets.tiny import build_tiny
from cola_core.checksums import checksum, seal_folder
from cola_core.config.base import parse
from cola_core.config.reading import read_yaml
from cola_core.config.task import PrepareConfig
from cola_core.data.inspection import inspect_file
from cola_core.errors import UserError
from cola_core.files import tree_hash
from cola_core.rows import Row
from cola_core.sealed import write_sealed
from cola_core.split_files import MARK, read_rows
from tasks import prepare
from tasks.context import Context

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
KINDS = {"llama": "causal", "t5": "seq2seq", "bert": "encoder"}
SECTION: dict[str, Any] = {
    "kind": "choice", "loss": "answer", "score": "sum", "prompt": "{{ text }}\nTopic:", "label": "{{ label }}",
    "answers": {"neg": " bad", "pos": " good"}, "extract": None, "max_tokens": 40, "max_new_tokens": 8,
    "train": 20, "validation": 6, "probe": 4, "test": None, "duplicates": "drop_from_train",
}  # fmt: skip
WORDS = ["the", "film", "is", "a", "story", "of", "some", "people", "who", "walk", "and", "never", "stop"]


def assert_reads_like(rows: list[dict[str, Any]], path: Path) -> None:
    """A split read row by row from its mapped file is the list it was written from."""
    split = read_rows(path)
    expected = [Row(**row) for row in rows]
    assert len(split) == len(rows) and list(split) == expected
    assert [split[i] for i in (0, -1, 3)] == [expected[i] for i in (0, -1, 3)]
    assert split[2:5] == expected[2:5] and split[-2:] == expected[-2:]
    with pytest.raises(IndexError):
        split[len(rows)]


def checkout(folder: Path, family: str = "llama") -> None:
    """What the stage fetch leaves: a tiny model, 60 training rows (5 of them repeated) and 9 test rows."""
    model, data = folder / "artifacts/fetch/model", folder / "artifacts/fetch/data"
    build_tiny(family, model)
    write_sealed(model / "cola.json", "base", {"kind": KINDS[family], "checksums": {}})
    data.mkdir(parents=True)
    draw = random.Random(0)
    lines = [f"{' '.join(draw.choices(WORDS, k=draw.randint(2, 12)))} {i}\t{('neg', 'pos')[i % 2]}" for i in range(55)]
    (data / "train.tsv").write_text("\n".join(["text\tlabel", *lines, *lines[:5]]) + "\n", encoding="utf-8")
    tests = [f"test row {i}\tpos" for i in range(8)] + [lines[7]]
    (data / "test.tsv").write_text("\n".join(["text\tlabel", *tests]) + "\n", encoding="utf-8")
    seal_folder(data)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    monkeypatch.chdir(folder)
    prepare.main(Context("prepare", None, {"seed": 0, "prepare": {**SECTION, **changes}}))
    return folder / "artifacts/prepare"


def table(path: Path) -> pa.Table:
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        return reader.read_all()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("t5", {"loss": "candidates"}),
        ("bert", {"kind": "classify"}),
        ("llama", {"kind": "generate", "answers": {}, "label": " {{ label }}", "extract": "(p|n)"}),
    ],
)
def test_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any]) -> None:
    checkout(tmp_path, family)
    out = run(tmp_path, monkeypatch, **changes)
    names = ["manifest.json", "probe.arrow", "task.json", "test.arrow", "train.arrow", "validation.arrow"]
    assert sorted(path.name for path in out.iterdir()) == names
    manifest, task = json.loads((out / "manifest.json").read_text()), json.loads((out / "task.json").read_text())
    assert {name: part["rows"] for name, part in manifest["splits"].items()} == {
        "train": 20, "validation": 6, "test": 9, "probe": 4
    }  # fmt: skip
    assert manifest["duplicates"] == {
        "repeated": 5, "conflicting": 0, "in_test": 1, "test_prompts": 1, "dropped": 6, "policy": "drop_from_train"
    }  # fmt: skip
    assert manifest["files"]["train.tsv"] == tree_hash(tmp_path / "artifacts/fetch/data/train.tsv")
    assert list(task) == [
        "candidates",
        "checksum",
        "end",
        "extract",
        "format",
        "kind",
        "labels",
        "loss",
        "max_new_tokens",
        "pad",
        "score",
        "start",
    ]
    assert (task["start"] is not None) == (family == "t5")
    assert len(task["candidates"]) == (2 if task["kind"] == "choice" else 0)
    train = table(out / "train.arrow")
    assert train.schema.names == ["id", "prompt", "answer", "label", "reference"]
    assert train.schema.types == [pa.string(), pa.list_(pa.int32()), pa.list_(pa.int32()), pa.int32(), pa.string()]
    assert train.column("id").num_chunks == 1
    rows = train.to_pylist()
    assert_reads_like(rows, out / "train.arrow")
    assert manifest["probe"] == table(out / "probe.arrow").column("id").to_pylist()
    assert set(manifest["probe"]) <= {row["id"] for row in rows}
    for row in rows:
        assert row["label"] == (-1 if task["kind"] == "generate" else task["labels"].index(row["reference"]))
        if task["kind"] == "choice":
            assert row["answer"] == task["candidates"][row["label"]]
    full = {
        f"{line.split(chr(9))[0]}\nTopic:" for line in (tmp_path / prepare.DATA / "train.tsv").read_text().split("\n")
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / prepare.MODEL, local_files_only=True)
    cut = [row for row in rows if tokenizer.decode(row["prompt"], skip_special_tokens=True) not in full]
    assert manifest["splits"]["train"]["truncated"] == len(cut) > 0
    for shown, row in zip(manifest["samples"], rows, strict=False):
        assert shown["mask"] == [0] * len(row["prompt"]) + [1] * len(row["answer"])
    assert len(manifest["samples"]) == 2


def test_the_same_bytes_whatever_the_order_of_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = []
    for name, answers in (("one", {"neg": " bad", "pos": " good"}), ("two", {"pos": " good", "neg": " bad"})):
        checkout(tmp_path / name)
        hashes.append(tree_hash(run(tmp_path / name, monkeypatch, answers=answers)))
        hashes.append(tree_hash(run(tmp_path / name, monkeypatch, answers=answers)))
    assert len(set(hashes)) == 1
    assert str(tmp_path) not in (tmp_path / "one/artifacts/prepare/manifest.json").read_text()


@pytest.mark.parametrize(
    ("changes", "spoil", "told"),
    [
        ({"prompt": "{{ txt }}"}, None, "train.tsv:2: prepare.prompt: no column 'txt'; did you mean 'text'?"),
        ({"label": "{{ lable }}"}, None, "train.tsv:2: prepare.label: no column 'lable'; did you mean 'label'?"),
        (
            {"answers": {"neg": " bad", "posi": " good"}},
            None,
            "train.tsv:3: prepare.label: 'pos' is no key of prepare.answers",
        ),
        ({}, ("train.tsv", b""), "train.tsv: no rows"),
        ({}, ("train.tsv", b"text\tlabel\na\tneg\nb\n"), "train.tsv:3: 1 field, but the header has 2"),
        ({}, ("test.tsv", b"text\tlabel\n\xff\tneg\n"), "test.tsv:2: not UTF-8"),
        ({}, ("test.tsv", b"text\tlabel\na\t\n"), "test.tsv:2: prepare.label: ''"),
        ({}, ("train.csv", b"text,label\na,neg\n"), "2 files are called train"),
        ({"train": 100}, None, "the training file has 54 rows left (6 duplicates dropped)"),
        ({"duplicates": "refuse"}, None, "the same prompt as"),
        (
            {"kind": "generate", "answers": {}, "extract": "(neg)"},
            None,
            "train.tsv:3: prepare.extract: finds nothing to compare in the row's own answer",
        ),
        (
            {"kind": "generate", "answers": {}, "extract": "(x)?pos|(n)eg"},
            None,
            "train.tsv:2: prepare.extract: finds nothing to compare",
        ),
        (
            {"kind": "generate", "answers": {}, "extract": "# (.*)"},
            ("test.tsv", b"text\tlabel\na\t# 1\nb\t# ,.\n"),
            ".tsv:2: prepare.extract: finds nothing to compare",
        ),
        ({"max_tokens": 8}, None, "the template and answer alone need"),
    ],
)
def test_a_mistake_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], spoil: Any, told: str
) -> None:
    checkout(tmp_path)
    if spoil:
        (tmp_path / "artifacts/fetch/data" / spoil[0]).write_bytes(spoil[1])
        seal_folder(tmp_path / "artifacts/fetch/data")
    with pytest.raises(UserError) as caught:
        run(tmp_path, monkeypatch, **changes)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == ["fetch"]


def test_the_command_exits_with_2_and_one_line(tmp_path: Path) -> None:
    checkout(tmp_path)
    (tmp_path / "artifacts/fetch/data/train.tsv").write_bytes(b"")
    seal_folder(tmp_path / "artifacts/fetch/data")
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    command = [sys.executable, "-m", "tasks.prepare"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "prepare: artifacts/fetch/data/train.tsv: no rows\n"
    assert not (tmp_path / "artifacts/prepare").exists()


def test_inspect_shows_what_is_supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout(tmp_path)
    out = run(tmp_path, monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "artifacts/fetch/model", local_files_only=True)
    section = parse(PrepareConfig, SECTION, "prepare")
    raw = inspect_file(tmp_path / "artifacts/fetch/data/test.tsv", section, tokenizer, rows=3)
    assert [shown["id"] for shown in raw.samples] == ["test:1", "test:2", "test:3"]
    text = "\n".join(raw.lines())
    assert "<s>test row 0\nTopic:\u27e6 good\u27e7" in text
    assert "test: 9 rows" in text
    assert "pos 8 (88.9 %)" in text or "pos 9 (100.0 %)" in text
    folder = inspect_file(out, section, tokenizer, rows=1)
    assert folder.splits["train"]["rows"] == 20
    assert any("duplicates: " in line and "dropped 6" in line for line in folder.lines())
    assert len(folder.samples) == 1


CB = "{{ ['entailment', 'contradiction', 'neutral'].index(label) }}"
OFFICIAL = {  # file, and what maps its columns to those of the task's own files
    "sst2": ("sst2/test.tsv", {}, {"0": 428, "1": 444}),
    "rte": ("rte/dev.tsv", {"label": "{{ 0 if label == 'entailment' else 1 }}"}, {"0": 146, "1": 131}),
    "cb": ("cb/val.jsonl", {"label": CB}, {"0": 23, "1": 28, "2": 5}),
    "boolq": ("boolq/val.jsonl", {"label": "{{ label }}"}, {"False": 1237, "True": 2033}),
    "wsc": ("wsc/train.jsonl", {}, None),
}  # fmt: skip


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not beside this checkout")
@pytest.mark.parametrize("task", OFFICIAL)
def test_official_tasks_render_real_files(task: str, tmp_path: Path) -> None:
    name, changes, counts = OFFICIAL[task]
    section = parse(PrepareConfig, {**read_yaml(ROOT / f"conf/task/{task}.yaml")["prepare"], **changes}, "prepare")
    build_tiny("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    report = inspect_file(SHARED / name, section, tokenizer, rows=1)
    [part] = report.splits.values()
    assert counts is None or part["labels"] == counts
    assert part["longest"] <= section.max_tokens
    [shown] = report.samples
    assert shown["prompt"].endswith(ENDINGS[task])
    assert shown["answer"] in section.answers.values()


ENDINGS = {"sst2": " It was", "rte": '" is true? Yes or No?\n', "cb": '"? Yes, No, or Maybe?\n', "boolq": "?",
           "wsc": "? Yes or No?\n"}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "conf/task").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_task_file_is_whole(path: Path) -> None:
    content = read_yaml(path)
    section = dict(content["prepare"])
    if path.stem == "custom":
        section["answers"] = {"a": " x"}
    parse(PrepareConfig, section, "prepare")
    assert content["task"] == path.stem
    for asset in filter(None, content["fetch"]["data"].values()):
        assert "@main" not in asset["asset"], "a branch moves"


def test_another_table_is_no_split(tmp_path: Path) -> None:
    other = pa.table({"id": ["a"], "text": ["b"]})
    path = tmp_path / "x.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, other.schema) as out:
        out.write_table(other)
    with pytest.raises(UserError, match="not a prepared split of this version"):
        read_rows(path)
    path.write_bytes(path.read_bytes() + MARK + checksum(path).encode())
    with pytest.raises(UserError, match=r"not a prepared split \(columns id, text\)"):
        read_rows(tmp_path / "x.arrow")
