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

    kind: Literal["uniform", "gora", "eva"]


class LayerSubset(Value):
    """blocks: how many of the model's blocks get `allocate.rank`, drawn anew for every link; the others get none."""

    kind: Literal["layer_subset"]
    blocks: int = Field(ge=1)


Allocator = Annotated[Ranks | LayerSubset, *Tagged]


class Random(Value):
    """kaiming: A random, B = 0; random_b: B random, A = 0; eva: A = principal axes of the inputs, B = 0."""

    kind: Literal["kaiming", "random_b", "eva"]


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
    """plain: A and B train; frozen_a, frozen_b: the other factor alone does."""

    kind: Literal["plain", "frozen_a", "frozen_b"]


class Gated(Value):
    """start: every rank's gate is drawn from N(0, 1), or is 1."""

    kind: Literal["gated"]
    start: Literal["normal", "one"]


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


Update = Annotated[Adam | LoraPlus | Penalised | Proximal | Ggpo | Mgpo | LoraPro | LoraRite | FedAvg, *Tagged]


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
