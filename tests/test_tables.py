"""Data files: what is read of each format, and one line with file:line for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_core.data.tables import FORMATS, read_table
from cola_core.errors import UserError

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
ROWS = {"sst2/train.tsv": 60614, "sst2/test.tsv": 872, "rte/train.tsv": 2490, "rte/dev.tsv": 277,
        "cb/train.jsonl": 250, "cb/val.jsonl": 56, "boolq/val.jsonl": 3270, "wsc/val.jsonl": 104}  # fmt: skip
GOOD = {
    "tab": b"Category\tText\r\nd\tstring\r\nclass\t\r\n\r\nacq\ta \"quoted word\r\n",
    "tsv": b"\xef\xbb\xbfCategory\tText\nacq\ta \"quoted word\n\n",
    "csv": b"Category,Text\r\nacq,\"a \"\"quoted word\"\r\n",
    "jsonl": b"\n{\"Category\": \"acq\", \"Text\": \"a \\\"quoted word\"}\n",
    "json": b"[{\"Category\": \"acq\", \"Text\": \"a \\\"quoted word\"}]",
}  # fmt: skip
BAD = {
    "empty.csv": (b"", "empty.csv: no rows"),
    "header_only.tsv": (b"a\tb\n", "header_only.tsv: no rows"),
    "blank.jsonl": (b"\n \n", "blank.jsonl: no rows"),
    "none.json": (b"[]", "none.json: no rows"),
    "latin.csv": (b"a,b\n1,2\ncaf\xe9,2\n", "latin.csv:3: not UTF-8 (byte 0xe9)"),
    "utf16.tsv": ("a\tb\n".encode("utf-16"), "utf16.tsv:1: not UTF-8"),
    "nul.tsv": (b"a\tb\n1\t2\n1\t\0\n", "nul.tsv:3: a NUL byte"),
    "short.csv": (b"a,b\n1,2\n\n1\n", "short.csv:4: 1 field, but the header has 2 fields"),
    "long.tsv": (b"a\tb\n1\t2\t3\n", "long.tsv:2: 3 fields, but the header has 2 fields"),
    "twice.csv": (b"a,a\n1,2\n", "twice.csv:1: two columns are called 'a'"),
    "open.csv": (b'a,b\n1,2\n"1,2\n', "open.csv:3: not CSV"),
    "after.csv": (b'a,b\n"one\ntwo",2\n"1"x,2\n', "after.csv:4: not CSV"),
    "broken.jsonl": (b'{"a": 1}\n{"a": \n', "broken.jsonl:2: not JSON"),
    "nan.jsonl": (b'{"a": NaN}\n', "nan.jsonl:1: not JSON: NaN"),
    "list.jsonl": (b'{"a": 1}\n[1]\n', "list.jsonl:2: expected an object with columns, got list"),
    "object.json": (b'{"a": 1}', "object.json: expected a list of objects, got dict"),
    "item.json": (b'[{"a": 1}, 2]', "item.json:2: expected an object"),
    "cut.parquet": (b"PAR1 and no more", "cut.parquet: not a parquet file"),
    "plain.tab": (b"a\tb\n1\t2\n3\t4\n", "plain.tab:3: no Orange header"),
    "tiny.tab": (b"a\tb\n", "tiny.tab:3: no Orange header"),
    "odd.xlsx": (b"x", "odd.xlsx: cannot read '.xlsx'; allowed: .tab, .tsv"),
}  # fmt: skip


@pytest.mark.parametrize("ending", GOOD)
def test_every_format_gives_the_same_row(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"good.{ending}"
    path.write_bytes(GOOD[ending])
    table = read_table(path)
    assert table.rows == [{"Category": "acq", "Text": 'a "quoted word'}]


def test_lines_point_at_the_start_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n"one\ntwo",1\n\nthree,2\n')
    table = read_table(path)
    assert table.lines == [2, 5]
    assert table.place(1) == f"{path}:5"


def test_parquet_keeps_types_and_nulls(tmp_path: Path) -> None:
    rows = [{"text": "é\u2028x", "label": 1, "right": True}, {"text": None, "label": 0, "right": False}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").rows == rows


def test_big_fields_and_odd_line_separators(tmp_path: Path) -> None:
    text = "x" * 300_000 + "\u2028\x0b\x85"
    (tmp_path / "a.csv").write_text(f"text,label\n{text},1\n", encoding="utf-8", newline="")
    (tmp_path / "a.tsv").write_text(f"text\tlabel\n{text}\t1\n", encoding="utf-8", newline="")
    for ending in ("csv", "tsv"):
        assert read_table(tmp_path / f"a.{ending}").rows == [{"text": text, "label": "1"}]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str) -> None:
    content, told = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_table(tmp_path / name)
    assert told in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.csv: no such file"):
        read_table(tmp_path / "gone.csv")


@given(st.lists(st.text(st.characters(exclude_characters="\t\n\0", exclude_categories=["Cs"])), min_size=1))
def test_tsv_gives_back_any_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("t") / "a.tsv"
    path.write_bytes("".join(["id\ttext\tend\n", *(f"{i}\t{t}\t.\n" for i, t in enumerate(texts))]).encode())
    assert [row["text"] for row in read_table(path).rows] == texts


@given(st.binary(max_size=60), st.sampled_from(sorted(FORMATS)))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, ending: str) -> None:
    path = tmp_path_factory.mktemp("t") / f"a{ending}"
    path.write_bytes(data)
    try:
        assert read_table(path).rows
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not beside this checkout")
@pytest.mark.parametrize("name", ROWS)
def test_benchmark_files_are_read_whole(name: str) -> None:
    table = read_table(SHARED / name)
    assert len(table.rows) == ROWS[name]
    if name.endswith(".jsonl"):
        last = (SHARED / name).read_text(encoding="utf-8").splitlines()[-1]
        assert table.rows[-1] == json.loads(last)
