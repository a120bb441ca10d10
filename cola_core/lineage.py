"""The chain on disk: an ordered list of links over a root base, each committing to its parent by hash; without torch.

Folder k holds link k's adapter and link.json; folder 0 holds the root: which base, and an encoder's first head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cola_core.checksums import check_hashes
from cola_core.config.base import Strict, parse
from cola_core.errors import UserError
from cola_core.files import tree_hash
from cola_core.sealed import read_sealed

if TYPE_CHECKING:
    from cola_core.adapter_files import Adapter

__all__ = ["Link", "check_manifest", "no_adapter", "read_chain", "read_manifest"]

ADAPTER, HEAD = ("adapter_config.json", "adapter_model.safetensors"), "head.safetensors"
QUANTISED = "quantised.safetensors"  # weights of the base that a link replaces


class Base(Strict, extra="ignore"):
    """The base that a chain stands on."""

    asset: str
    hash: str
    kind: Literal["causal", "seq2seq", "encoder"]


class Root(Strict, extra="ignore"):
    """What is read of a root's link.json."""

    link: Literal[0]
    base: Base
    labels: int
    files: dict[str, str]


class Parent(Strict, extra="ignore"):
    """The link that another one was trained on."""

    hash: str


class Section(Strict, extra="ignore"):
    """What is needed later of the section `link`: a global rate goes on from its steps; quantised: one more file."""

    steps: int
    learning_rate: float
    quantise: str = "none"


class Trained(Strict, extra="ignore"):
    """What is read of every other link.json, and copied to chain.json; the knot is read by `verify` alone."""

    link: int = Field(ge=1)
    parent: Parent
    seed: int
    link_section: Section
    kept: bool
    steps: int
    kept_step: int
    tokens: int
    probe_tokens: int
    trainable_parameters: int
    given_ranks: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)  # older links have none
    validation_before: float | None
    validation_loss: float
    files: dict[str, str]


class Entry(Strict, extra="ignore"):
    """One link in chain.json."""

    link: int = Field(ge=1)
    hash: str
    kept: bool
    ranks: dict[str, int]


class Manifest(Strict, extra="ignore"):
    """What is read of chain.json."""

    base: Base
    root: str
    hash: str
    links: list[Entry] = Field(min_length=1)


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

    @property
    def replaces_weights(self) -> bool:
        """Whether the model has weights that are the link's own, quantised, in the place of the base's."""
        return self.kept and QUANTISED in self.record["files"]

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
    told = read_manifest(path)
    if [told["root"], *(link["hash"] for link in told["links"])] != [link.hash for link in chain]:
        raise UserError(f"{path}: tells of another chain than the links beside it; run `dvc repro merge`")


def no_adapter(links: Sequence[Mapping[str, Any]]) -> str | None:
    """Why no adapter of the base gives the chain's model; None where one does.

    Args:
        links: kept, and replaces_weights (not there before format 3), of every link, as in chain.json.
    """
    if not any(link["kept"] for link in links):
        return "no link was kept, so the chain is the base and there is no adapter"
    if any(link.get("replaces_weights") for link in links):
        return "links trained on quantised weights replace the base's, so the chain is a merged checkpoint only"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """chain.json, of which anybody may have written the contents.

    Raises:
        UserError: damaged, or without what every reader of it needs.
    """
    told = read_sealed(path, "chain")
    parse(Manifest, told, "", file=str(path))
    return told


def _read_link(folder: Path) -> Link:
    """A link whose record names every file that is read of it: else its hash would not commit to them."""
    path = folder / "link.json"
    record = read_sealed(path, "link")
    parse(Trained if record.get("link") else Root, record, "", file=str(path))
    check_hashes(folder, record["files"], tree_hash)
    read = list(ADAPTER) if record["link"] else [HEAD] if (folder / HEAD).exists() else []
    if record["link"] and ((folder / QUANTISED).exists() or record["link_section"].get("quantise", "none") != "none"):
        read.append(QUANTISED)
    if unnamed := [name for name in read if name not in record["files"]]:
        raise UserError(f"{path}: files: does not name {unnamed[0]}; train the link again with `dvc repro`")
    return Link(folder, record, tree_hash(path))
