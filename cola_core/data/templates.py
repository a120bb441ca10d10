"""Sandboxed Jinja over the columns of one row: how a row becomes its prompt and its label."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2 import Template as Compiled
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cola_core.errors import UserError, suggest

__all__ = ["Template", "template"]


def _no_null(value: Any) -> Any:
    """A null must not become the word 'None' in a prompt, nor a missing number 'nan', nor bytes "b'...'"."""
    if value is None or value != value:
        raise UndefinedError("a null value")
    if isinstance(value, bytes):
        raise UndefinedError("bytes where text is needed; store the column as text")
    return value


# A template's last newline is part of the prompt ("Yes or No?\n"), so Jinja must not eat it.
_SANDBOX = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_no_null)
# The same row must give the same prompt every time.
_SANDBOX.globals.pop("lipsum")
_SANDBOX.filters.pop("random")

# What an expression may end in on a row that its author did not think of.
FAILS = (
    TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """A compiled template; `key` is the parameter it stands in, `names` the columns it reads."""

    key: str
    names: frozenset[str]
    compiled: Compiled

    def render(self, row: Mapping[str, Any], place: str) -> str:
        """The text for one row; `{{ row["a column"] }}` reaches a column whose name is no identifier.

        Args:
            place: `file:line` of the row, for messages.

        Raises:
            UserError: an unknown column, a null, or an expression that fails on this row.
        """
        try:
            text = self.compiled.render({"row": row, **row})
            text.encode()
            return text
        except UndefinedError as error:
            raise UserError(f"{place}: {self.key}: {self._reason(row, error)}") from None
        except FAILS as error:
            raise UserError(f"{place}: {self.key}: fails on this row: {_one_line(error)}") from None

    def columns(self, row: Mapping[str, Any]) -> list[str]:
        """The columns of `row` that the template may print, in the row's order."""
        whole = "row" in self.names and "row" not in row
        return [name for name in row if whole or name in self.names]

    def _reason(self, row: Mapping[str, Any], error: UndefinedError) -> str:
        for name in sorted(self.names - row.keys() - {"row"}):
            return f"no column {name!r}{_columns(name, row)}"
        nulls = [name for name in self.columns(row) if row[name] is None or row[name] != row[name]]
        if nulls:
            return f"column {nulls[0]!r} is null here; drop the row or give the template a default"
        return f"{_one_line(error)}; columns: {', '.join(row)}"


@functools.cache
def template(key: str, source: str) -> Template:
    """Compile the template that parameter `key` (such as `prepare.prompt`) holds.

    Raises:
        UserError: a syntax error, with the template's own line.
    """
    try:
        names = meta.find_undeclared_variables(_SANDBOX.parse(source)) - _SANDBOX.globals.keys()
        return Template(key, frozenset(names), _SANDBOX.from_string(source))
    except TemplateSyntaxError as error:
        raise UserError(f"params.yaml: {key}: line {error.lineno} of the template: {_one_line(error)}") from None
    except (TemplateError, RecursionError, SyntaxError) as error:
        raise UserError(f"params.yaml: {key}: {_one_line(error)}") from None


def _columns(name: str, row: Mapping[str, Any]) -> str:
    """Always the columns there are; the close one first, if one is close."""
    hint = suggest(name, row)
    return hint if hint.startswith("; allowed") else f"{hint} columns: {', '.join(row)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
