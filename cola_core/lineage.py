"""The chain on disk: an ordered list of links over a root base, each committing to its parent by hash; without torch.

Folder k holds link k's adapter and link.json; folder 0 holds the root: which base, and an encoder's first head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_core.errors import UserError
from cola_core.files import tree_hash
from cola_core.sealed import damaged, inside, read_sealed

if TYPE_CHECKING:
    from cola_core.adapter_files import Adapter

__all__ = ["Link", "check_manifest", "read_chain"]


@dataclass(frozen=True)
class Link:
    """One folder of the chain; `record` is link.json, `hash` commits to it, its files and all its ancestors."""

    folder: Path
    record: dict[str, Any]
    hash: str

    @property
    def number(self) -> int:
        """0 for the root."""
        return int(self.record["link"])

    @property
    def kept(self) -> bool:
        """Whether the link is part of the model; one that its policy dropped only keeps its place in the chain."""
        return bool(self.record.get("kept", True))

    def adapter(self) -> Adapter:
        """The adapter's files, read."""
        from cola_core.adapter_files import read_adapter

        return read_adapter(self.folder)


def read_chain(folder: Path) -> list[Link]:
    """Every link from the root to the one in `folder` (`links/<k>/adapter`), walked by parent, never globbed.

    Raises:
        UserError: a link is missing or changed, or its parent is not the one it was trained on.
    """
    link = _read_link(folder)
    chain = [link]
    while link.number > 0:
        parent = _read_link(folder.parent.parent / str(link.number - 1) / folder.name)
        if parent.hash != link.record["parent"]["hash"]:
            raise UserError(
                f"{link.folder}: was trained on another link {parent.number} "
                f"({link.record['parent']['hash'][:12]}, found {parent.hash[:12]}); run `dvc repro`"
            )
        chain.append(parent)
        link = parent
    return chain[::-1]


def check_manifest(path: Path, chain: Sequence[Link]) -> None:
    """Compare chain.json with the links themselves.

    Raises:
        UserError: damaged, or of another chain.
    """
    told = read_sealed(path, "chain")
    if [told["root"], *(link["hash"] for link in told["links"])] != [link.hash for link in chain]:
        raise UserError(f"{path}: tells of another chain than the links beside it; run `dvc repro merge`")


def _read_link(folder: Path) -> Link:
    record = read_sealed(folder / "link.json", "link")
    for name, expected in record["files"].items():
        path = inside(folder, name)
        if not path.is_file() or tree_hash(path) != expected:
            raise damaged(path)
    return Link(folder, record, tree_hash(folder / "link.json"))
