"""Rows of the files people have: Orange .tab, .tsv, .csv, .jsonl, .json and .parquet, strictly read.

Text is UTF-8 (a byte order mark is dropped). .tsv and .tab have no quoting: a field ends at a tab and a row at a
newline, so the bare quotation marks of GLUE's files are text. .csv is quoted as RFC 4180 says. Blank lines are skipped.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_core.errors import UserError

__all__ = ["FORMATS", "Table", "read_table"]

Row = dict[str, Any]
Numbered = tuple[int, list[str]]  # 1-based line on which a row starts, and its fields
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
ORANGE_FLAGS = {"", "class", "c", "meta", "m", "ignore", "i", "weight", "w"}


@dataclass(frozen=True)
class Table:
    """Rows of one file; `lines` holds the 1-based line (.json, .parquet: row) on which each row starts."""

    path: Path
    rows: list[Row]
    lines: list[int]

    def place(self, index: int) -> str:
        """`file:line` of a row, for messages."""
        return f"{self.path}:{self.lines[index]}"


def read_table(path: Path) -> Table:
    """Read every row of a data file.

    Raises:
        UserError: no such file, an unknown ending, not UTF-8, a NUL, a ragged or unparsable row, or no row at all;
            one line with file and line.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{path}: cannot read {suffix or 'a file without an ending'!r}; allowed: {', '.join(FORMATS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    numbered = list(FORMATS[suffix](path))
    if not numbered:
        raise UserError(f"{path}: no rows")
    lines, rows = zip(*numbered, strict=True)
    return Table(path, list(rows), list(lines))


def _text(path: Path) -> str:
    """The whole file as text without its byte order mark."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert the file first") from None
    before, zero, _ = text.partition("\0")
    if zero:
        line = before.count("\n") + 1
        raise UserError(f"{path}:{line}: a NUL byte; the file is not text or is damaged")
    return text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank; only a newline ends one, since str.splitlines would also cut at U+2028 and others."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _with_header(path: Path, numbered: Iterator[Numbered]) -> Iterator[tuple[int, Row]]:
    """Rows under the names of the first one; every row must have as many fields."""
    first, names = next(numbered, (1, []))
    _refuse_twins(names, f"{path}:{first}")
    for line, fields in numbered:
        if len(fields) != len(names):
            raise UserError(f"{path}:{line}: {_fields(len(fields))}, but the header has {_fields(len(names))}")
        yield line, dict(zip(names, fields, strict=True))


def _refuse_twins(names: Iterable[str], where: str) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(f"{where}: two columns are called {twice[0]!r}")


def _fields(number: int) -> str:
    return f"{number} field" + "s" * (number != 1)


def _tsv(path: Path) -> Iterator[tuple[int, Row]]:
    return _with_header(path, ((number, line.split("\t")) for number, line in _lines(path)))


def _tab(path: Path) -> Iterator[tuple[int, Row]]:
    """Orange's header: names, types and flags; the flags tell such a file from a plain table."""
    split = [(number, line.split("\t")) for number, line in enumerate(_text(path).split("\n")[:3], 1)]
    flags = [flag.strip() for flag in split[2][1]] if len(split) == 3 else ["?"]
    if any(flag not in ORANGE_FLAGS and "=" not in flag for flag in flags):
        raise UserError(f"{path}:3: no Orange header (names, types, flags); a plain table is called .tsv")
    body = ((number, line.split("\t")) for number, line in _lines(path) if number > 3)
    names = [field.removesuffix("\r") for field in split[0][1]]
    return _with_header(path, iter([(1, names), *body]))


def _csv(path: Path) -> Iterator[tuple[int, Row]]:
    return _with_header(path, _csv_rows(path))


def _csv_rows(path: Path) -> Iterator[Numbered]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses fields over 128 KiB
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}:{start}: not CSV: {error}") from None
        if fields:
            yield start, fields


def _loads(text: str, where: str) -> Any:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    def whole(pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) < len(pairs):
            _refuse_twins((name for name, _ in pairs), where)
        return row

    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=whole)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    return value


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with columns, got {type(value).__name__}")
    return value


def _jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path):
        where = f"{path}:{number}"
        yield number, _object(_loads(line, where), where)


def _json(path: Path) -> Iterator[tuple[int, Row]]:
    values = _loads(_text(path), str(path))
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of objects, got {type(values).__name__}; one object a line is .jsonl")
    for number, value in enumerate(values, 1):
        yield number, _object(value, f"{path}:{number}")


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa  # 0.2 s that text files need not pay
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        _refuse_twins(table.column_names, str(path))
        rows = table.to_pylist()
    except (pa.ArrowException, ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: not a parquet file that can be read: {reason}") from None
    yield from enumerate(rows, 1)


FORMATS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".tab": _tab,
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
