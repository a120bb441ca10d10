"""Strict settings: an unknown key, a wrong type or a value out of range is one line that names its dotted key."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cola_core.errors import UserError, suggest
from cola_core.secrets import mask

__all__ = ["Strict", "load_yaml", "parse", "read_yaml"]


MOST = 100_000  # values of a file after its aliases are written out; params.yaml has about 130
WIDE = 2**63  # beyond it torch, Arrow and SQLite know no integer


class Strict(BaseModel):
    """Base of every section: no unknown key, no coercion, no change after reading, no hidden default, no infinity.

    MOVED: key of an earlier version -> where it stands now.
    """

    MOVED: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Strict)
LONE = re.compile("[\ud800-\udfff]")


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and truth values, which DVC reads and writes: 1e-4 is a number, `no` and 1:30 are texts.

    Where YAML would take the last of two values, run out of memory or break off, it refuses in one line.
    """

    def get_single_node(self) -> yaml.Node | None:
        """The document, once it is known that writing out its aliases comes to an end."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _size(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; PyYAML's own constructors fail in many ways on a text that their tag does not fit."""
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise _refused(node, f"{str(node.value)[:50]!r} is no {node.tag.rpartition(':')[2]}") from None
        if isinstance(value, str) and not value.isascii() and LONE.search(value):
            raise _refused(node, "half of a surrogate pair is no character")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Keys and values, no key twice."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((key for key, count in keys.items() if count > 1), None):
            raise _refused(node, f"the key {twice!r} stands here twice")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A leading zero is no octal."""
        text = node.value.replace("_", "")
        value = int(text, 10 if text.lstrip("+-").isdigit() else 0)
        if not -WIDE <= value < WIDE:
            raise _refused(node, "an integer of more than 64 bits")
        return value


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


def load_yaml(text: str, where: str = "params.yaml") -> dict[str, Any]:
    """The keys and values of a YAML text, as DVC reads it.

    Raises:
        UserError: not YAML or not a mapping, with the line where YAML knows it.
    """
    try:
        value = yaml.load(text, Loader)  # noqa: S506 -- a SafeLoader  # nosec B506
    except RecursionError:
        raise UserError(f"{where}: not YAML: nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected keys and values, got {type(value).__name__}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: missing, unreadable or not a mapping, with the line where YAML knows it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return load_yaml(text, str(path))


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


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below `node` when its aliases are written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise _refused(node, "an alias stands inside what it stands for")
        return known[id(node)]
    known[id(node)] = 0
    inner = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = (part for entry in inner for part in (entry if isinstance(entry, tuple) else [entry]))
    known[id(node)] = size = 1 + sum(_size(part, known) for part in parts)
    if size > MOST:
        raise _refused(node, f"more than {MOST} values")
    return size


def _refused(node: yaml.Node, reason: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=reason, problem_mark=node.start_mark)
