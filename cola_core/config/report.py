"""What is made of a trained chain: files, scores, a registered model. No training code reads this."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from cola_core.config.base import Strict

__all__ = ["EvaluateConfig", "MergeConfig", "PromoteConfig", "RegisterConfig"]


class MergeConfig(Strict):
    """Section `merge`: which derived forms are written beside chain.json."""

    checkpoint: bool
    flat_adapter: bool
    portable_adapter: bool


class EvaluateConfig(Strict):
    """Section `evaluate`.

    rows: of the test file, a class-stratified sample that is the same under every seed, or all of them.
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


class PromoteConfig(Strict):
    """Section `promote`: when a challenger becomes the champion.

    level: probability that any promotion is false, over all `uses` of one test set; each use may spend an even share.
    power: with which the rows that are missing would show a gain as large as the one seen.
    loss, calibration_error, f1 (of each label): by how much more than this nothing may have become clearly worse.
    resamples, guard_resamples: of the bootstrap behind the gain's interval, and of those behind the guards'.
    """

    level: float = Field(default=0.05, gt=0, lt=1)
    uses: int = Field(default=40, ge=1)
    power: float = Field(default=0.8, gt=0, lt=1)
    loss: float = Field(default=0.0, ge=0)
    calibration_error: float = Field(default=0.0, ge=0)
    f1: float = Field(default=0.0, ge=0)
    resamples: int = Field(default=20_000, ge=1000)
    guard_resamples: int = Field(default=2000, ge=100)


class RegisterConfig(Strict):
    """Section `register`: the name in MLflow's registry; merged weights are stored only when asked for."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]+$")
    merged: bool
