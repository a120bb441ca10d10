"""Link 0, the root of a chain: which base, by hash, and an encoder's first head; without torch unless there is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_core.checksums import check_files
from cola_core.files import new_dir, tree_hash
from cola_core.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["base_manifest", "check_base", "seal", "write_root"]


def base_manifest(path: Path) -> dict[str, Any]:
    """cola.json of a base directory, and under `hash` the hash that names the base in chains."""
    return {**read_sealed(path / "cola.json", "base"), "hash": tree_hash(path / "cola.json")}


def check_base(path: Path, weights: bool = True) -> dict[str, Any]:
    """`base_manifest`, once the base's files are found to be what was fetched.

    Raises:
        UserError: the first file that is missing or changed.
    """
    manifest = base_manifest(path)
    sums = manifest["checksums"].items()
    check_files(path, {name: value for name, value in sums if weights or not name.endswith(".safetensors")})
    return manifest


def write_root(folder: Path, base: Path, labels: int, head: dict[str, Tensor]) -> None:
    """Write link 0: the base's reference and hash, and the head that every recipe starts from."""
    manifest = base_manifest(base)
    with new_dir(folder) as temporary:
        if head:
            from cola_core.tensors import save_tensors

            save_tensors(temporary / "head.safetensors", head)
        reference = {key: manifest[key] for key in ("asset", "hash", "kind", "family")}
        seal(temporary, {"link": 0, "parent": None, "base": reference, "labels": labels})


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Write link.json, after everything else: it names every other file by hash."""
    files = {file.name: tree_hash(file) for file in sorted(folder.iterdir())}
    write_sealed(folder / "link.json", "link", {**record, "files": files})
