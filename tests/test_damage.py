"""A flipped bit or a missing end is found before it is used, in every artifact, and named."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from cola_core.checkpoints import Progress, load_checkpoint, save_checkpoint
from cola_core.checksums import check_files, inside, seal_folder
from cola_core.errors import RetryError, UserError
from cola_core.export import chain_manifest, flat_adapter, write_flat
from cola_core.files import SUFFIX, new_dir, new_file, read_json, scratch, sweep, write_json
from cola_core.lineage import check_manifest, read_chain
from cola_core.models import load_base, save_merged
from cola_core.rows import Task
from cola_core.sealed import FORMATS, read_sealed, write_sealed
from cola_core.split_files import read_rows, write_rows
from tests.lab import FP32, base_of, chain_of, model_of, rows_of, task_of

CONTENT = {"ranks": {"q": 4, "v": 8}, "advantage": {"q": 0.25, "v": 1.5e-7}, "name": "größer"}


@dataclass(frozen=True)
class Artifact:
    """A file that can be damaged, and who reads it."""

    file: str
    read: Callable[[Path], Any]


ARTIFACTS = {
    "ranks": Artifact("ranks.json", lambda folder: read_sealed(folder / "ranks.json", "ranks")),
    "task": Artifact("task.json", lambda folder: Task.read(folder / "task.json")),
    "split": Artifact("train.arrow", lambda folder: list(read_rows(folder / "train.arrow"))),
    "profile": Artifact("profile/sketch.safetensors", lambda folder: check_files(folder / "profile")),
    "list": Artifact("profile/files.json", lambda folder: check_files(folder / "profile")),
    "adapter": Artifact("links/1/adapter/adapter_model.safetensors", lambda folder: chain_at(folder)),
    "config": Artifact("links/1/adapter/adapter_config.json", lambda folder: chain_at(folder)),
    "link": Artifact("links/1/adapter/link.json", lambda folder: chain_at(folder)),
    "last": Artifact("links/2/adapter/link.json", lambda folder: chain_at(folder)),
    "chain": Artifact("chain.json", lambda folder: check_manifest(folder / "chain.json", chain_at(folder))),
    "flat": Artifact("merge/flat_adapter/adapter_model.safetensors", lambda folder: check_files(folder / "merge")),
    "merged": Artifact("merge/checkpoint/model.safetensors", lambda folder: check_files(folder / "merge")),
    "weights": Artifact("model/model.safetensors", lambda folder: load_base(folder / "model", FP32, 3)),
    "tokens": Artifact("model/tokenizer.json", lambda folder: load_base(folder / "model", FP32, 3)),
    "base": Artifact("model/cola.json", lambda folder: load_base(folder / "model", FP32, 3)),
}


def chain_at(folder: Path) -> Any:
    return read_chain(folder / "links/2/adapter")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of every artifact, as its stage writes it."""
    folder = tmp_path_factory.mktemp("whole")
    chain = chain_of("llama", folder, 2, FP32)
    write_sealed(folder / "chain.json", "chain", chain_manifest(chain, {1: {}, 2: {}}))
    with new_dir(folder / "merge") as merge:
        write_flat(merge / "flat_adapter", flat_adapter(chain))
        save_merged(model_of("llama", chain, FP32), FP32, base_of("llama"), ["a"], merge / "checkpoint")
        seal_folder(merge)
    write_sealed(folder / "ranks.json", "ranks", CONTENT)
    write_sealed(folder / "task.json", "task", asdict(task_of("llama")))
    write_rows(folder / "train.arrow", rows_of("llama", 20))
    with new_dir(folder / "profile") as profile:
        (profile / "sketch.safetensors").write_bytes(bytes(range(256)) * 8)
        seal_folder(profile)
    shutil.copytree(base_of("llama"), folder / "model")
    return folder


