"""Wheels that want to write outside their folder, fill the disk, or are damaged: one line, and nothing is left."""

from __future__ import annotations

import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cola_core.assets.wheels import extract
from cola_core.errors import UserError


def packed(*members: tuple[str | zipfile.ZipInfo, bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)

    return make


def garbled(method: int) -> Callable[[Path], None]:
    """An archive of one member whose packed bytes are damaged in their middle."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("pkg/m/a", bytes(range(256)) * 64)
        raw = bytearray(path.read_bytes())
        raw[60:90] = b"\xff" * 30
        path.write_bytes(raw)

    return make


def misspelt(path: Path) -> None:
    """An archive whose member's name says that it is UTF-8, and is not."""
    packed(("pkg/m/\u00e9", b"1"))(path)
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xc3\x28"))


def patched(*changes: tuple[bytes, bytes]) -> Callable[[Path], None]:
    """An archive of one member of 1,024 bytes whose headers then say something else."""

    def make(path: Path) -> None:
        packed(("pkg/m/a", b"\0" * 1024))(path)
        raw = path.read_bytes()
        for old, new in changes:
            assert old in raw
            raw = raw.replace(old, new)
        path.write_bytes(raw)

    return make


def symlink(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


SIZE = struct.pack("<I", 1024)
ARCHIVES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "absolute": (packed(("/etc/x", b"")), "/etc", "leaves its folder"),
    "above": (packed(("../x", b"")), "../x", "leaves its folder"),
    "above, deep": (packed(("pkg/m/a/../../../../x", b"")), "pkg/m", "leaves its folder"),
    "the parent itself": (packed(("..", b"")), "..", "leaves its folder"),
    "the folder itself": (packed((".", b"")), ".", "leaves its folder"),
    "backslashes": (packed(("pkg/m/..\\..\\x", b"")), "pkg/m", "leaves its folder"),
    "a drive": (packed(("C:/x", b"")), "C:", "leaves its folder"),
    "a drive, deep": (packed(("pkg/m/C:x", b"")), "pkg/m", "leaves its folder"),
    "a link": (packed((symlink("pkg/m/x"), b"/etc/passwd")), "pkg/m", "is a link"),
    "a link and what is below it": (packed((symlink("pkg/m"), b"/etc"), ("pkg/m/x", b"")), "pkg/m", "is a link"),
    "twice": (packed(("pkg/m/a", b"1"), ("pkg/m/a", b"2")), "pkg/m", "would be the same file"),
    "twice, by a dot": (packed(("pkg/m/a", b"1"), ("pkg/m/./a", b"2")), "pkg/m", "would be the same file"),
    "twice, by case": (packed(("pkg/m/a", b"1"), ("pkg/m/A", b"2")), "pkg/m", "would be the same file"),
    "twice, by accent": (packed(("pkg/m/\u00e9", b"1"), ("pkg/m/e\u0301", b"2")), "pkg/m", "would be the same file"),
    "a file as folder": (packed(("pkg/m/a", b"1"), ("pkg/m/A/b", b"2")), "pkg/m", "cannot both be"),
    "a bomb": (packed(("pkg/m/a", b"\0" * (1 << 26))), "pkg/m", "are unpacked"),
    "a bomb of many": (packed(*((f"pkg/m/{n}", b"\0" * (1 << 20)) for n in range(32))), "pkg/m", "are unpacked"),
    "a size above the truth": (patched((SIZE, b"\xfe\xff\xff\xff")), "pkg/m", "are unpacked"),
    "a size below the truth": (patched((SIZE, b"\x10\0\0\0")), "pkg/m", "not a whole wheel"),
    "too many": (packed(*((f"pkg/m/{n}", b"") for n in range(10_001))), "pkg/m", "at most 10,000"),
    "too long a name": (packed(("pkg/m/" + "x" * 300, b"")), "pkg/m", "not a whole wheel"),
    "encrypted": (patched((b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")), "pkg/m", "not a whole wheel"),
    "a damaged lzma": (garbled(zipfile.ZIP_LZMA), "pkg/m", "not a whole wheel"),
    "a damaged bzip2": (garbled(zipfile.ZIP_BZIP2), "pkg/m", "not a whole wheel"),
    "a damaged deflate": (garbled(zipfile.ZIP_DEFLATED), "pkg/m", "not a whole wheel"),
    "a name in no alphabet": (misspelt, "pkg/m", "not a whole wheel"),
    "unknown packing": (patched((b"\x14\0\0\0\x08\0", b"\x14\0\0\0\x61\0")), "pkg/m", "not a whole wheel"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ARCHIVES)
def test_a_hostile_archive_is_one_line_and_leaves_nothing_outside(tmp_path: Path, case: str) -> None:
    make, inner, line = ARCHIVES[case]
    make(tmp_path / "bad.whl")
    out = tmp_path / "a" / "b"
    out.mkdir(parents=True)
    with pytest.raises(UserError, match=line) as told:
        extract(tmp_path / "bad.whl", inner, out)
    assert "\n" not in str(told.value)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "bad.whl"]
    assert sum(path.stat().st_size for path in outside) <= 1024 and all(out in path.parents for path in outside)


def test_an_honest_archive_with_many_zeros_is_unpacked(tmp_path: Path) -> None:
    packed(("pkg/m/a", b"\0" * (1 << 23)), ("pkg/m/b/c", b"x"))(tmp_path / "good.whl")
    folder = extract(tmp_path / "good.whl", "pkg/m", tmp_path)
    assert (folder / "a").stat().st_size == 1 << 23 and (folder / "b" / "c").read_bytes() == b"x"


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.whl").write_bytes(b"PK not really")
    with pytest.raises(UserError, match="not a whole wheel"):
        extract(tmp_path / "bad.whl", "x", tmp_path)
