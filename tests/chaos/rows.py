"""Data files: seeds of every format, ways to break their rows, and a second reader that tells what was right."""

from __future__ import annotations

import csv
import datetime
import decimal
import functools
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cola_core.assets.tiny import build_tiny
from cola_core.config.base import parse
from cola_core.config.task import PrepareConfig
from cola_core.data.encode import Codec, encode
from cola_core.data.examples import read_examples
from cola_core.data.prepared import write_prepared
from cola_core.data.splits import split
from cola_core.files import new_dir
from cola_core.sealed import write_sealed
from cola_core.split_files import read_rows
from tests.chaos.mutations import mutate, respell

__all__ = ["ANSWERS", "SECTION", "WRITERS", "broken", "codec", "prepare", "seeds", "write_tokenizer"]

ANSWERS = {"acq": " acquisition", "earn": " earnings", "0": " no", "1": " yes", "True": " true"}
SECTION: dict[str, Any] = {
    "kind": "choice", "loss": "answer", "score": "sum", "prompt": "{{ text }}\nTopic:", "label": "{{ label }}",
    "answers": ANSWERS, "extract": None, "max_tokens": 64, "max_new_tokens": 8,
    "train": None, "validation": 1, "probe": 1, "test": 2, "duplicates": "drop_from_train",
}  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"id": i, "text": f"{text} {i}", "label": label}
    for i, (text, label) in enumerate(
        [("oil prices rose", "acq"), ("caf\u00e9 \u201cquoted\u201d", "earn"), ("a, b", "acq"), ("tab less", "1"),
         ("x" * 90, "0"), ("\u6771\u4eac", "True"), ("\U0001f600 up", "earn"), ("last one", "acq"), ("and more", "1")]
    )
]  # fmt: skip


