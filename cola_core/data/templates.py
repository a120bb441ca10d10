"""Sandboxed Jinja over the columns of one row: how a row becomes its prompt and its label."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Template as Compiled
from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError, meta

from cola_core.data.sandbox import SANDBOX
from cola_core.errors import UserError, suggest

__all__ = ["Template", "template"]


FAILURES = (
    TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, MemoryError, RecursionError
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
            UserError: an unknown column, a null, an expression that fails on this row, or a text without end.
        """
        try:
            text = self.compiled.render({"row": row, **row})
            text.encode()
        except UndefinedError as error:
            raise UserError(f"{place}: {self.key}: {self._reason(row, error)}") from None
        except FAILURES as error:
            raise UserError(f"{place}: {self.key}: fails on this row: {_one_line(error)}") from None
        return text

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
        names = meta.find_undeclared_variables(SANDBOX.parse(source)) - SANDBOX.globals.keys()
        return Template(key, frozenset(names), SANDBOX.from_string(source))
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
