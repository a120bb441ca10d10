"""Ways to break a file: bytes that disks, editors and transfers spoil, and wrong values."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["WRONG", "header_of", "mutate", "respell", "with_header"]

HUGE = (20_000, 20_000, 20_000, 150_000)  # characters of a huge field: slow for anything quadratic
DEEP = 20_000  # brackets: beyond any parser's stack

# Values of other types than a reader hopes for; those a JSON or YAML text cannot hold are bytes to put into the text.
WRONG: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 1e308, 0.5, "", " ", "0", "no", "null", "nan", "\ud800", "\u2028", "\0",
    "é" * 3, "x" * 5000, [], {}, [[]], {"": None}, {"a": {"b": [1, "c"]}}, ["q", 1, None],
]  # fmt: skip
TOKENS = [
    b"\0", b"\r", b"\n", b"\r\n", b"\t", b",", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b":", b"%", b"<<", b"? ",
    b"- ", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\\udc00", b"\xe2\x80\xa8", b"\x1b[31m",
    b"NaN", b"-1", b"1e999", b"null", b"true", b"9" * 5000, b"0x" + b"f" * 5000, b".nan", b".inf", b"{{", b"}}",
    b"{% if", b"${x}", b"*a", b"&a", b"!!binary x", b"!!bool maybe", b"!!timestamp x", b"2026-99-99",
    b"!!python/name:os.system",
]  # fmt: skip


def mutate(seed: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """One to four changes of `seed`, one of them maybe with bytes of another seed."""
    data = seed
    for _ in range(draw.choice([1, 1, 1, 2, 3, 4])):
        data = draw.choice(CHANGES)(data, draw)
    return _splice(data, draw.choice(others), draw) if others and draw.random() < 0.1 else data


def respell(value: Any, draw: random.Random) -> Any:
    """A copy of nested `value` with one key or element wrong, gone, repeated or renamed; root included."""
    changed = {"root": copy.deepcopy(value)}
    places = list(_places(changed))
    node, key = draw.choice(places)
    how = draw.random()
    if how < 0.6:
        node[key] = copy.deepcopy(draw.choice(WRONG))
    elif how < 0.75 and node is not changed:
        del node[key]
    elif how < 0.9 and isinstance(node, dict) and node is not changed:
        node[f"{key}{draw.choice(['s', ' ', '', chr(0xD800)])}"] = node.pop(key)
    else:
        other, name = draw.choice(places)
        node[key] = copy.deepcopy(other[name])
    return changed["root"]


def header_of(data: bytes) -> tuple[Any, bytes]:
    """The JSON header of a safetensors file, and the bytes of its tensors."""
    [length] = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, rest: bytes) -> bytes:
    """A safetensors file of any header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def _places(node: Any) -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, inner in list(items):
        yield node, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _part(data: bytes, draw: random.Random, most: int = 200) -> slice:
    start = draw.randrange(len(data) + 1)
    return slice(start, min(len(data), start + draw.randint(1, most)))


def _flip(data: bytes, draw: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(draw.randint(1, 8) if data else 0):
        spoilt[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(spoilt)


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _without(data: bytes, draw: random.Random) -> bytes:
    part = _part(data, draw)
    return data[: part.start] + data[part.stop :]


def _twice(data: bytes, draw: random.Random) -> bytes:
    part = _part(data, draw)
    return data[: part.stop] + data[part] * draw.choice([1, 1, 2, 50]) + data[part.stop :]


def _swap(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return b"\n".join(lines)


def _line_twice(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    i = draw.randrange(len(lines))
    return b"\n".join([*lines[: i + 1], lines[i], *lines[i + 1 :]])


def _token(data: bytes, draw: random.Random) -> bytes:
    part, token = _part(data, draw, 8), draw.choice(TOKENS)
    return data[: part.start] + token + data[part.start if draw.random() < 0.5 else part.stop :]


def _huge(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return (
        data[:at] + draw.choice([b"x", b"9", b" a", b"\t", b",", b"\n", "é".encode()]) * draw.choice(HUGE) + data[at:]
    )


def _deep(data: bytes, draw: random.Random) -> bytes:
    at, depth = draw.randrange(len(data) + 1), draw.choice([50, 900, DEEP])
    opening, closing = draw.choice([(b"[", b"]"), (b'{"a":', b"}"), (b"- ", b""), (b"{{ (", b")"), (b'"', b'"')])
    return data[:at] + opening * depth + b"1" + closing * depth + data[at:]


def _bomb(data: bytes, draw: random.Random) -> bytes:
    """Nine levels of YAML aliases: a few hundred bytes that stand for 10^9 values."""
    lines = ["bomb0: &b0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"bomb{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]" for i in range(1, draw.choice([2, 5, 9]))]
    return "\n".join(lines).encode() + b"\n" + data


def _odd(data: bytes, draw: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    name = draw.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "utf-7", "shift_jis"])
    return text.encode(name, "replace")


def _ends(data: bytes, draw: random.Random) -> bytes:
    return data.replace(b"\n", draw.choice([b"\r", b"\r\n", b"\n\n", b"\n\r", b"\x0c\n", b" \n"]))


def _splice(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)] + other[draw.randrange(len(other) + 1) :]


CHANGES: list[Callable[[bytes, random.Random], bytes]] = [
    *[_flip, _cut, _without, _twice, _swap, _line_twice, _token, _token, _token],
    *[_ends, _odd, _deep, _huge, _bomb],
]
