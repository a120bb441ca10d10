# ruff: noqa: F811  a fixture comes from test_assets
"""Models and data of a hub served on loopback: without pickles or code, then without network."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_assets import cache  # noqa: F401  a fixture

from cola_core.assets.base import base_folder
from cola_core.assets.references import opened
from cola_core.assets.tiny import build_tiny
from cola_core.errors import RetryError, UserError
from cola_core.files import tree_hash

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
