"""Secrets stay inside: whatever tells a password or a token is masked before it is raised, printed or recorded."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast
from urllib.parse import unquote

__all__ = ["guard", "is_secret", "mask", "masked"]

SHOWN = "***"
KEY = (
    r"(?:token|password|passwd|passphrase|secret|credentials?|(?<=_)pat|(?:api|access|account|private|secret)_?key)"
    r"(?![A-Za-z0-9])"
)
SECRET_KEY = re.compile(KEY, re.IGNORECASE)
LABELS = "prepare.answers."  # below it stand labels of the user's own, no settings
QUOTED = r"""(?:"[^"]*"|'[^']*')"""
# Everything that is printed goes through these, and may be anything: what may begin anywhere is bounded in length.
# The second form has a slash in its password, which no address may have and many a password has; the number of a port
# is none: MLflow's page of a model is http://host:5001/#/models/name@alias.
USERINFO = re.compile(
    r"""(?<=://)(?:[^/\s"'<>]+|(?!(?:(?<=http://)|(?<=https://))[^/\s:@]*:\d{2,5}/)"""
    r"""[^/\s:@"'<>]*:[^\s"'<>,]{0,1000})@"""
)
# `api_key=x` anywhere, in a query too, and `'api_key': 'x'` of a printed mapping; `key: words` is an error line.
ASSIGNED = re.compile(
    rf"""({KEY}[\w\-]{{0,40}}(?:["']?\s*=(?!=)|["']\s*:)\s*)({QUOTED}|[^\s&;,'")\]}}]+)""", re.IGNORECASE
)
OPTION = re.compile(rf"""(?<![\w\-])(--[\w\-]*?{KEY}[ ]+)({QUOTED}|[^\s'"\-]\S*)""", re.IGNORECASE)
BARE = re.compile(r"\b(?:hf|gh[pousr])_[A-Za-z0-9]{20,}")
HEADER = re.compile(r"""(authorization\W{1,4}(?:\w+ )?)[^\s'"]+""", re.IGNORECASE)
WITH_PASSWORD = re.compile(r"(?:[\w+.\-]+://)?(?P<user>[^/\s:@]*)(?::(?P<password>\S+))?@\S+")
SHORTEST = 6  # characters of a secret that is looked for wherever it stands


def is_secret(key: str) -> bool:
    """Whether a dotted key or a variable's name says that its value is one, as `fetch.hub_token` does."""
    return SECRET_KEY.search(key) is not None and not key.startswith(LABELS)


def mask(text: str, key: str = "") -> str:
    """`text` without secrets: all of it under a key such as `hub.token`.

    Else without user info in addresses, values of keys such as `api_key`, tokens of the hubs, and the secrets of this
    process's environment (`HF_TOKEN`, the password in `PIP_INDEX_URL`), wherever they stand.
    """
    if key and is_secret(key):
        return SHOWN
    text = USERINFO.sub(f"{SHOWN}@", text)
    for secret in (ASSIGNED, OPTION, HEADER):
        text = secret.sub(rf"\1{SHOWN}", text)
    text = BARE.sub(SHOWN, text)
    if words := "|".join(re.escape(word) for word in sorted(_known(), key=len, reverse=True)):
        text = re.sub(rf"(?<!\w)(?:{words})(?!\w)", SHOWN, text)
    return text


def masked(value: Any, key: str = "") -> Any:
    """The same for every text in nested mappings and lists, each with its dotted key."""
    if isinstance(value, dict):
        return {name: masked(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [masked(inner, key) for inner in value]
    return mask(value, key) if isinstance(value, str) else SHOWN if value is not None and is_secret(key) else value


def guard() -> None:
    """Mask what this process prints from now on: tracebacks, warnings and loggers of libraries write there too."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Masking):
            setattr(sys, name, cast(TextIO, _Masking(stream)))


class _Line(threading.local):
    """What a thread has written of a line that has not ended: half a secret may stand there."""

    held = ""


class _Masking:
    """A text stream before whose `write` stands `mask`, line by line; a prompt or a progress bar is flushed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = _Line()

    def write(self, text: str) -> int:
        whole = self._line.held + text
        end = max(whole.rfind("\n"), whole.rfind("\r")) + 1
        self._line.held = whole[end:]
        if end:
            self._stream.write(mask(whole[:end]))
        return len(text)

    def flush(self) -> None:
        held, self._line.held = self._line.held, ""
        if held:
            self._stream.write(mask(held))
        self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _known() -> set[str]:
    """The secrets that this process's environment names."""
    return {word for found in _spelled() for word in (found, unquote(found)) if len(word) >= SHORTEST}


def _spelled() -> Iterator[str]:
    for name, value in os.environ.items():
        if is_secret(name):
            yield value
        elif at := WITH_PASSWORD.fullmatch(value):
            yield at["password"] or (at["user"] if "://" in value else "")
