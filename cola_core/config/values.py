"""What an axis may be set to: a name, or a name with the numbers that it alone has (`{kind: gora, gamma: 0.05}`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cola_core.config.base import Strict

__all__ = ["Allocator", "Initialiser", "Parametrisation", "Pruning", "Update"]


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

    kind: Literal["uniform", "gora"]


Allocator = Annotated[Ranks, BeforeValidator(_named)]


class Random(Value):
    """kaiming: A random, B = 0; random_b: B random, A = 0."""

    kind: Literal["kaiming", "random_b"]


class Gora(Value):
    """gamma: size of the first step, as a share of the gradient's norm."""

    kind: Literal["gora"]
    gamma: float = Field(ge=0)


Initialiser = Annotated[Random | Gora, *Tagged]


class Factors(Value):
    """plain: A and B train; frozen_a, frozen_b: the other factor alone does."""

    kind: Literal["plain", "frozen_a", "frozen_b"]


Parametrisation = Annotated[Factors, BeforeValidator(_named)]


class Adam(Value):
    """adamw: torch's; sgd: no state, weight decay as in torch."""

    kind: Literal["adamw", "sgd"]


class LoraPlus(Value):
    """ratio: B's learning rate over A's."""

    kind: Literal["lora_plus"]
    ratio: float = Field(gt=0)


class Privacy(Strict):
    """Example-level differential privacy (DP-SGD).

    max_norm: bound on one row's gradient over all that trains; noise: standard deviation of what is added to the sum,
    over max_norm; delta: at which epsilon is told.
    """

    noise: float = Field(gt=0)
    max_norm: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class FedAvg(Value):
    """A step is a round: each of `clients` takes `local_steps` steps of SGD on rows of its own, the mean is kept.

    concentration: null = rows are dealt out at random; a number = shares of every label by
        Dirichlet, the smaller the more uneven.
    """

    kind: Literal["fedavg"]
    clients: int = Field(ge=1)
    local_steps: int = Field(ge=1)
    concentration: float | None = Field(gt=0)
    privacy: Privacy | None

    @property
    def batches(self) -> int:
        """Every client's, in every local step."""
        return self.clients * self.local_steps


Update = Annotated[Adam | LoraPlus | FedAvg, *Tagged]


class Whole(Value):
    """Ranks stay as they are."""

    kind: Literal["none"]


Pruning = Annotated[Whole, BeforeValidator(_named)]
