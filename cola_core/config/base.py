"""Strict settings: an unknown key, a wrong type or a value out of range is one line that names its dotted key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cola_core.errors import UserError, suggest
from cola_core.secrets import mask

__all__ = ["Strict", "load_yaml", "parse", "read_yaml"]


class Strict(BaseModel):
    """Base of every section: no unknown key, no coercion, no change after reading, no hidden default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Model = TypeVar("Model", bound=BaseModel)


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and truth values, which DVC reads and writes: 1e-4 is a number, `no` and 1:30 are texts."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A leading zero is no octal."""
        text = node.value.replace("_", "")
        return int(text, 10 if text.lstrip("+-").isdigit() else 0)


SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in SCALARS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for scalar, (pattern, starts) in SCALARS.items():
    Loader.add_implicit_resolver(scalar, re.compile(rf"(?:{pattern})\Z"), list(starts))
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def parse(model: type[Model], data: Any, where: str, others: Mapping[str, str] | None = None) -> Model:
    """Read `data` into `model`.

    Args:
        where: the dotted key under which `data` stands, such as `prepare`.
        others: fields that stand elsewhere, each with the dotted key of its section there, such as `chain.2.link`.

    Raises:
        UserError: the first thing wrong, with its dotted key and what is allowed there.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"params.yaml: {_line(model, error, where, others or {})}") from None


def load_yaml(text: str) -> Any:
    """The value of a YAML text, as DVC reads it."""
    return yaml.load(text, Loader)  # noqa: S506 -- a SafeLoader  # nosec B506


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: missing, unreadable or not a mapping, with the line where YAML knows it.
    """
    try:
        value = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys and values, got {type(value).__name__}")
    return value


def _line(model: type[BaseModel], error: ValidationError, where: str, others: Mapping[str, str]) -> str:
    """One line for the first error; unknown keys come first, since they often explain a missing one."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    key = ".".join(filter(None, [others.get(path[0], where) if path else where, *path]))
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{suggest(path[-1], _fields(model, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{key}: missing"
    if first["type"] == "literal_error":
        allowed = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{key}: {mask(repr(first['input']), key)} is not a value{suggest(str(first['input']), allowed)}"
    return f"{key}: {first['msg'].removeprefix('Value error, ')} (got {mask(repr(first['input']), key)})"


def _fields(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at `loc`, following nested models, optional ones and mappings of models."""
    for part in loc:
        field = model.model_fields.get(str(part))
        kinds = [field.annotation, *get_args(field.annotation)] if field else []
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if inner is None:
            continue
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]
