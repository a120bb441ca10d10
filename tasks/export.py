"""Copy one form of the chain, with its model card, to a folder of the user's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_core.checksums import check_files
from cola_core.errors import UserError, suggest
from cola_core.files import new_dir
from tasks.card import card, chain_json
from tasks.context import open_context
from tasks.places import ARTIFACTS

__all__ = ["FORMS", "export"]

FORMS = ("checkpoint", "flat_adapter", "portable_adapter")


def export(directory: Path, form: str) -> Path:
    """Write `directory`, whole or not at all.

    Args:
        form: one of FORMS, as stage `merge` made it.

    Raises:
        UserError: no such form, the form was not made, or something stands at `directory` already.
    """
    if form not in FORMS:
        raise UserError(f"export: no form {form!r}{suggest(form, FORMS)}")
    source = ARTIFACTS / "merge" / form
    if not source.is_dir():
        if form != "checkpoint" and source.parent.is_dir():
            _refuse_adapter(source, chain_json()["links"])
        raise UserError(f"{source}: not there; set merge.{form}: true in params.yaml and run `dvc repro merge`")
    if directory.exists():
        raise UserError(f"{directory}: exists already; export writes new folders only")
    check_files(ARTIFACTS / "merge")
    text = card(open_context("register", None))
    with new_dir(directory) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return directory


def _refuse_adapter(source: Path, links: Sequence[Mapping[str, Any]]) -> None:
    """Say why the chain has no adapter, where it cannot have one."""
    if not any(link["kept"] for link in links):
        raise UserError(f"{source}: not there: no link was kept, so the chain is the base and has no adapter")
    if any(link.get("replaces_weights") for link in links):
        raise UserError(
            f"{source}: not there: links trained on quantised weights put them in the place of the base's, so no "
            "adapter of the base gives the chain's model; export --form checkpoint"
        )
