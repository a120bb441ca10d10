"""A prepared split on disk: an Arrow stream, and behind it a checksum that readers of Arrow do not see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

from cola_core.checksums import checksum
from cola_core.errors import UserError
from cola_core.rows import Row
from cola_core.sealed import damaged

__all__ = ["Split", "read_rows", "write_rows"]

MARK = b"\ncola-xxh3 "
TAIL = len(MARK) + 32  # bytes behind the stream


class Split(Sequence[Row]):
    """One prepared split in its memory-mapped file: a row becomes a Python object only when it is asked for."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return Row(**self.table.slice(index % len(self), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Row]:
        for batch in self.table.to_batches(max_chunksize=1024):
            yield from (Row(**row) for row in batch.to_pylist())


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write rows (anything with the attributes of `Row`) as one record batch; the same rows give the same bytes."""
    import pyarrow as pa

    ids, text = pa.list_(pa.int32()), pa.string()
    schema = pa.schema({"id": text, "prompt": ids, "answer": ids, "label": pa.int32(), "reference": text})
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in schema]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    mark = MARK + checksum(path).encode()
    with path.open("ab") as file:
        file.write(mark)


def read_rows(path: Path) -> Split:
    """Open one prepared split.

    Raises:
        UserError: the file is missing, not a prepared split, or not what was written.
    """
    import pyarrow as pa

    _check(path)
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            table = reader.read_all()  # nothing is copied: the table's buffers are the mapped file
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a prepared split ({error}); restore it with `dvc checkout`") from None
    if set(table.column_names) != {field.name for field in fields(Row)}:
        raise UserError(f"{path}: not a prepared split (columns {', '.join(table.column_names)}); `dvc checkout`")
    return Split(table)


def _check(path: Path) -> None:
    """Compare the stream with the checksum behind it, before anything is made of it."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `dvc repro prepare`, or `dvc checkout`")
    size = path.stat().st_size - TAIL
    with path.open("rb") as file:
        file.seek(max(size, 0))
        tail = file.read()
    if not tail.startswith(MARK):
        raise UserError(f"{path}: not a prepared split of this version, or cut off; `dvc checkout` or `dvc repro` it")
    if tail != MARK + checksum(path, size).encode():
        raise damaged(path)
