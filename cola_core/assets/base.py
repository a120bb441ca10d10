"""The base model as a folder of files, kept once per reference in the cache, complete and checked by hash."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cola_core.assets.cache import cache_root, locked
from cola_core.assets.hub import MODEL_FILES
from cola_core.assets.references import opened
from cola_core.checksums import check_hashes, checksum
from cola_core.errors import UserError, suggest
from cola_core.files import new_dir, read_json, tree_hash
from cola_core.sealed import read_sealed, write_sealed

__all__ = ["base_folder", "find_base", "keep_base"]

# The class of transformers that a kind is loaded with, by the name of its table of architectures.
TABLES = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "encoder": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


# Raise it when cola.json or the conversion changes: folders that older code left in the cache are then made anew.
FORMAT = 3


def base_folder(asset: str, sha256: str | None, kind: str) -> Path:
    """The folder of the base model: config.json, safetensors, tokenizer files and cola.json. Never write into it.

    Made once (a GGUF file is converted), found again without network afterwards; a damaged copy is made anew.

    Args:
        kind: causal, seq2seq or encoder.

    Raises:
        UserError: the reference is wrong, or what it names has no safetensors, needs its own code, or is another kind.
        RetryError: the index or the hub cannot be reached and no cache has it.
    """
    content = sha256 or (asset if asset.startswith("tiny:") else None)  # a random model is what its name says
    known = _folder(asset, kind, content) if content is not None else None
    if known is not None and _whole(known):
        return known
    with opened(asset, sha256) as source:
        folder = known or _folder(asset, kind, _content(source))
        with locked(folder):
            if not _whole(folder):
                _make(source, folder, asset, kind)
    return folder


def find_base(digest: str) -> Path | None:
    """A folder of the cache whose cola.json has this sha256 (`tree_hash`), or None: for a server without a checkout."""
    for manifest in sorted((cache_root() / "models").glob("*/cola.json")):
        if tree_hash(manifest) == digest and _whole(manifest.parent):
            return manifest.parent
    return None


def keep_base(source: Path) -> Path:
    """Put a base directory that came from elsewhere (such as DVC's cache) where `find_base` looks; free if it is there.

    Raises:
        UserError: a file of `source` is missing or changed.
    """
    digest = tree_hash(source / "cola.json")
    if known := find_base(digest):
        return known
    if not _whole(source):
        raise UserError(f"{source}: a file is missing or changed since it was fetched; restore it with `dvc checkout`")
    target = cache_root() / "models" / digest[:32]
    with locked(target), new_dir(target) as folder:
        for file in sorted(source.iterdir()):
            shutil.copyfile(file, folder / file.name)
    return target


def _folder(asset: str, kind: str, content: str) -> Path:
    """One folder per reference, content and converter: what transformers writes may change with its version."""
    key = json.dumps([FORMAT, asset, kind, content, version("transformers"), version("torch"), version("gguf")])
    return cache_root() / "models" / hashlib.sha256(key.encode()).hexdigest()[:32]


def _content(source: Path) -> str:
    """What distinguishes two contents under one reference; a hub snapshot's folder is named by its commit."""
    return source.name if source.parent.name == "snapshots" else tree_hash(source)


def _whole(folder: Path) -> bool:
    try:
        check_hashes(folder, read_sealed(folder / "cola.json", "base")["files"], tree_hash)
    except UserError:
        return False  # missing, damaged, or of another version: it is made anew
    return True


def _make(source: Path, folder: Path, asset: str, kind: str) -> None:
    with new_dir(folder) as temporary:
        note = _fill(source, temporary)
        config = _check(temporary, asset, kind)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors writes 0600
        files = sorted(temporary.iterdir())
        content = {"asset": asset, "kind": kind, "family": config["model_type"], "note": note}
        content["files"] = {file.name: tree_hash(file) for file in files}
        content["checksums"] = {file.name: checksum(file) for file in files}  # sha256 would cost every stage seconds
        content["modules"] = _modules(temporary, kind)
        write_sealed(temporary / "cola.json", "base", content)


def _modules(folder: Path, kind: str) -> dict[str, list[int]]:
    """(out, in) of everything that can be adapted, so that stages without a probe need no torch."""
    from cola_core.models import module_shapes

    return module_shapes(folder, kind)


def _fill(source: Path, folder: Path) -> str | None:
    """Write the model's files; returns what a reader should know about them."""
    if source.suffix == ".gguf":
        from cola_core.assets.gguf import convert_gguf

        print(f"converting {source.name} to safetensors in fp32", flush=True)
        return convert_gguf(source, folder)
    for file in sorted(source.iterdir() if source.is_dir() else []):
        if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in MODEL_FILES):
            shutil.copyfile(file, folder / file.name)
    return f"commit {source.name}" if source.parent.name == "snapshots" else None


def _check(folder: Path, asset: str, kind: str) -> dict[str, Any]:
    """Refuse what transformers could not load as `kind` from safetensors with its own code; returns the config."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{asset}: no config.json, so not a model that transformers can load")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{asset}: no model.safetensors; pickled weights are never loaded, convert them first")
    if not any(folder.glob("token*")) and not any(folder.glob("vocab*")):
        raise UserError(f"{asset}: no tokenizer files beside the weights")
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    config: dict[str, Any] = read_json(folder / "config.json")
    family = config.get("model_type")
    if family not in CONFIG_MAPPING:
        raise UserError(f"{asset}: model_type {family!r} is not in transformers; a model's own code is never run")
    fitting = [name for name, table in TABLES.items() if family in getattr(modeling_auto, table)]
    if kind not in fitting:
        raise UserError(f"{asset}: model_type {family!r} is not of kind {kind!r}{suggest(kind, fitting)}")
    return config
