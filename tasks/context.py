"""What a stage is given and what it gives back: its parameters, with a note of those it read, and what it made."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cola_core.config.base import Strict, parse
from cola_core.config.reading import read_yaml
from cola_core.errors import UserError

__all__ = ["Context", "Done", "open_context"]

Model = TypeVar("Model", bound=Strict)


@dataclass(frozen=True)
class Done:
    """What a stage tells of itself when it has ended well.

    metrics: numbers for the record; inputs, outputs: paths whose hashes tie records together;
    artifacts: files worth keeping with an MLflow run; series: {metric: [[step, value], ...]} curves.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    inputs: Sequence[Path] = ()
    outputs: Sequence[Path] = ()
    artifacts: Sequence[Path] = ()
    series: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass
class Context:
    """The parameters of one stage, and a note of those it read; watched: whether it may log to MLflow meanwhile."""

    stage: str
    key: str | None
    raw: dict[str, Any]
    record_id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    used: dict[str, Any] = field(default_factory=dict)
    watched: bool = True

    def value(self, name: str) -> Any:
        """A top-level value such as `seed`.

        Raises:
            UserError: params.yaml does not have it.
        """
        if name not in self.raw:
            raise UserError(f"params.yaml: {name}: missing")
        self.used[name] = self.raw[name]
        return self.raw[name]

    def section(self, model: type[Model], name: str, key: str | None = None) -> Model:
        """Section `name`, with the changes of link `key` (default: the stage's own link) laid over it.

        Raises:
            UserError: a mistake in the section.
        """
        key = key or self.key
        changes = self.raw["chain"][key].get(name, {}) if key else {}
        data = {**self.value(name), **changes} if changes else self.value(name)
        self.used[name] = data
        return parse(model, data, f"chain.{key}.{name}" if changes else name)


def open_context(stage: str, key: str | None, params: Path = Path("params.yaml")) -> Context:
    """Read and check params.yaml for one stage.

    The whole file is checked, so that a mistake in link 2 is told before link 1 has trained. The checker is imported by
    name: it can only refuse, never change an output, so it is no dependency of the stage in dvc.yaml.

    Raises:
        UserError: any mistake in the file, or a link that the chain does not have.
    """
    raw = read_yaml(params)
    importlib.import_module("cola_core.config.params").check_params(raw)
    if key is not None and key not in raw["chain"]:
        raise UserError(f"params.yaml: chain has no link '{key}'; it has {', '.join(raw['chain'])}")
    return Context(stage=f"{stage}@{key}" if key else stage, key=key, raw=raw)
