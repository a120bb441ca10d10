"""What holds for every file of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def own_environment() -> Iterator[None]:
    """What a file's tests leave in the environment is not the next file's: MLflow keeps its address there."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
