"""The task: which model and files, how a row becomes prompt and answer, how rows are split, how a head is fitted."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

import regex
from pydantic import Field, field_validator, model_validator

from cola_core.config.base import Strict
from cola_core.secrets import mask

__all__ = ["AssetConfig", "FetchConfig", "HeadConfig", "ModelConfig", "PrepareConfig"]

ModelKind = Literal["causal", "seq2seq", "encoder"]
TaskKind = Literal["choice", "generate", "classify"]

# regex writes out what {n} counts while it compiles: ((a{2000}){2000}) takes a gigabyte. A count that stands behind
# a group, or behind a space, where `(?x)` would overlook it, multiplies what the others make.
COUNT = re.compile(r"([)\s]?)\{\s*(\d+)")
MOST = 10_000


class AssetConfig(Strict):
    """One reference (`hub:`, `path:`, `pypi:` or `tiny:`); sha256 of the file or wheel, null where unknown."""

    asset: str
    sha256: str | None

    @field_validator("asset")
    @classmethod
    def _tells_no_secret(cls, value: str) -> str:
        """A reference goes into dvc.lock, manifests and model cards as it stands."""
        if mask(value) != value:
            raise ValueError(
                "holds a password or token; a reference names no secrets: set HF_TOKEN or pip's own settings"
            )
        return value


class ModelConfig(AssetConfig):
    """The base model and the class of transformers that loads it."""

    kind: ModelKind


class DataConfig(Strict):
    """Raw files; without a test file, `prepare.test` rows are set apart from the training file by the seed."""

    train: AssetConfig
    test: AssetConfig | None


class FetchConfig(Strict):
    """Section `fetch`.

    sisters: models trained from the same base, by a name of the user's, whose changes have a subspace in common (CoRA);
        none unless asked for.
    """

    model: ModelConfig
    data: DataConfig
    sisters: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], AssetConfig] = Field(default={})


class HeldOutConfig(Strict):
    """At most so many rows of the training file that are tested on too, the same for every seed; skip: others before.

    Two ranges that do not overlap hold different rows, so a second study can be tested where the first was not; fewer
    than `rows` where a group stands across an end.
    """

    rows: int = Field(ge=1)
    skip: int = Field(default=0, ge=0)


class PrepareConfig(Strict):
    """Section `prepare`; `prompt`, `label`, `group` are sandboxed Jinja over a row's columns, `answers` literal texts.

    kind: choice scores every text of `answers`; generate decodes an answer; classify puts a head on an encoder.
    loss: answer = the right answer's tokens; candidates = cross-entropy over the candidates' summed log-probabilities.
    score: how a candidate's token log-probabilities become its score at evaluation.
    label: renders to a key of `answers` (choice, classify) or to the reference answer itself (generate).
    extract: regular expression whose first group is compared (generate), null for the whole text.
    train, validation, probe: rows; train null = all that are left; probe rows are a sample of the training rows.
    test: rows sampled from the test file, null = all of it; without a test file, rows set apart from the training file.
    group: what tells rows that belong together, such as questions on one passage: a training row of a test row's group
        is dropped, and a held-out group is held out whole.
    """

    kind: TaskKind
    loss: Literal["answer", "candidates"]
    score: Literal["sum", "mean"]
    prompt: str
    label: str
    answers: dict[str, str]
    extract: str | None
    max_tokens: int = Field(ge=8)
    max_new_tokens: int = Field(ge=1)
    train: int | None = Field(ge=1)
    validation: int = Field(ge=1)
    probe: int = Field(ge=1)
    test: int | None = Field(ge=1)
    duplicates: Literal["drop_from_train", "refuse", "keep"]
    group: str | None = None
    held_out: HeldOutConfig | None = None

    @model_validator(mode="after")
    def _answers_fit(self) -> PrepareConfig:
        if (self.kind == "generate") == bool(self.answers):
            raise ValueError("answers: choice and classify name at least one, generate names none")
        if self.kind != "choice" and self.loss == "candidates":
            raise ValueError("loss: 'candidates' needs kind 'choice', whose answers it compares")
        return self

    @field_validator("extract")
    @classmethod
    def _has_group(cls, value: str | None) -> str | None:
        if value is not None and _written_out(value) > MOST:
            raise ValueError(f"not a regular expression of bearable size: its {{n}} write out more than {MOST:,} parts")
        try:
            if value is not None and not regex.compile(value).groups:
                raise ValueError("needs one (group), which is what is compared")
        except (regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class HeadConfig(Strict):
    """Section `head`: scikit-learn's logistic regression on frozen features (encoders only)."""

    inverse_regularisation: float = Field(gt=0)
    max_iterations: int = Field(ge=1)


def _written_out(pattern: str) -> int:
    """At most how many parts the counts of `pattern` make."""
    counts = [(bool(group), int(number)) for group, number in COUNT.findall(pattern)]
    groups = math.prod(max(number, 1) for group, number in counts if group)
    return groups * max(sum(number for group, number in counts if not group), 1)
