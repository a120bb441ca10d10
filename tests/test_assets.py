"""Assets: wheels made here, folders, a hub served on loopback; every refusal is one line and leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_core.assets.base import base_folder, find_base
from cola_core.assets.references import opened
from cola_core.assets.tiny import build_tiny
from cola_core.assets.wheels import _refusal, extract
from cola_core.errors import RetryError, UserError
from cola_core.files import sweep, tree_hash
from tasks.context import Context
from tasks.fetch import main

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


def link_member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "member",
    [
        "pkg/model/../../../evil.txt",
        "pkg/model/sub/../../../../evil.txt",
        "pkg/model/..\\..\\evil.txt",
        link_member("pkg/model/evil.txt"),
    ],
    ids=str,
)
def test_a_member_that_leaves_its_folder_is_refused(tmp_path: Path, member: Any) -> None:
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr(member, "/etc/passwd")
        archive.writestr("pkg/model/config.json", "{}")
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(UserError, match="is a link or leaves its folder"):
        extract(tmp_path / "bad.whl", "pkg/model", tmp_path / "a" / "b")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "bad.whl"]


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.whl").write_bytes(b"PK not really")
    with pytest.raises(UserError, match="not a whole wheel"):
        extract(tmp_path / "bad.whl", "x", tmp_path)


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


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as huggingface_hub needs to download a repository of small files."""

    folder: Path

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith(("/api/models/org/name/revision/", "/api/datasets/org/rows/revision/")):
            if path.endswith(("/main", COMMIT)):
                self.answer(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode(), {})
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": tree_hash(f)[:40]}
                for f in self.folder.iterdir()
            ]
            self.answer(200, json.dumps(entries).encode(), {})
        elif "/resolve/" in path and (file := self.folder / path.rsplit("/", 1)[1]).is_file():
            self.answer(200, file.read_bytes(), {"ETag": f'"{tree_hash(file)[:40]}"', "X-Repo-Commit": COMMIT})
        else:
            code = "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
            self.answer(404, b"{}", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A hub on loopback that serves one folder, while huggingface_hub believes it is to stay offline."""
    from huggingface_hub import constants

    Hub.folder = tmp_path / "served"
    build_tiny("llama", Hub.folder)
    (Hub.folder / "pytorch_model.bin").write_bytes(b"\x80pickle")
    (Hub.folder / "modeling.py").write_text("raise SystemExit")
    (Hub.folder / "train.csv").write_text("a\n1\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_model_comes_without_pickles_or_code_and_then_without_network(
    hub: ThreadingHTTPServer, cache: Path
) -> None:
    folder = base_folder("hub:org/name@main", None, "causal")
    manifest = json.loads((folder / "cola.json").read_text())
    assert manifest["note"] == f"commit {COMMIT}"
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(manifest["files"])
    downloaded = {file.name for file in (cache.parent / "hf").rglob("*")}
    assert "config.json" in downloaded and not {"pytorch_model.bin", "modeling.py"} & downloaded
    hub.shutdown()
    hub.server_close()
    shutil.rmtree(cache / "models")
    assert json.loads((base_folder("hub:org/name@main", None, "causal") / "cola.json").read_text()) == manifest


def shards(folder: Path) -> None:
    """Name two shards in an index; only the first one is there."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors").rename(folder / names[0])
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


UNFINISHED: dict[str, Callable[[Path], None]] = {
    "no settings": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a shard short": shards,
}


@pytest.mark.parametrize("reached", [True, False])
@pytest.mark.parametrize("fault", UNFINISHED)
def test_an_unfinished_snapshot_is_finished_or_may_be_tried_again(
    hub: ThreadingHTTPServer, cache: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reached: bool
) -> None:
    """As downloads of single files leave it: without the hub's list of what the repository holds."""
    with opened("hub:org/name@main") as path:
        copy = shutil.copytree(
            path.parents[2], cache.parent / "copy", symlinks=True, ignore=shutil.ignore_patterns("trees")
        )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(copy))
    [folder] = copy.glob("models--*/snapshots/*")
    UNFINISHED[fault](folder)
    if reached:
        assert (base_folder("hub:org/name@main", None, "causal") / "model.safetensors").is_file()
        return
    hub.shutdown()
    hub.server_close()
    with pytest.raises(RetryError, match="the hub cannot be reached"):
        base_folder("hub:org/name@main", None, "causal")


def test_a_finished_snapshot_in_shards_needs_no_network(hub: ThreadingHTTPServer, cache: Path) -> None:
    shards(Hub.folder)
    shutil.copyfile(Hub.folder / "model-00001-of-00002.safetensors", Hub.folder / "model-00002-of-00002.safetensors")
    with opened("hub:org/name@main") as path:
        online = path
    hub.shutdown()
    hub.server_close()
    with opened("hub:org/name@main") as path:
        assert path == online and len(list(path.glob("*.safetensors"))) == 2


def test_a_file_of_a_hub_dataset(hub: ThreadingHTTPServer) -> None:
    with opened("hub:datasets/org/rows@main/train.csv", hashlib.sha256(b"a\n1\n").hexdigest()) as path:
        assert path.read_text() == "a\n1\n" and path.suffix == ".csv"
    with pytest.raises(UserError, match="the repository has no such file"), opened("hub:datasets/org/rows@main/no.csv"):
        pass


@pytest.mark.parametrize(
    ("asset", "line"), [("hub:org/name@v9", "but no such revision"), ("hub:org/nothing@main", "no such repository")]
)
def test_mistakes_that_the_hub_tells_are_one_line(hub: ThreadingHTTPServer, asset: str, line: str) -> None:
    with pytest.raises(UserError, match=line), opened(asset):
        pass


def test_a_hub_that_does_not_answer_may_be_tried_again(hub: ThreadingHTTPServer) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(RetryError, match="the hub cannot be reached"), opened("hub:org/name@main"):
        pass


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
