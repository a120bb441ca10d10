"""What `cola inspect` shows of a file or a prepared folder: counts, and samples with the supervised part marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_core.config.task import PrepareConfig
from cola_core.data.encode import Codec, encode
from cola_core.data.examples import read_examples
from cola_core.data.prepared import sample, summary
from cola_core.files import read_json

__all__ = ["Report", "inspect_file"]

OPEN, CLOSE = "\u27e6", "\u27e7"  # brackets that no data file is likely to hold


@dataclass(frozen=True)
class Report:
    """Plain data: where it comes from, counts per split, and rendered samples (see `data.prepared.sample`)."""

    source: str
    splits: dict[str, dict[str, Any]]
    duplicates: dict[str, Any]
    samples: list[dict[str, Any]]

    def lines(self) -> Iterator[str]:
        """Plain text, one line at a time; what the loss sees stands between \u27e6 and \u27e7."""
        yield self.source
        for name, part in self.splits.items():
            yield f"  {name}: {part['rows']} rows, {part['truncated']} truncated, longest {part['longest']} tokens"
            if part["labels"]:
                yield f"    labels: {_balance(part['labels'])}"
        if self.duplicates:
            yield "  duplicates: " + ", ".join(f"{name} {value}" for name, value in self.duplicates.items())
        for shown in self.samples:
            yield ""
            yield f"{shown['id']} ({_tokens(shown['mask'])}; label or reference: {shown['reference'].strip()!r})"
            yield from f"{shown['prompt']}{_marked(shown['answer'])}".split("\n")


def inspect_file(path: Path, config: PrepareConfig, tokenizer: Any, rows: int, kind: str = "causal") -> Report:
    """Look at a data file through the parameters' templates, or at a folder that stage `prepare` wrote.

    Args:
        path: a file that `cola_core.data.tables` reads, or a prepared folder.
        tokenizer: a fast tokenizer of transformers.
        rows: samples to show, from the beginning.
        kind: of the model: causal, seq2seq or encoder.

    Raises:
        UserError: whatever stage `prepare` would refuse in the file.
    """
    codec = Codec.of(tokenizer, kind)
    return _prepared(path, codec, rows) if path.is_dir() else _raw(path, config, codec, rows)


def _raw(path: Path, config: PrepareConfig, codec: Codec, rows: int) -> Report:
    encoded = encode(read_examples(path, config), config, codec)
    samples = [sample(vars(row), codec) for row in encoded[:rows]]
    return Report(str(path), {path.stem: summary(encoded, config)}, {}, samples)


def _prepared(path: Path, codec: Codec, rows: int) -> Report:
    from cola_core.split_files import read_rows

    manifest = read_json(path / "manifest.json")
    samples = [sample(vars(row), codec) for row in read_rows(path / "train.arrow")[:rows]]
    return Report(str(path), manifest["splits"], manifest["duplicates"], samples)


def _balance(counts: Mapping[str, int]) -> str:
    total = max(sum(counts.values()), 1)
    return ", ".join(f"{label} {count} ({100 * count / total:.1f} %)" for label, count in counts.items())


def _tokens(mask: Sequence[int]) -> str:
    return f"{len(mask)} tokens, {sum(mask)} supervised"


def _marked(answer: str) -> str:
    return f"{OPEN}{answer}{CLOSE}" if answer else ""
