"""Copy one form of the chain, with its model card, to a folder of the user's."""

from __future__ import annotations

import shutil
from pathlib import Path

from cola_core.checksums import check_files
from cola_core.errors import UserError, suggest
from cola_core.files import new_dir
from cola_core.lineage import no_adapter
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
        merged = form != "checkpoint" and source.parent.is_dir()
        if merged and (reason := no_adapter(chain_json()["links"])):
            raise UserError(f"{source}: not there: {reason}; export --form checkpoint")
        raise UserError(f"{source}: not there; set merge.{form}: true in params.yaml and run `dvc repro merge`")
    if directory.exists():
        raise UserError(f"{directory}: exists already; export writes new folders only")
    check_files(ARTIFACTS / "merge")
    text = card(open_context("register", None))
    with new_dir(directory) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return directory
