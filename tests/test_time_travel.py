"""What versions 0.1 and 0.2 wrote, as they left it in tests/v0_1 and v0_2, is read or refused with the way out."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from cola_core.checkpoints import load_checkpoint
from cola_core.checksums import check_files
from cola_core.config.params import check_params
from cola_core.config.reading import read_yaml
from cola_core.errors import UserError
from cola_core.lineage import read_chain
from cola_core.root import check_base
from cola_core.rows import Task
from cola_core.sealed import FORMATS, read_sealed
from tasks.places import main_checkout
from tasks.sync import _read, sync

OLD, BEFORE = Path(__file__).parent / "v0_1", Path(__file__).parent / "v0_2"
REFUSED: dict[str, Callable[[], Any]] = {
    "link": lambda: read_chain(OLD / "links/1/adapter"),
    "chain": lambda: read_sealed(OLD / "chain.json", "chain"),
    "ranks": lambda: read_sealed(OLD / "ranks.json", "ranks"),
    "base": lambda: check_base(OLD / "model"),
    "task": lambda: Task.read(OLD / "prepare/task.json"),
    "profile": lambda: read_sealed(OLD / "profile/profile.json", "profile"),
    "manifest": lambda: read_sealed(OLD / "prepare/manifest.json", "manifest"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_artifact_of_the_version_before_is_refused_with_the_way_out(kind: str) -> None:
    with pytest.raises(UserError) as told:
        REFUSED[kind]()
    line = rf"{kind} format 1, and this version of cola reads {FORMATS[kind]}; `dvc repro` makes it again, the version"
    assert re.search(line, str(told.value)) and "\n" not in str(told.value)


@pytest.mark.parametrize("folder", ["data", "profile"])
def test_a_folder_of_the_version_before_is_refused_with_the_way_out(folder: str) -> None:
    """It had no list of its files yet."""
    line = rf"{folder}: has no files\.json: version 0\.1 wrote none, or it is lost; `dvc repro` makes the folder again"
    with pytest.raises(UserError, match=line):
        check_files(OLD / folder)


def test_a_checkpoint_of_the_version_before_is_told_and_left(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "state.safetensors"
    shutil.copy(OLD / path.name, path)
    named = {"q.A": Parameter(torch.zeros(2, 2))}
    assert load_checkpoint(path, named, torch.optim.AdamW(named.values())).step == 0
    assert "not usable (format None, this version reads '2')" in capsys.readouterr().out


def test_a_record_of_the_version_before_is_posted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run has happened: MLflow gets it whatever version of cola posts it."""
    (tmp_path / ".cola/records").mkdir(parents=True)
    shutil.copy(OLD / "record.json", tmp_path / ".cola/records")
    assert _read(OLD / "record.json") == json.loads((OLD / "record.json").read_text())
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    main_checkout.cache_clear()
    try:
        assert (sync(), sync()) == (1, 0)
    finally:
        main_checkout.cache_clear()


def test_parameters_of_the_version_before_name_the_key_that_is_new() -> None:
    with pytest.raises(UserError, match=r"profile\.directions: missing; conf/ has its default"):
        check_params(read_yaml(OLD / "params.yaml"))


def test_the_version_moves_with_the_formats() -> None:
    """Formats may only change where the version does: this table is what 0.3 reads."""
    project = tomllib.loads((OLD.parents[1] / "pyproject.toml").read_text())["project"]
    changed = {kind for kind, number in FORMATS.items() if number == 3}
    assert project["version"].startswith("0.3.") and changed == {"chain", "link", "profile"}
    assert {number for kind, number in FORMATS.items() if kind not in changed} == {2}


@pytest.mark.parametrize("kind", ["chain", "link", "profile"])
def test_what_version_0_2_wrote_is_refused_by_its_format_where_that_has_changed(kind: str) -> None:
    read = {
        "chain": lambda: read_sealed(BEFORE / "chain.json", "chain"),
        "link": lambda: read_chain(BEFORE / "links/1/adapter"),
        "profile": lambda: read_sealed(BEFORE / "profile/profile.json", "profile"),
    }
    with pytest.raises(UserError, match=rf"{kind} format 2, and this version of cola reads 3; `dvc repro` makes it"):
        read[kind]()


def test_what_version_0_2_wrote_is_read_where_it_has_not() -> None:
    assert read_sealed(BEFORE / "ranks.json", "ranks")["ranks"]
    with pytest.raises(UserError, match=r"profile\.directions: missing; conf/ has its default"):
        check_params(read_yaml(BEFORE / "params.yaml"))
