"""A base directory's tokenizer: by the Rust library alone where transformers would add only seconds of imports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_core.errors import UserError
from cola_core.files import read_json

__all__ = ["Plain", "open_tokenizer"]

PLAIN = "TokenizersBackend"  # transformers' class for "exactly what tokenizer.json says"; others rebuild parts of it

# Keys that make transformers add tokens, encode or decode in other ways than tokenizer.json alone.
MORE = (
    "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder", "split_special_tokens",
    "clean_up_tokenization_spaces",
)  # fmt: skip


class Plain:
    """tokenizer.json as it stands, with the few words of transformers' tokenizers that a codec says."""

    is_fast = True

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self.name_or_path = str(folder)
        self.backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend.no_truncation()
        self.backend.no_padding()
        self.pad_token_id, self.eos_token_id = (self._id(config, name) for name in ("pad_token", "eos_token"))

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> dict[str, Any]:
        """`input_ids`, and `offset_mapping` if asked, of one text or of many."""
        alone = isinstance(text, str)
        found = self.backend.encode_batch([text] if alone else list(text), add_special_tokens=add_special_tokens)
        columns: dict[str, list[Any]] = {"input_ids": [one.ids for one in found]}
        if return_offsets_mapping:
            columns["offset_mapping"] = [one.offsets for one in found]
        return {name: rows[0] if alone else rows for name, rows in columns.items()}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of every id."""
        return [str(self.backend.id_to_token(i)) for i in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def knows(self, config: dict[str, Any]) -> bool:
        """Whether transformers would read no more out of the configuration: no unknown tokens, no other ways."""
        named = [name for name, token in config.items() if name.endswith("_token") and isinstance(token, str | dict)]
        return not any(config.get(key) for key in MORE) and all(self._id(config, n) is not None for n in named)

    def _id(self, config: dict[str, Any], name: str) -> int | None:
        token = config.get(name)
        text = token["content"] if isinstance(token, dict) else token
        return self.backend.token_to_id(text) if text else None


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`: `Plain` where its configuration names no other class, else transformers' own.

    Raises:
        UserError: no tokenizer stands there.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if config.get("tokenizer_class") == PLAIN and (folder / "tokenizer.json").is_file():
        try:
            if (plain := Plain(folder, config)).knows(config):
                return plain
        except Exception as error:  # the Rust library raises nothing more special
            raise UserError(f"{folder / 'tokenizer.json'}: not a tokenizer: {error}") from None
    from transformers import AutoTokenizer  # seconds: paid only where a tokenizer has a class of its own

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # transformers' own text is a page about every format it tried
        raise UserError(f"{folder}: no tokenizer that transformers can read (tokenizer.json)") from None
