"""What a saved model folder must and must not hold, for every place that writes one."""

from __future__ import annotations

from pathlib import Path

from cola_core.files import read_json, write_json

__all__ = ["drop_noise"]

# Keys that tell who wrote the file, and not what the model is.
NOISE = ("_name_or_path", "_model_name_or_path", "name_or_path", "transformers_version", "is_local", "local_files_only")


def drop_noise(folder: Path) -> None:
    """Take versions, paths and download options out of what save_pretrained wrote, so that its bytes repeat."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            kept = {key: value for key, value in read_json(folder / name).items() if key not in NOISE}
            write_json(folder / name, kept)
