"""Link 0, the root of a chain: which base, by hash, and an encoder's first head; without torch unless there is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_core.files import new_dir, read_json, tree_hash, write_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["base_manifest", "seal", "write_root"]


def base_manifest(path: Path) -> dict[str, Any]:
    """cola.json of a base directory, and under `hash` the hash that names the base in chains."""
    return {**read_json(path / "cola.json"), "hash": tree_hash(path / "cola.json")}


def write_root(folder: Path, base: Path, labels: int, head: dict[str, Tensor]) -> None:
    """Write link 0: the base's reference and hash, and the head that every recipe starts from."""
    manifest = base_manifest(base)
    with new_dir(folder) as temporary:
        if head:
            from safetensors.torch import save_file

            whole = {name: tensor.contiguous() for name, tensor in head.items()}
            save_file(whole, temporary / "head.safetensors", metadata={"format": "pt"})
        reference = {key: manifest[key] for key in ("asset", "hash", "kind", "family")}
        seal(temporary, {"link": 0, "parent": None, "base": reference, "labels": labels})


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Write link.json, after everything else: it names every other file by hash."""
    files = {file.name: tree_hash(file) for file in sorted(folder.iterdir())}
    write_json(folder / "link.json", {**record, "files": files})
