"""The Jinja that templates run in: it reaches nothing, draws nothing at random, and makes nothing without end."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

from jinja2 import StrictUndefined, TemplateRuntimeError, Undefined, UndefinedError
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["LONGEST", "SANDBOX"]

LONGEST = 1_000_000  # characters of one rendered text, and items of what `*` repeats
HIGHEST = 64  # power of `**`


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own sandbox, which bounds `range`, with bounds for `*` and `**`; `%` is here so as not to be folded."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Do what `operator` says, unless it makes too much.

        Raises:
            SecurityError: it would.
        """
        if operator == "**" and isinstance(right, int) and abs(right) > HIGHEST:
            raise SecurityError(f"a power above {HIGHEST}")
        sizes = [len(side) if isinstance(side, Sized) else side for side in (left, right)]
        if operator == "*" and sizes != [left, right] and sizes[0] * sizes[1] > LONGEST:
            raise SecurityError(f"more than {LONGEST:,} characters or items")
        return super().call_binop(context, operator, left, right)


def _finalize(value: Any) -> Any:
    """A null must not become the word 'None', nor a missing number 'nan', nor bytes "b''", nor a method its address."""
    if value is None or value != value:
        raise UndefinedError("a null value")
    if isinstance(value, bytes):
        raise UndefinedError("bytes where text is needed; store the column as text")
    if (callable(value) or isinstance(value, Iterator)) and not isinstance(value, Undefined):
        raise TemplateRuntimeError(f"prints a {type(value).__name__}, not a value; call it, or add `| list | join`")
    return value


# A template's last newline is part of the prompt ("Yes or No?\n"), so Jinja must not eat it. Its optimizer would
# compute constant expressions while it compiles, before any bound is looked at.
SANDBOX = _Sandbox(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_finalize, optimized=False)
for name in ("cycler", "joiner", "lipsum"):  # no template needs them, and the last writes at random
    del SANDBOX.globals[name]
del SANDBOX.filters["random"]
