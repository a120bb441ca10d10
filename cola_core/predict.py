"""A trained chain as a predictor of raw rows: base found by hash, links tied into it, rows rendered as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cola_core.assets.base import base_folder, find_base
from cola_core.chain import tie
from cola_core.checksums import inside
from cola_core.config.base import parse
from cola_core.config.recipe import MachineConfig
from cola_core.config.task import PrepareConfig
from cola_core.data.encode import Codec, encode
from cola_core.data.examples import Example
from cola_core.data.templates import template
from cola_core.errors import RetryError, UserError
from cola_core.evaluation.answers import answer
from cola_core.files import tree_hash
from cola_core.lineage import read_chain
from cola_core.models import load_base, place
from cola_core.rows import Row, Task
from cola_core.scoring import Objective
from cola_core.sealed import read_sealed

__all__ = ["Predictor"]

BATCH = 16


@dataclass(frozen=True)
class Predictor:
    """A model with its task, codec and templates; made by `load` from a folder that names its base by hash."""

    objective: Objective
    codec: Codec
    prepare: PrepareConfig

    @classmethod
    def load(cls, folder: Path) -> Predictor:
        """Build from a served folder: serve.json, task.json, and either links/<k>/adapter or checkpoint/.

        serve.json: {"base": {asset, sha256, hash, kind}, "final": key, "dtype": str, "prepare": section}.

        Raises:
            UserError: the base is not in the cache and its reference no longer gives the same weights.
            RetryError: the base is not in the cache and cannot be fetched now.
        """
        serve, task = read_sealed(folder / "serve.json", "serve"), Task.read(folder / "task.json")
        machine = MachineConfig(device="cpu", threads=torch.get_num_threads(), dtype=serve["dtype"])
        merged = (folder / "checkpoint").is_dir()
        base = folder / "checkpoint" if merged else _base(serve["base"])
        model = load_base(base, machine, len(task.labels))
        if not merged:
            for _ in tie(model, read_chain(inside(folder / "links", serve["final"]) / "adapter")):
                pass
        objective = Objective(place(model, machine), serve["base"]["kind"], task)
        return cls(objective, Codec.load(base), parse(PrepareConfig, serve["prepare"], "prepare"))

    def predict(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The label (choice, classify) or the text as evaluation compares it (generate) of every row, in order.

        Args:
            rows: the task's raw columns, or a finished text under `prompt`, which is never cut.

        Raises:
            UserError: a missing column, a null, or a prompt that is too long, with the number of the row.
        """
        examples = [self._example(row, f"row {number}") for number, row in enumerate(rows, start=1)]
        encoded = encode(examples, self.prepare, self.codec)
        prepared = [Row(row.id, row.prompt, row.answer, row.label, row.reference) for row in encoded]
        return answer(self.objective, prepared, BATCH, self._decode).predicted

    def _decode(self, ids: list[int]) -> str:
        return str(self.codec.tokenizer.decode(ids, skip_special_tokens=True))

    def _example(self, row: Mapping[str, Any], place: str) -> Example:
        """A row without an answer; any label stands in for it, since scoring reads all of them."""
        prompt = template("prepare.prompt", self.prepare.prompt)
        reference = min(self.prepare.answers, default="")
        if "prompt" in row and "prompt" not in prompt.names:
            return Example(place, place, {}, str(row["prompt"]), reference)
        return Example(place, place, dict(row), prompt.render(row, place), reference)


def _base(reference: Mapping[str, str | None]) -> Path:
    """The base by hash from the cache, else by its asset reference, if that still gives the same files."""
    wanted = str(reference["hash"])
    found = find_base(wanted)
    if found is not None:
        return found
    what = f"base model {reference['asset']} ({wanted[:12]}) is not in the cache"
    try:
        fetched = base_folder(str(reference["asset"]), reference["sha256"], str(reference["kind"]))
    except (UserError, RetryError) as error:
        raise type(error)(f"{what} and cannot be fetched: {error}") from None
    if tree_hash(fetched / "cola.json") != wanted:
        raise UserError(f"{what}, and what is fetched now differs from it; use the versions it was made with")
    return fetched
