"""Files from the Hugging Face hub, through huggingface_hub and its own local cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cola_core.errors import RetryError, UserError

__all__ = ["MODEL_FILES", "dataset_file", "snapshot"]

# All that a model is made of: settings, safetensors and tokenizer. No pickle and no code is ever downloaded.
MODEL_FILES = (
    "config.json", "generation_config.json",
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def snapshot(repo: str, revision: str) -> Path:
    """The folder of a model repository at `revision`, with MODEL_FILES only; its name is the commit.

    Raises:
        UserError: no such repository or revision, or no permission to read it.
        RetryError: the hub cannot be reached and the local cache does not have it.
    """
    return _cached_or_online(_model_files, repo, revision)


def dataset_file(repo: str, revision: str, name: str) -> Path:
    """One file of a dataset repository at `revision`.

    Raises:
        UserError: no such repository, revision or file, or no permission to read it.
        RetryError: the hub cannot be reached and the local cache does not have it.
    """
    from huggingface_hub import hf_hub_download

    return _cached_or_online(hf_hub_download, repo, revision, filename=name, repo_type="dataset")


def _model_files(repo: str, revision: str, local_files_only: bool = False, endpoint: str | None = None) -> str:
    """huggingface_hub's snapshot_download, which returns an unfinished folder too; here only what the hub confirms."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options: dict[str, Any] = {"local_files_only": local_files_only, "endpoint": endpoint}
    folder: str = snapshot_download(repo, revision=revision, allow_patterns=list(MODEL_FILES), **options)
    if not _whole(Path(folder)):
        if local_files_only:
            raise LocalEntryNotFoundError(f"{folder}: unfinished")
        HfApi(endpoint=endpoint).model_info(repo, revision=revision)  # fails where the hub was not reached above either
    return folder


def _whole(folder: Path) -> bool:
    """Whether a snapshot has its settings and all its weights; the local cache also keeps unfinished ones."""
    names = {"config.json", "model.safetensors"}
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            names = {"config.json", *json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, LookupError, TypeError, AttributeError):
            return False
    return all((folder / name).is_file() for name in names)


def _cached_or_online(download: Callable[..., Any], repo: str, revision: str, **options: Any) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    where = f"hub:{repo}@{revision}"
    try:
        with suppress(LocalEntryNotFoundError):
            return Path(download(repo, revision=revision, local_files_only=True, **options))
        print(f"downloading {where}", flush=True)
        with _online():
            return Path(download(repo, revision=revision, endpoint=os.environ.get("HF_ENDPOINT"), **options))
    except (OSError, HTTPError, HFValidationError) as error:
        raise _refusal(where, error) from None


def _refusal(where: str, error: Exception) -> UserError | RetryError:
    """What the user can mend, told apart from a hub that does not answer; the first that fits counts."""
    from huggingface_hub import errors

    lines: dict[type[Exception], str] = {
        errors.GatedRepoError: "accept its terms on the hub and log in with `hf auth login`",
        errors.RemoteEntryNotFoundError: "the repository has no such file",
        errors.RevisionNotFoundError: "the hub has this repository, but no such revision",
        errors.RepositoryNotFoundError: "the hub has no such repository, or it is private (`hf auth login`)",
        errors.HFValidationError: "not a name that the hub could have",
    }
    line = next((line for kind, line in lines.items() if isinstance(error, kind)), None)
    if line is not None:
        return UserError(f"{where}: {line}")
    return RetryError(f"{where}: the hub cannot be reached and the local cache does not have it; try again")


@contextmanager
def _online() -> Iterator[None]:
    """Stages run with HF_HUB_OFFLINE=1, which huggingface_hub copies at import; lift it for one download."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
