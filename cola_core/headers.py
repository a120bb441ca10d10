"""What a safetensors file tells without its tensors, and without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cola_core.errors import UserError

__all__ = ["parameters", "whole"]


def parameters(path: Path) -> int:
    """Elements of all its tensors.

    Raises:
        UserError: missing, or not a whole safetensors file.
    """
    with whole(path), safe_open(path, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Tell in one line what is wrong with the file that the block reads.

    Raises:
        UserError: missing, or not a whole safetensors file.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc checkout`") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); restore it with `dvc checkout`") from None
