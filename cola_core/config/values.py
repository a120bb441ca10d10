"""What an axis may be set to: a name, or a name with the numbers that it alone has (`{kind: gora, gamma: 0.05}`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cola_core.config.base import Strict

__all__ = ["Allocator", "Initialiser", "Parametrisation", "Tagged", "Value"]


class Value(Strict):
    """One value of an axis."""

    kind: str

    @property
    def batches(self) -> int:
        """Batches of `link.batch` rows that one step of the link reads."""
        return 1


def _named(value: Any) -> Any:
    """A bare name is a value without numbers."""
    if not isinstance(value, str | Mapping | Value):
        raise ValueError("needs a name, or a name with its numbers such as {kind: gora, gamma: 0.05}")
    return {"kind": value} if isinstance(value, str) else value


Tagged = (Field(discriminator="kind"), BeforeValidator(_named))


class Ranks(Value):
    """Allocators whose numbers stand in section `allocate`."""

    kind: Literal["uniform", "full", "gora", "eva"]


class LayerSubset(Value):
    """blocks: how many of the model's blocks get `allocate.rank`, drawn anew for every link; the others get none."""

    kind: Literal["layer_subset"]
    blocks: int = Field(ge=1)


Allocator = Annotated[Ranks | LayerSubset, *Tagged]


class Random(Value):
    """kaiming: A random, B = 0; random_b: B random, A = 0; eva: A = principal axes of the inputs, B = 0.

    gaussian: both random and small, for gates that start at 0; identity: the factor on the weight's smaller side = I,
    the other = 0.
    """

    kind: Literal["kaiming", "random_b", "eva", "gaussian", "identity"]


class Gora(Value):
    """gamma: size of the first step, as a share of the gradient's norm."""

    kind: Literal["gora"]
    gamma: float = Field(ge=0)


class LoraGa(Value):
    """direction: which singular vectors of the gradient A and B take; form: scaled as in the paper, or as PEFT does it.

    gamma: larger is smaller.
    """

    kind: Literal["lora_ga"]
    direction: Literal["ArB2r", "A2rBr", "ArBr"]
    form: Literal["paper", "peft"]
    gamma: float = Field(gt=0)


class Cora(Value):
    """sisters: chain = the chain's own earlier links; given = the models of `fetch.sisters`."""

    kind: Literal["cora"]
    sisters: Literal["chain", "given"]


class Momentum(Value):
    """momentum: share of the last link's update that goes on training."""

    kind: Literal["momentum"]
    momentum: float = Field(gt=0, lt=1)


class Loftq(Value):
    """iterations: alternating steps T between quantiser and pair."""

    kind: Literal["loftq"]
    iterations: int = Field(ge=1)


Initialiser = Annotated[Random | Gora | LoraGa | Cora | Momentum | Loftq, *Tagged]


class Factors(Value):
    """plain: A and B train; frozen_a, frozen_b: the other factor alone does; dense: the one that is no identity."""

    kind: Literal["plain", "frozen_a", "frozen_b", "dense"]


class Gated(Value):
    """start: every rank's gate is drawn from N(0, 1), or is 1, or 0."""

    kind: Literal["gated"]
    start: Literal["normal", "one", "zero"]


class SoftmaxGated(Value):
    """temperature: of the softmax over a module's ranks."""

    kind: Literal["softmax_gated"]
    temperature: float = Field(gt=0)


class InputShortcut(Value):
    """A layer reads the input of the block before as well."""

    kind: Literal["res_is"]


class Shortcut(Value):
    """previous: how many blocks before are read; res_ms_weights merges by the sizes of weights instead of inputs."""

    kind: Literal["res_bs", "res_ms", "res_ms_weights"]
    previous: int = Field(ge=1)


class Nola(Value):
    """bases: random matrices of which A is a sum, and as many for B; their coefficients are all that trains."""

    kind: Literal["nola"]
    bases: int = Field(ge=1, le=2**20)


Parametrisation = Annotated[Factors | Gated | SoftmaxGated | InputShortcut | Shortcut | Nola, *Tagged]
