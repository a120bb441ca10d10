"""Strict settings: an unknown key, a wrong type or a value out of range is one line that names its dotted key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from cola_core.errors import UserError, suggest
from cola_core.secrets import mask

__all__ = ["Strict", "parse"]


class Strict(BaseModel):
    """Base of every section: no unknown key, no coercion, no change after reading, no hidden default, no infinity.

    MOVED: key of an earlier version -> where it stands now.
    """

    MOVED: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Strict)


def parse(
    model: type[Model], data: Any, where: str, others: Mapping[str, str] | None = None, file: str = "params.yaml"
) -> Model:
    """Read `data` into `model`.

    Args:
        where: the dotted key under which `data` stands, such as `prepare`.
        others: fields that stand elsewhere, each with the dotted key of its section there, such as `chain.2.link`.
        file: where `data` was read, for messages.

    Raises:
        UserError: the first thing wrong, with its dotted key and what is allowed there.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        advice = "; conf/ has its default" if file == "params.yaml" else ""
        raise UserError(f"{file}: {_line(model, data, error, where, others or {}, advice)}") from None


def _line(
    model: type[Strict], data: Any, error: ValidationError, where: str, others: Mapping[str, str], advice: str
) -> str:
    """One line for the first error, unknown keys first, as they often explain a missing one; `advice` is for that."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path = _keys(first["loc"], data)
    key = ".".join(filter(None, [others.get(path[0], where) if path else where, *path]))
    if first["type"] == "extra_forbidden":
        if moved := _model_at(model, first["loc"][:-1]).MOVED.get(path[-1]):
            return f"{key}: stands under {moved} since version 0.3"
        return f"{key}: unknown key{suggest(path[-1], _fields(model, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{key}: missing{advice}"
    if first["type"] == "literal_error":
        allowed = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{key}: {mask(repr(first['input']), key)} is not a value{suggest(str(first['input']), allowed)}"
    if first["type"].startswith("union_tag"):
        told = first["ctx"].get("tag", first["input"])
        return f"{key}: {mask(repr(told), key)} is not a value{suggest(str(told), _kinds(model, first['loc']))}"
    return f"{key}: {first['msg'].removeprefix('Value error, ')} (got {mask(repr(first['input']), key)})"


def _keys(loc: Sequence[int | str], data: Any) -> list[str]:
    """The keys of `data` that lead to `loc`, in which pydantic names a tagged value's own kind as well."""
    keys = []
    for place, part in enumerate(loc, start=1):
        here = isinstance(part, int) or (isinstance(data, Mapping) and part in data)
        if here or place == len(loc):
            keys.append(str(part))
        data = data[part] if here else data
    return keys


def _fields(model: type[Strict], loc: Sequence[int | str]) -> list[str]:
    """The keys allowed at `loc`."""
    return [field.alias or name for name, field in _model_at(model, loc).model_fields.items()]


def _kinds(model: type[Strict], loc: Sequence[int | str]) -> list[str]:
    """The names that the tagged value at `loc` may have."""
    inner = get_args(_model_at(model, loc[:-1]).model_fields[str(loc[-1])].annotation)
    return [kind for value in inner for kind in _own(value)]


def _own(model: type[Strict]) -> tuple[str, ...]:
    """The names of a tagged value; none for other models."""
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _model_at(model: type[Strict], loc: Sequence[int | str]) -> type[Strict]:
    """The model at `loc`, following nested models, optional ones, tagged ones and mappings of models."""
    for part, tag in zip_longest(loc, loc[1:]):
        field = model.model_fields.get(str(part))
        inner = [field.annotation, *get_args(field.annotation)] if field else []
        models = [k for k in inner if isinstance(k, type) and issubclass(k, Strict)]
        if models:
            model = next((k for k in models if tag in _own(k)), models[0])
    return model
