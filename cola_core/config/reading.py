"""YAML as DVC reads it, and what is wrong with a file in one line."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from cola_core.errors import UserError

__all__ = ["load_yaml", "read_yaml"]

MOST = 100_000  # values of a file after its aliases are written out; params.yaml has about 130
WIDE = 2**63  # beyond it torch, Arrow and SQLite know no integer
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
