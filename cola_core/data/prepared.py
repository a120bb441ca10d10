"""The folder that stage `prepare` writes: four Arrow files, task.json for programs, manifest.json for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_core.config.task import PrepareConfig
from cola_core.data.encode import Codec, Encoded, candidate_ids
from cola_core.data.examples import label_counts
from cola_core.files import tree_hash
from cola_core.sealed import write_sealed
from cola_core.split_files import write_rows

__all__ = ["sample", "summary", "write_prepared"]

SAMPLES = 2


def write_prepared(
    folder: Path,
    splits: Mapping[str, Sequence[Encoded]],
    config: PrepareConfig,
    codec: Codec,
    raw: Sequence[Path],
    duplicates: Mapping[str, int],
) -> dict[str, Any]:
    """Write every file of artifacts/prepare into `folder`.

    Args:
        splits: train, validation, test and probe.
        raw: the files that rows came from; their hashes stand in the manifest.
        duplicates: counts of `Splits.duplicate_counts`.

    Returns:
        The manifest.
    """
    for name, rows in splits.items():
        write_rows(folder / f"{name}.arrow", rows)
    manifest = {
        "splits": {name: summary(rows, config) for name, rows in splits.items()},
        "files": {path.name: tree_hash(path) for path in raw},
        "duplicates": {**duplicates, "policy": config.duplicates},
        "probe": [row.id for row in splits["probe"]],
        "samples": [sample(vars(row), codec) for row in splits["train"][:SAMPLES]],
    }
    write_sealed(folder / "task.json", "task", _task(config, codec))
    write_sealed(folder / "manifest.json", "manifest", manifest)
    return manifest


def _task(config: PrepareConfig, codec: Codec) -> dict[str, Any]:
    """task.json: how rows are trained and scored; label indices follow the sorted label names."""
    return {
        "kind": config.kind,
        "loss": config.loss,
        "score": config.score,
        "labels": sorted(config.answers),
        "candidates": candidate_ids(config, codec),
        "pad": codec.pad,
        "end": codec.end,
        "start": codec.start,
        "max_new_tokens": config.max_new_tokens,
        "extract": config.extract,
    }


def summary(rows: Sequence[Encoded], config: PrepareConfig) -> dict[str, Any]:
    """Counts of one split: rows, truncated prompts, rows per label, and the longest row in tokens."""
    return {
        "rows": len(rows),
        "truncated": sum(row.truncated for row in rows),
        "labels": label_counts((row.reference for row in rows), config),
        "longest": max((len(row.prompt) + len(row.answer) for row in rows), default=0),
    }


def sample(row: Mapping[str, Any], codec: Codec) -> dict[str, Any]:
    """One row as a person reads it: its texts, its tokens, and 1 where a token is supervised.

    Args:
        row: the columns of a prepared split.
    """
    ids = [*row["prompt"], *row["answer"]]
    decode = codec.tokenizer.decode
    return {
        "id": row["id"],
        "prompt": decode(row["prompt"]),
        "answer": decode(row["answer"]),
        "reference": row["reference"],
        "tokens": [decode([i]) for i in ids],
        "mask": [0] * len(row["prompt"]) + [1] * len(row["answer"]),
    }
