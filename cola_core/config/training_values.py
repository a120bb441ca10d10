"""Values of the axes that say how a link trains: its update, and what becomes of its ranks meanwhile."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cola_core.config.base import Strict
from cola_core.config.values import Tagged, Value

__all__ = ["Ablation", "AdaLora", "Beam", "FedAvg", "LoraPro", "LoraRite", "Pruning", "Update"]


class Adam(Value):
    """adamw: torch's; sgd: no state, weight decay as in torch."""

    kind: Literal["adamw", "sgd"]


class LoraPlus(Value):
    """ratio: B's learning rate over A's."""

    kind: Literal["lora_plus"]
    ratio: float = Field(gt=0)


class Penalised(Value):
    """l2: of l2/2 (||A||^2 + ||B||^2), which the loss takes on."""

    kind: Literal["penalised"]
    l2: float = Field(ge=0)


class Proximal(Value):
    """threshold: xi, of learning rate times xi (soft), or alone (official); l1: of a subgradient l1 sign(g) / n."""

    kind: Literal["proximal"]
    threshold: float = Field(ge=0)
    rule: Literal["soft", "official"]
    l1: float = Field(ge=0)


class Ggpo(Value):
    """sigma: noise in proportion to the weights' rows; beta: to the squares of their gradients."""

    kind: Literal["lora_ggpo"]
    sigma: float = Field(ge=0)
    beta: float = Field(ge=0)


class Mgpo(Value):
    """rho: length of the step up the momentum; smoothing: of the average that gradients are compared with."""

    kind: Literal["lora_mgpo"]
    rho: float = Field(ge=0)
    smoothing: float = Field(ge=0, lt=1)


class LoraPro(Value):
    """mode: efficient = Adam on the steps of A and B; full = Adam on the equivalent gradient of W, of its size."""

    kind: Literal["lora_pro"]
    mode: Literal["efficient", "full"]


class LoraRite(Value):
    """skip: RMS above which a factor's unmagnified gradient counts as 0; clip: bound of the norm of all; null: never.

    cutoff: share of a factor's largest singular value below which others count as 0; escape: whether the second
    moments that are lost when a basis turns are added again.
    """

    kind: Literal["lora_rite"]
    skip: float | None = Field(gt=0)
    clip: float | None = Field(gt=0)
    cutoff: float = Field(ge=0, lt=1)
    escape: bool


class AdaLora(Value):
    """rank: triplets a module keeps on average; first, last: steps before the budget falls and after it is final.

    every: steps between two closings of gates; smoothing: of a number's sensitivity; orthogonal: weight of the penalty.
    """

    kind: Literal["adalora"]
    rank: int = Field(ge=1)
    first: int = Field(ge=0)
    last: int = Field(ge=0)
    every: int = Field(ge=1)
    smoothing: float = Field(gt=0, lt=1)
    orthogonal: float = Field(ge=0)


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


Update = Annotated[
    Adam | LoraPlus | Penalised | Proximal | Ggpo | Mgpo | LoraPro | LoraRite | FedAvg | AdaLora, *Tagged
]


class Whole(Value):
    """Ranks stay as they are."""

    kind: Literal["none"]


class Beam(Value):
    """every: steps between prunings; share: of all gates' sum, kept at least; schedule: its way from or to 1."""

    kind: Literal["beam_lora"]
    every: int = Field(ge=2)
    share: float = Field(gt=0, le=1)
    schedule: Literal["rising", "falling"]


class Ablation(Value):
    """first, every: steps before the first round and between others; rounds: at most; ranks: how many each moves."""

    kind: Literal["alora"]
    first: int = Field(ge=1)
    every: int = Field(ge=1)
    rounds: int = Field(ge=1)
    ranks: int = Field(ge=1)


Pruning = Annotated[Whole | Beam | Ablation, *Tagged]
