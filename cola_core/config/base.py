"""Strict settings: an unknown key, a wrong type or a value out of range is one line that names its dotted key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cola_core.errors import UserError, suggest

__all__ = ["Strict", "parse", "read_yaml"]


class Strict(BaseModel):
    """Base of every section: no unknown key, no coercion, no change after reading, no hidden default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], data: Any, where: str) -> Model:
    """Read `data` into `model`.

    Args:
        where: the dotted key under which `data` stands, such as `chain.2.link`.

    Raises:
        UserError: the first thing wrong, with its dotted key and what is allowed there.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"params.yaml: {_line(model, error, where)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: missing, unreadable or not a mapping, with the line where YAML knows it.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys and values, got {type(value).__name__}")
    return value


def _line(model: type[BaseModel], error: ValidationError, where: str) -> str:
    """One line for the first error; unknown keys come first, since they often explain a missing one."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    key = ".".join(filter(None, [where, *path]))
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{suggest(path[-1], _fields(model, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{key}: missing"
    if first["type"] == "literal_error":
        allowed = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{key}: {first['input']!r} is not a value{suggest(str(first['input']), allowed)}"
    return f"{key}: {first['msg'].removeprefix('Value error, ')} (got {first['input']!r})"


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
