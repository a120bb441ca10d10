"""What is made of a trained chain: files, scores, a registered model. No training code reads this."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from cola_core.config.base import Strict

__all__ = ["EvaluateConfig", "MergeConfig", "RegisterConfig"]


class MergeConfig(Strict):
    """Section `merge`: which derived forms are written beside chain.json."""

    checkpoint: bool
    flat_adapter: bool
    portable_adapter: bool


class EvaluateConfig(Strict):
    """Section `evaluate`.

    rows: of the test file, a seeded class-stratified sample, or all of them.
    batch, batch_tokens: rows, and tokens with their padding (null = any number), computed at once at most.
    prefixes: score every prefix of the chain, not only the whole.
    resamples, confidence: of the percentile bootstrap behind every interval.
    """

    rows: int | Literal["all"]
    prefixes: bool
    batch: int = Field(ge=1)
    batch_tokens: int | None = Field(ge=1)
    resamples: int = Field(ge=100)
    confidence: float = Field(gt=0, lt=1)

    @field_validator("rows", mode="before")
    @classmethod
    def _some_rows(cls, value: Any) -> Any:
        if value != "all" and (type(value) is not int or value < 1):
            raise ValueError("needs a whole number of at least 1, or all")
        return value


class RegisterConfig(Strict):
    """Section `register`: the name in MLflow's registry; merged weights are stored only when asked for."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]+$")
    merged: bool
