"""The Jinja that templates run in: it reaches nothing, draws nothing at random, and no expression fills the memory.

Bounded are numbers, what `+`, `*` and `~` make, what is joined, replaced, filled up or printed; of the methods and
filters that make a text as wide as a number says, the filters alone are there. Not bounded are the time and memory of
loops within loops: for a container nested in itself again and again, or for `tojson`, `pprint` and `sum` of what they
made before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import wraps
from typing import Any

from jinja2 import (
    Environment,
    StrictUndefined,
    TemplateRuntimeError,
    Undefined,
    UndefinedError,
    pass_environment,
    pass_eval_context,
)
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.filters import do_format, do_round, do_tojson, make_attrgetter
from jinja2.nodes import Concat, EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["SANDBOX"]

LONGEST = 1_000_000  # characters of one text, and items of one list
BITS = 10_000  # of one whole number; Python prints none that is longer
WORK = 10 * LONGEST  # characters or items that a filter makes at most
# Methods that make as much as a number or a table says. Bytes are for `decode` alone.
WIDE = {"center", "encode", "expandtabs", "format", "format_map", "ljust", "rjust", "to_bytes", "translate", "zfill"}
WIDE_FILTERS = ("batch", "center", "indent", "slice", "wordwrap")


class _Code(CodeGenerator):
    """Jinja's own, with a bound for `~`."""

    def visit_Concat(self, node: Concat, frame: Frame) -> None:  # noqa: N802 -- Jinja's name
        """Join the parts as the whole text is joined."""
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own sandbox, which bounds `range`, with bounds for operators, methods and the whole text."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Code

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Do what `operator` says, unless it makes too much.

        Raises:
            SecurityError: it would.
        """
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("`%` on a text; `~` joins, and `'%.2f' | format(x)` shortens a number")
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(operator, left, right)
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _check(len(left) + len(right))
        elif operator == "*" and (isinstance(left, Sized) or isinstance(right, Sized)):
            many, times = (left, right) if isinstance(left, Sized) else (right, left)
            _check(len(many) * times)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Jinja's own rule, without the methods of texts and numbers that make more than they are given."""
        wide = (isinstance(obj, str | int) and attr in WIDE) or (isinstance(obj, bytes) and attr != "decode")
        return not wide and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Jinja would make `format` safe before it asks `is_safe_attribute`, but not short."""

    def call(self, context: Context, obj: Any, /, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """Call an object, the two methods of a text that may make too much as the filters of that name."""
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(text, str) and name in ("join", "replace"):
            return self.filters["join"](self, *args, text) if name == "join" else _replace(text, *args)
        return super().call(context, obj, *args, **options)

    def concat(self, parts: Iterable[str]) -> str:
        """How Jinja joins what a template, a macro or a block prints.

        Raises:
            SecurityError: too long a text.
        """
        made, size = [], 0
        for part in parts:
            made.append(part)
            _check(size := size + len(part))
        return "".join(made)


def _check(size: int, most: int = LONGEST) -> None:
    if size > most:
        raise SecurityError(f"more than {most:,} characters or items")


def _check_bits(operator: str, left: int, right: int) -> None:
    bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    if bits > BITS:
        raise SecurityError(f"a number of more than {BITS:,} bits")


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _check(text.count(old) * len(new))
    return str(text.replace(old, new, -1 if count is None else count))


@pass_environment
def _join(environment: Environment, items: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        items = map(make_attrgetter(environment, attribute), items)
    return SANDBOX.concat([text for item in items for text in (str(d), str(item))][1:])


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    _check_bits("**", 10, abs(precision))
    return do_round(value, precision, method)


def _format(value: Any, *args: Any, **options: Any) -> str:
    """`'%.2f' | format(x)`, with widths that are written out."""
    text = str(value)
    if "*" in text:
        raise SecurityError("a width `*`; write the number")
    widths = [int(number) for number in re.findall(r"\d{1,9}", text)]
    _check(text.count("%") * max([*widths, *(len(str(one)) for one in (*args, *options.values()))], default=0), WORK)
    return do_format(value, *args, **options)


def _filled(filled: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that makes at most as much as its two largest arguments multiplied."""

    @wraps(filled)
    def bounded(*args: Any, **options: Any) -> Any:
        sizes = [len(one) if isinstance(one, Sized) else one for one in (*args, *options.values())]
        _check(math.prod(sorted(size for size in sizes if isinstance(size, int))[-2:]), WORK)
        return filled(*args, **options)

    return bounded


@pass_eval_context
def _tojson(context: EvalContext, value: Any) -> str:
    return do_tojson(context, value)


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
BOUNDED: dict[str, Callable[..., Any]] = {name: _filled(SANDBOX.filters[name]) for name in WIDE_FILTERS}
BOUNDED |= {"format": _format, "join": _join, "replace": _replace, "round": _round, "tojson": _tojson}
SANDBOX.filters.update(BOUNDED)
