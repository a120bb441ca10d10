"""Assets: wheels made here and folders; every refusal is one line and leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_core.assets.base import base_folder, find_base
from cola_core.assets.references import opened
from cola_core.assets.tiny import build_tiny
from cola_core.assets.wheels import _refusal
from cola_core.errors import RetryError, UserError
from cola_core.files import sweep, tree_hash
from tasks.context import Context
from tasks.fetch import main

ROOT = Path(__file__).parent.parent


def make_wheel(folder: Path, members: dict[str, bytes], version: str = "1.0") -> str:
    """Write the wheel of tiny-data==version; returns its sha256."""
    path = folder / f"tiny_data-{version}-py3-none-any.whl"
    about = f"tiny_data-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tiny-data\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return tree_hash(path)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole package index, whatever this machine's pip settings say."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def kept(cache: Path) -> list[str]:
    """What the cache holds, locks aside."""
    return sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.suffix not in ("", ".lock"))


def test_a_file_and_a_folder_of_a_wheel_and_again_without_any_index(index: Path, cache: Path) -> None:
    digest = make_wheel(index, {"pkg/data/train.csv": b"a,b\n", "pkg/data/deep/x.txt": b"x", "pkg/other.txt": b"o"})
    with opened("pypi:tiny-data==1.0/pkg/data/train.csv", digest) as path:
        assert path.name == "train.csv" and path.read_bytes() == b"a,b\n"
    for file in index.iterdir():
        file.unlink()
    with opened("pypi:tiny-data==1.0/pkg/data", digest) as path:
        assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*.*")) == ["deep/x.txt", "train.csv"]
    assert kept(cache) == [f"wheels/{digest}.whl"]


def test_a_wheel_with_another_hash_is_refused_and_removed(index: Path, cache: Path) -> None:
    digest = make_wheel(index, {"pkg/train.csv": b"tampered"})
    line, asset = f"sha256 is {digest}, not the pinned {'0' * 64}; it was removed", "pypi:tiny-data==1.0/pkg/train.csv"
    with pytest.raises(UserError, match=line), opened(asset, "0" * 64):
        pass
    assert kept(cache) == []


def test_a_wheel_without_a_pinned_hash_is_refused_and_the_hash_told(index: Path, cache: Path) -> None:
    digest = make_wheel(index, {"pkg/train.csv": b""})
    line, asset = f"sha256 is null; .* write {digest}", "pypi:tiny-data==1.0/pkg/train.csv"
    with pytest.raises(UserError, match=line), opened(asset):
        pass
    assert kept(cache) == []


def test_a_damaged_copy_in_the_cache_is_downloaded_again(index: Path, cache: Path) -> None:
    digest = make_wheel(index, {"pkg/train.csv": b"good"})
    asset = "pypi:tiny-data==1.0/pkg/train.csv"
    with opened(asset, digest):
        (cache / "wheels" / f"{digest}.whl").write_bytes(b"half a wh")
    with opened(asset, digest) as path:
        assert path.read_bytes() == b"good"


@pytest.mark.parametrize(
    ("asset", "line"),
    [
        ("pypi:tiny-data==1.0/pkg/data/trian.csv", "no member 'pkg/data/trian.csv'; did you mean 'pkg/data/train.csv'"),
        ("pypi:tiny-data==1.0/pgk/data", "no member 'pgk/data'; did you mean 'pkg/data'"),
        ("pypi:tiny-data==1.1/pkg/data", "no such version; did you mean '1.0'"),
        ("pypi:tiny-date==1.0/pkg/data", "the index has no wheel of this name"),
        ("pypi:tiny-data/pkg/data", "expected pypi:distribution==version/inner/file"),
        ("pyp:tiny-data==1.0/pkg", "begins with a scheme; did you mean 'pypi'"),
        ("hub:org/name", "expected hub:org/name@revision"),
        ("hub:datasets/org/name@main", "expected hub:datasets/org/name@revision/file"),
        ("tiny:lama", "no such family; did you mean 'llama'"),
        ("model.gguf", "begins with a scheme"),
    ],
)
def test_mistakes_in_a_reference_are_one_line(index: Path, asset: str, line: str) -> None:
    digest = make_wheel(index, {"pkg/data/train.csv": b"", "pkg/data/test.csv": b""})
    with pytest.raises(UserError) as told, opened(asset, digest if asset.startswith("pypi") else None):
        pass
    assert line in str(told.value) and "\n" not in str(told.value) and len(str(told.value)) < 250


def test_an_index_that_does_not_answer_may_be_tried_again(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    for name, value in {"CONFIG_FILE": os.devnull, "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RetryError, match=r"no package index can be reached"), opened("pypi:tiny-data==1.0/x", "0" * 64):
        pass
    assert kept(cache) == []


@pytest.mark.parametrize("line", ["ERROR: Could not install packages due to an OSError: {}", "OSError: {}", "x {}\n\n"])
def test_a_disk_that_pip_finds_full_may_be_tried_again(line: str) -> None:
    told = _refusal("a==1", "Collecting a\n" + line.format("[Errno 28] No space left on device"))
    assert isinstance(told, RetryError) and str(told).startswith("pypi:a==1: the disk: No space left on device")


@pytest.mark.parametrize("line", ["[Errno 13] Permission denied: '/x'", "[Errno 99999] odd", "Errno 28 is no number"])
def test_what_else_pip_says_is_told(line: str) -> None:
    told = _refusal("a==1", f"ERROR: {line}\n")
    assert isinstance(told, UserError) and str(told) == f"pypi:a==1: pip says: ERROR: {line}"


def test_what_a_killed_pip_leaves_goes_with_its_folder(cache: Path, tmp_path: Path) -> None:
    """Killed while an index that takes connections says nothing."""
    (temporary := tmp_path / "tmp").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = {
            "PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/simple",
            "PIP_CONFIG_FILE": os.devnull,
        }
        mine = {**os.environ, **settings, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
        program = "from cola_core.assets.references import opened\nwith opened('pypi:a==1/x', '0' * 64): pass"
        child = subprocess.Popen([sys.executable, "-c", program], env=mine, start_new_session=True)
        silent.settimeout(60)
        silent.accept()
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert list(cache.rglob("pip-*")) and not list(temporary.iterdir())
    sweep(cache / "wheels")
    assert not list(cache.rglob("pip-*"))


def test_what_is_not_pinned_tells_how_to_pin_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.csv").write_text("a\n1\n")
    name = f"path:{tmp_path / 'rows.csv'}"
    with opened(name) as path:
        assert capsys.readouterr().out == f"{name}: not pinned; to pin it, write sha256: {tree_hash(path)}\n"
    with opened(name, tree_hash(tmp_path / "rows.csv")):
        assert capsys.readouterr().out == ""


def test_paths_are_taken_relative_to_the_checkout_and_checked_by_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("a\n1\n")
    digest = hashlib.sha256(b"a\n1\n").hexdigest()
    for asset in ("path:rows.csv", f"path:{tmp_path / 'rows.csv'}"):
        with opened(asset, digest) as path:
            assert path.read_text() == "a\n1\n"
    with pytest.raises(UserError, match="not the pinned"), opened("path:rows.csv", "0" * 64):
        pass
    with pytest.raises(UserError, match=r"did you mean 'rows.csv'"), opened("path:row.csv"):
        pass


def test_a_base_is_made_once_repaired_when_damaged_and_found_by_hash(cache: Path) -> None:
    folder = base_folder("tiny:llama@3", None, "causal")
    manifest = json.loads((folder / "cola.json").read_text())
    assert manifest["family"] == "llama" and manifest["kind"] == "causal" and manifest["asset"] == "tiny:llama@3"
    assert manifest["files"] == {f.name: tree_hash(f) for f in folder.iterdir() if f.name != "cola.json"}
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert base_folder("tiny:llama@3", None, "causal") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    digest = tree_hash(folder / "cola.json")
    assert find_base(digest) == folder and find_base("0" * 64) is None
    (folder / "model.safetensors").write_bytes(b"half")
    assert find_base(digest) is None
    assert tree_hash(base_folder("tiny:llama@3", None, "causal") / "cola.json") == digest
    assert find_base(digest) == folder


def broken(folder: Path, fault: str) -> None:
    """A model folder that must be refused."""
    build_tiny("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    if fault == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif fault == "code":
        change = {"model_type": "my_own", "auto_map": {"AutoModel": "modeling.MyOwn"}}
        (folder / "config.json").write_text(json.dumps(config | change))
    else:
        (folder / fault).unlink()
        (folder / "tokenizer_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("pickle", "pickled weights are never loaded"),
        ("code", "a model's own code is never run"),
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer files"),
    ],
)
def test_a_folder_that_cannot_be_a_base_is_refused(tmp_path: Path, cache: Path, fault: str, line: str) -> None:
    broken(tmp_path / "model", fault)
    with pytest.raises(UserError, match=line):
        base_folder(f"path:{tmp_path / 'model'}", None, "causal")
    assert kept(cache) == []


def test_a_base_of_another_kind_is_refused(cache: Path) -> None:
    with pytest.raises(UserError, match=r"'t5' is not of kind 'causal'; .*seq2seq"):
        base_folder("tiny:t5", None, "causal")
    assert kept(cache) == []


def params_for(folder: Path, train: str) -> dict[str, Any]:
    """params.yaml in `folder`: the committed one, with a tiny model and the user's own rows."""
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    model = {"kind": "causal", "asset": "tiny:gpt2", "sha256": None}
    params["fetch"] = {"model": model, "data": {"train": {"asset": train, "sha256": None}, "test": None}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return params


def test_the_stage_writes_both_folders_the_same_way_twice(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.CSV").write_text("a\n1\n")
    monkeypatch.chdir(tmp_path)
    hashes = []
    for _ in range(2):
        main(Context(stage="fetch", key=None, raw=params_for(tmp_path, "path:rows.CSV")))
        hashes.append(tree_hash(tmp_path / "artifacts"))
        shutil.rmtree(cache)
    assert hashes[0] == hashes[1]
    assert sorted(f.name for f in (tmp_path / "artifacts/fetch/data").iterdir()) == ["files.json", "train.csv"]
    assert (tmp_path / "artifacts/fetch/model/cola.json").is_file()


def test_the_stage_ends_with_2_and_one_line_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.pkl").write_bytes(b"")
    params_for(tmp_path, "path:rows.pkl")
    command, environment = [sys.executable, "-m", "tasks.fetch"], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "fetch: path:rows.pkl: not a data file; allowed: tab, tsv, csv, jsonl, json, parquet"
    assert done.returncode == 2 and not [p for p in (tmp_path / "artifacts").rglob("*") if p.name != "fetch"]


@pytest.mark.slow
def test_the_default_model_is_converted_to_known_bytes_and_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the user's own cache: a download and 15 s the first time, 3 s afterwards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.delenv("COLA_CACHE")
    model = yaml.safe_load((ROOT / "conf/model/smollm2_135m.yaml").read_text())["fetch"]["model"]
    try:
        folder = base_folder(**model)
    except RetryError as error:
        pytest.skip(str(error))
    manifest = json.loads((folder / "cola.json").read_text())
    assert manifest["note"] == "Q4_1 and Q8_0 weights dequantised to fp32"
    assert manifest["files"]["model.safetensors"].startswith("a672150fb4f99d7c")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(base.generate(**ids, max_new_tokens=4, do_sample=False)[0])