@functools.cache
def codec() -> Codec:
    """A real byte-level tokenizer, of a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder) / "model")
        return Codec.load(Path(folder) / "model")


def write_tokenizer(folder: Path) -> None:
    """What stage `prepare` needs of a base directory."""
    folder.mkdir(parents=True)
    for name, data in _tokenizer().items():
        (folder / name).write_bytes(data)
    write_sealed(folder / "cola.json", "base", {"kind": "causal", "checksums": {}})


@functools.cache
def _tokenizer() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        build_tiny("llama", Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).glob("tokenizer*")}


def prepare(path: Path, **changes: Any) -> None:
    """What the stage does with a training file alone; what it wrote holds the rows that the second reader finds.

    Raises:
        UserError: the file is refused.
    """
    config = parse(PrepareConfig, {**SECTION, **changes}, "prepare")
    splits = split(read_examples(path, config), None, config, 0)
    encoded = {name: encode(part, config, codec()) for name, part in splits.parts().items()}
    with new_dir(path.parent / "out") as folder:
        write_prepared(folder, encoded, config, codec(), [path], splits.duplicate_counts())
    found = {row.id: row.reference for name in splits.parts() for row in read_rows(path.parent / f"out/{name}.arrow")}
    expected = {f"{path.stem}:{i}": str(label).strip() for i, label in enumerate(SECOND[path.suffix](path), 1)}
    assert found.items() <= expected.items(), set(found.items()) - set(expected.items())
    assert len(found) + splits.duplicates.dropped == len(expected)


def seeds(ending: str) -> list[bytes]:
    """Good files of one format."""
    return WRITERS[ending](ROWS)


def broken(ending: str, draw: random.Random) -> bytes:
    """A spoilt file: its rows, its bytes, or both."""
    rows = [respell(ROWS, draw)] if ending in {"json", "jsonl"} and draw.random() < 0.5 else []
    if ending == "parquet" and draw.random() < 0.6:
        return _odd_parquet(draw)
    if rows:
        text = json.dumps(rows[0]) if ending == "json" or not isinstance(rows[0], list) else _json_lines(rows[0])
        return text.encode() if draw.random() < 0.7 else mutate(text.encode(), [], draw)
    files = seeds(ending)
    return mutate(draw.choice(files), files, draw)


def _json_lines(rows: list[Any], plain: bool = True) -> str:
    return "".join(json.dumps(row, ensure_ascii=plain) + "\n" for row in rows)


def _separated(rows: list[dict[str, Any]], mark: str, header: list[str]) -> bytes:
    lines = [mark.join(str(value) for value in row.values()) for row in rows]
    return "".join(f"{line}\n" for line in [*header, *lines]).encode()


def _csv(rows: list[dict[str, Any]]) -> list[bytes]:
    frame = pd.DataFrame(rows)
    styles = ((csv.QUOTE_MINIMAL, "\n"), (csv.QUOTE_ALL, "\r\n"))
    return [frame.to_csv(index=False, quoting=how, lineterminator=end).encode() for how, end in styles]


def _parquet(rows: list[dict[str, Any]]) -> list[bytes]:
    files = []
    for options in (
        {"compression": "none"},
        {"use_dictionary": False},
        {"compression": "zstd", "data_page_version": "2.0"},
    ):
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink, **options)  # type: ignore[arg-type]
        files.append(sink.getvalue())
    return files


def _odd_parquet(draw: random.Random) -> bytes:
    """A whole parquet file with columns of types that no template expects."""
    count = len(ROWS)
    columns = [pa.array([row[name] for row in ROWS]) for name in ROWS[0]]
    odd = [
        pa.array([b"\xff" + bytes([i]) for i in range(count)]),
        pa.array([row["text"] for row in ROWS]).dictionary_encode(),
        pa.array([row["label"] for row in ROWS]).dictionary_encode(),
        pa.array([{"a": {"b": [i]}} for i in range(count)]),
        pa.array([[i, None] for i in range(count)]),
        pa.nulls(count),
        pa.array([[(i, "x")] for i in range(count)], pa.map_(pa.int64(), pa.string())),
        pa.array([2**62 + i for i in range(count)], pa.timestamp("us")),
        pa.array([2**62 + i for i in range(count)], pa.timestamp("ns", "Mars/Olympus")),
        pa.array([2**31 - 1] * count, pa.date32()),
        pa.array([float("nan"), float("inf"), *[1.0] * (count - 2)]),
        pa.array([decimal.Decimal(i) for i in range(count)]),
        pa.array([datetime.timedelta(days=i) for i in range(count)]),
        pa.array([i % 2 == 0 for i in range(count)]),
        pa.array([i % 2 for i in range(count)], pa.uint8()),
        pa.array([None, *["acq"] * (count - 1)]),
    ]
    for _ in range(draw.choice([1, 1, 2])):
        columns[draw.randrange(len(columns))] = draw.choice(odd)
    names = draw.choice([list(ROWS[0]), ["text", "text", "label"], ["row", "text", "label"], ["", "text", "label"]])
    table = pa.Table.from_arrays(columns, names)
    sink = io.BytesIO()
    part = draw.choice([table, table, table.slice(0, 0), table.select([]), table.slice(0, 1)])
    pq.write_table(part, sink, version="2.6", store_schema=draw.random() < 0.8)
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], list[bytes]]] = {
    "tab": lambda rows: [_separated(rows, "\t", ["id\ttext\tlabel", "c\tstring\td", "meta\tmeta\tclass"])],
    "tsv": lambda rows: [_separated(rows, "\t", ["id\ttext\tlabel"])],
    "csv": _csv,
    "jsonl": lambda rows: [
        _json_lines(rows).encode(),
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode(),
    ],
    "json": lambda rows: [json.dumps(rows).encode(), json.dumps(rows, indent=1, ensure_ascii=False).encode()],
    "parquet": _parquet,
}


def _frame(text: str, **options: Any) -> list[Any]:
    return list(pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, index_col=False, **options)["label"])


def _lines(path: Path, skip: range = range(0)) -> list[Any]:
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    kept = [line.removesuffix("\r") for i, line in enumerate(lines) if i not in skip and line.strip()]
    return _frame("\n".join(kept), sep="\t", quoting=3, lineterminator="\n")


def _objects(path: Path) -> list[Any]:
    text = path.read_bytes().decode("utf-8-sig")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.split("\n") if x.strip()]
    return [row["label"] for row in rows]


# Labels of every row, read by other means than the pipeline's.
SECOND: dict[str, Callable[[Path], list[Any]]] = {
    ".tab": lambda path: _lines(path, range(1, 3)),
    ".tsv": _lines,
    ".csv": lambda path: _frame(path.read_bytes().decode("utf-8-sig")),
    ".jsonl": _objects,
    ".json": _objects,
    ".parquet": lambda path: [x for b in pq.ParquetFile(path).iter_batches(3) for x in b.column("label").to_pylist()],
}