@pytest.mark.parametrize("kind", ARTIFACTS)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_and_missing_end_is_found(kind: str, whole: Path, data: st.DataObject) -> None:
    artifact = ARTIFACTS[kind]
    path = whole / artifact.file
    before = path.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    after = bytearray(before)
    if data.draw(st.booleans()):
        after[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del after[place:]
    path.write_bytes(bytes(after))
    try:
        if path.suffix == ".json" and _same(before, bytes(after)):
            return  # white space: nothing was changed that anyone reads
        with pytest.raises(UserError) as told:
            artifact.read(whole)
        assert "\n" not in str(told.value) and any(part in str(told.value) for part in (path.name, "links/"))
    finally:
        path.write_bytes(before)
    artifact.read(whole)


def _same(before: bytes, after: bytes) -> bool:
    import json

    try:
        return bool(json.loads(before) == json.loads(after))
    except ValueError:
        return False


def test_a_sealed_file_reads_as_it_was_written(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", "ranks", CONTENT)
    assert read_sealed(tmp_path / "a.json", "ranks") == {**CONTENT, "format": FORMATS["ranks"]}
    again = tmp_path / "b.json"
    write_sealed(again, "ranks", {**read_json(tmp_path / "a.json")})
    assert again.read_bytes() == (tmp_path / "a.json").read_bytes()


@pytest.mark.parametrize("found", [1, 4, "3", None])
def test_another_format_is_refused_with_the_way_out(found: Any, tmp_path: Path) -> None:
    path = tmp_path / "chain.json"
    write_sealed(path, "chain", {})
    content = read_json(path)
    write_json(path, {**content, "format": found} if found != 1 else {"hash": "of version 0.1"})
    with pytest.raises(UserError, match=r"chain\.json: chain format .*this version of cola reads 3; `dvc repro`"):
        read_sealed(path, "chain")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\\b", "..", "a\0b"])
def test_a_stranger_cannot_name_a_file_outside_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="outside itself"):
        inside(tmp_path, name)
    write_sealed(tmp_path / "files.json", "files", {"files": {name: "0"}})
    with pytest.raises(UserError, match="outside itself"):
        check_files(tmp_path)
    chain = chain_of("llama", tmp_path, 1, FP32)
    record = read_json(chain[1].folder / "link.json")
    write_sealed(chain[1].folder / "link.json", "link", {**record, "files": {name: "0"}})
    with pytest.raises(UserError, match="outside itself"):
        read_chain(chain[1].folder)


FORGED: dict[str, Any] = {
    "files": None, "files.list": [], "files.none": {}, "files.half": {"adapter_config.json": "0"}, "link": "1",
    "link.minus": -1, "parent": None, "parent.hash": {"link": 0}, "base": {}, "base.kind": {"kind": "x"}, "kept": "no",
    "link_section": {}, "steps": 1.5, "seed": None,
    "labels": "2",
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_link_behind_a_valid_seal_is_one_line(case: str, tmp_path: Path) -> None:
    chain, key = chain_of("llama", tmp_path, 1, FP32), case.split(".")[0]
    link = chain[0 if key in ("base", "labels") else 1]
    for record in ({**link.record, key: FORGED[case]}, {k: v for k, v in link.record.items() if k != key}):
        write_sealed(link.folder / "link.json", "link", record)
        with pytest.raises(UserError, match=r"(link|adapter_config)\.json: "):
            read_chain(link.folder)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_chain_commits_to_every_file_that_is_read_of_it(family: str, tmp_path: Path) -> None:
    chain = chain_of(family, tmp_path, 1, FP32)
    files = [chain[1].folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    for path in [*files, *chain[0].folder.glob("head.safetensors")]:
        record = read_json(path.parent / "link.json")
        left = {name: digest for name, digest in record["files"].items() if name != path.name}
        write_sealed(path.parent / "link.json", "link", {**record, "files": left})
        with pytest.raises(UserError, match=f"files: does not name {path.name}"):
            read_chain(path.parent)
        write_sealed(path.parent / "link.json", "link", record)
    assert read_chain(chain[1].folder)[1].hash == chain[1].hash


@pytest.mark.parametrize("files", [None, [], "x", {"é" * 200: "0"}])
def test_a_forged_list_of_files_is_one_line(files: Any, tmp_path: Path) -> None:
    write_sealed(tmp_path / "files.json", "files", {"files": files})
    with pytest.raises(UserError, match=r"its list of files is no object|of 200 characters; refused"):
        check_files(tmp_path)


@pytest.mark.parametrize("change", [{"links": []}, {"links": None}, {"root": 1}, {"links": [{"link": "../../x"}]}])
def test_a_forged_manifest_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    chain = chain_of("llama", tmp_path, 1, FP32)
    told = {**chain_manifest(chain, {1: {}}), **change}
    write_sealed(tmp_path / "chain.json", "chain", told)
    with pytest.raises(UserError, match=r"chain\.json: (links|root)"):
        check_manifest(tmp_path / "chain.json", chain)


def test_a_damaged_checkpoint_is_told_and_the_link_starts_anew(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"q.A": Parameter(torch.randn(3, 4)), "q.B": Parameter(torch.randn(4, 3))}
    optimizer = torch.optim.AdamW(named.values())
    sum((p.sum() for p in named.values()), torch.zeros(())).backward()
    optimizer.step()
    path = tmp_path / "state.safetensors"
    saved = Progress(step=3, losses=[{"step": 3}], random={"cpu": torch.get_rng_state()}, best={"q.A": torch.ones(2)})
    save_checkpoint(path, saved, named, optimizer)
    assert load_checkpoint(path, named, optimizer).step == 3 and not capsys.readouterr().out
    before = path.read_bytes()
    for place in range(0, len(before), 97):
        after = bytearray(before)
        after[place] ^= 16
        path.write_bytes(bytes(after))
        assert load_checkpoint(path, named, optimizer).step == 0, place
        assert capsys.readouterr().out.count("state.safetensors: not usable") == 1
    path.write_bytes(before)
    assert load_checkpoint(path, {"other": named["q.A"]}, optimizer).step == 0
    monkeypatch.setattr("cola_core.checkpoints.safe_open", _too_many)
    with pytest.raises(RetryError, match="Too many open files"):  # it may be whole: nothing may overwrite it
        load_checkpoint(path, named, optimizer)


def _too_many(*_: object, **__: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


def test_a_killed_writers_folder_goes_with_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / f".prepare.abc{SUFFIX}"
    left.mkdir()
    (left / "half").touch()
    (tmp_path / ".somebody.else.tmp").touch()
    with scratch(tmp_path, "other") as mine:
        assert not left.exists() and sweep(tmp_path) == [] and mine.exists(), "a living writer's folder stays"
        with new_file(tmp_path / "a") as temporary:
            temporary.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".somebody.else.tmp", "a"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/old").touch()
    (tmp_path / "file").write_text("old")
    for target in (new_dir(tmp_path / "folder"), new_file(tmp_path / "file")):
        with pytest.raises(ZeroDivisionError), target:
            raise ZeroDivisionError
    assert (tmp_path / "folder/old").exists() and (tmp_path / "file").read_text() == "old"
    with new_dir(tmp_path / "folder") as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
