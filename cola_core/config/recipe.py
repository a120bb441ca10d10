"""The recipe: one value on each of the six axes, and the numbers that go with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cola_core.config.base import Strict
from cola_core.config.training_values import Pruning, Update
from cola_core.config.values import Allocator, Initialiser, Parametrisation

__all__ = ["AllocateConfig", "LinkConfig", "MachineConfig", "ProfileConfig", "ScheduleConfig"]

Scale = Literal["lora", "rslora", "unit"]
Quantisation = Literal["none", "nf4", "nf2", "uniform4", "uniform2"]
Schedule = Literal["none", "cola"]
BaseStore = Literal["fp32", "bf16", "fp64"]


class MachineConfig(Strict):
    """Section `machine`: concrete values, nothing is chosen by a clock or by what else runs (law 6).

    dtype: how the frozen base is stored and computed; adapters and optimizer keep fp32 masters (fp64 under fp64).
    """

    device: Literal["cpu", "cuda", "mps"]
    threads: int = Field(ge=1)
    dtype: BaseStore


class ScheduleConfig(Strict):
    """Section `schedule`.

    kind: none = one link (LoRA); cola = a knot is tied after every link.
    learning_rate: restart = every link has its own warm-up and decay; global = one decay over `horizon` steps;
        jagged = that decay, and a warm-up in every link (ReLoRA).
    horizon: optimizer steps of the whole chain; equals the sum of the links' steps.
    """

    kind: Schedule
    learning_rate: Literal["restart", "global", "jagged"]
    horizon: int = Field(ge=1)


class ProfileConfig(Strict):
    """Section `profile`.

    probe: none = no gradient is taken; one_batch = one exact pass; accumulate = fp32 buffers over micro-batches;
        sampled = `row_share` of every gradient's rows over micro-batches, importance, norm and gap estimates.
    importance: what a module's gradient G and weight W are reduced to (GoRA, section 3).
    directions: what is kept of every module for initialisers: sketch = S = G A_max^T (GoRA); gradient = G's leading
        singular vectors (LoRA-GA); activations = the inputs' principal axes, by a pass of their own (EVA); sisters =
        the common subspace of the models of `fetch.sisters` (CoRA).
    sketch: how many of them, at least the largest rank (uniform: `allocate.rank`, others: `r_max`), twice in LoRA-GA.
    adaptive: accumulate only: stop once no module's importance moved by more than `tolerance` (after 3 batches).
    gap_radius: radius of the nuclear-norm ball in the Frank-Wolfe gap (COLA, section 4).
    """

    probe: Literal["none", "one_batch", "accumulate", "sampled"]
    importance: Literal["mean_abs_wg", "nuclear_wg", "nuclear_g"]
    directions: list[Literal["sketch", "gradient", "activations", "sisters"]]
    sketch: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    row_share: float = Field(gt=0, le=1)
    adaptive: bool
    tolerance: float = Field(gt=0)
    gap_radius: float = Field(gt=0)
    activation_checkpointing: bool


class AllocateConfig(Strict):
    """Section `allocate`: `rank` is every module's rank (uniform) or the reference rank of a budget."""

    allocator: Allocator
    rank: int = Field(ge=1)
    r_min: int = Field(ge=1)
    r_max: int = Field(ge=1)
    features: Literal["sqrt", "linear"]


class LinkConfig(Strict):
    """Section `link`: one LoRA of the chain.

    scale, alpha: s = alpha / r (lora), alpha / sqrt(r) (rslora, which is RoRA too) or 1 (unit).
    pruning: what happens to ranks while the link trains; quantise: how the frozen weights of its modules are kept.
    batch: rows of one optimizer step, computed in groups of similar length of at most `micro_batch` rows and
        `micro_tokens` tokens with their padding (null = any number): memory follows these two, gradients do not.
    learning_rate: of A; B's is `update.ratio` times that under lora_plus; `head_learning_rate` of an encoder's head.
    warmup: fraction of the steps; decay: shape after it, down to `floor` times the peak; cycles: how often both are
        gone through, each time in an equal share of the steps (warm restarts, without a knot).
    keep: best = the adapter with the lowest validation loss; last = the one after the last step.
    keep_link: always, or only if the validation loss with the link is below that without it (one more validation).
    patience: validations without improvement before the link stops early; null = never.
    """

    MOVED = {"gamma": "link.initialiser.gamma", "ratio": "link.update.ratio"}  # noqa: RUF012

    initialiser: Initialiser
    parametrisation: Parametrisation
    scale: Scale
    update: Update
    pruning: Pruning
    quantise: Quantisation
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    base_dropout: float = Field(ge=0, lt=1)
    bias: Literal["none", "lora"]
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    micro_tokens: int | None = Field(ge=1)
    learning_rate: float = Field(gt=0)
    head_learning_rate: float = Field(gt=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(min_length=2, max_length=2)
    epsilon: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    clip: float | None = Field(gt=0)
    warmup: float = Field(ge=0, lt=1)
    decay: Literal["linear", "cosine", "constant"]
    floor: float = Field(ge=0, le=1)
    keep: Literal["best", "last"]
    keep_link: Literal["always", "if_better"]
    validate_every: int = Field(ge=1)
    patience: int | None = Field(ge=1)
    checkpoint_every: int = Field(ge=1)
    activation_checkpointing: bool
    cycles: int = Field(default=1, ge=1)
