"""Axis 'update': how the gradients of a link become steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.nn import Parameter

from cola_core.adapters import LoRA
from cola_core.config.recipe import LinkConfig
from cola_core.config.training_values import AdaLora as Options
from cola_core.config.training_values import LoraPro, LoraRite
from cola_core.optimizers.adalora import AdaLora
from cola_core.optimizers.fedavg import FedAvg
from cola_core.optimizers.lora_pro import MODES, Moments
from cola_core.optimizers.lora_rite import Numbers, rite
from cola_core.optimizers.pairwise import pairwise
from cola_core.optimizers.penalised import Penalised, Proximal
from cola_core.optimizers.perturbed import Ggpo, Mgpo
from cola_core.optimizers.stepping import Adam, Descent, Stepping

__all__ = ["UPDATES", "Update", "build_optimizer"]

# What trains, in groups of one role (A, B, gate, bias, head), each with the modules' layers, the recipe -> an optimizer
# with empty state.
Groups = list[dict[str, Any]]
Update = Callable[[Groups, Mapping[str, LoRA], LinkConfig], Stepping]


def adamw(groups: Groups, layers: Mapping[str, LoRA], config: LinkConfig) -> Stepping:
    """torch's AdamW."""
    return Adam(groups, **adam_settings(config))


def sgd(groups: Groups, layers: Mapping[str, LoRA], config: LinkConfig) -> Stepping:
    """torch's SGD without momentum; weight decay is added to the gradient."""
    return Descent(groups, weight_decay=config.weight_decay, foreach=True)


def lora_plus(groups: Groups, layers: Mapping[str, LoRA], config: LinkConfig) -> Stepping:
    """LoRA+, arXiv 2402.12354: B learns `ratio` times as fast as A."""
    for group in groups:
        if group["role"] == "B":
            group["lr"] = group["peak"] = config.update.ratio * group["peak"]  # type: ignore[union-attr]
    return Adam(groups, **adam_settings(config))


def penalised(groups: Groups, layers: Mapping[str, LoRA], config: LinkConfig) -> Stepping:
    """XGBLoRA's L2 penalty on A and B."""
    return Penalised(groups, config.update.l2, **adam_settings(config))  # type: ignore[union-attr]


def proximal(groups: Groups, layers: Mapping[str, LoRA], config: LinkConfig) -> Stepping:
    """SoRA's threshold on the gates."""
    options: Any = config.update
    return Proximal(groups, options.threshold, options.rule, options.l1, **adam_settings(config))


def lora_ggpo(groups: Groups, layers: Mapping[str, LoRA], config: LinkConfig) -> Stepping:
    """LoRA-GGPO's noise on the weights."""
    options: Any = config.update
    return Ggpo(groups, layers, options.sigma, options.beta, **adam_settings(config))


def lora_mgpo(groups: Groups, layers: Mapping[str, LoRA], config: LinkConfig) -> Stepping:
    """LoRA-MGPO's step up the momentum."""
    options: Any = config.update
    return Mgpo(groups, options.rho, options.smoothing, **adam_settings(config))


def lora_pro(groups: Groups, layers: Mapping[str, LoRA], config: LinkConfig) -> Stepping:
    """LoRA-Pro, arXiv 2407.18242: A and B step so that W goes as near as it can to where its own gradient leads."""
    assert isinstance(config.update, LoraPro)
    numbers = Moments((config.betas[0], config.betas[1]), config.epsilon, config.weight_decay)
    return pairwise(groups, layers, adam_settings(config), MODES[config.update.mode](numbers))


def lora_rite(groups: Groups, layers: Mapping[str, LoRA], config: LinkConfig) -> Stepping:
    """LoRA-RITE, arXiv 2410.20625: the step of W is the same for all A and B of the same B A."""
    assert isinstance(config.update, LoraRite)
    mine, betas = config.update, (config.betas[0], config.betas[1])
    numbers = Numbers(betas, config.epsilon, config.weight_decay, mine.skip, mine.clip, mine.cutoff, mine.escape)
    return pairwise(groups, layers, adam_settings(config), rite(numbers))


def fedavg(groups: Groups, layers: Mapping[str, LoRA], config: LinkConfig) -> Stepping:
    """Rounds of clients, arXiv 1602.05629."""
    return FedAvg(groups, config)


def adalora(groups: Groups, layers: Mapping[str, LoRA], config: LinkConfig) -> Stepping:
    """AdaLoRA's budget of singular values."""
    assert isinstance(config.update, Options)
    return AdaLora(groups, layers, config.update, config.steps, **adam_settings(config))


UPDATES: dict[str, Update] = {
    "adamw": adamw,
    "sgd": sgd,
    "lora_plus": lora_plus,
    "penalised": penalised,
    "proximal": proximal,
    "lora_ggpo": lora_ggpo,
    "lora_mgpo": lora_mgpo,
    "lora_pro": lora_pro,
    "lora_rite": lora_rite,
    "fedavg": fedavg,
    "adalora": adalora,
}


def adam_settings(config: LinkConfig) -> dict[str, Any]:
    """The recipe's numbers as torch's AdamW takes them."""
    betas = (config.betas[0], config.betas[1])
    return {"betas": betas, "eps": config.epsilon, "weight_decay": config.weight_decay, "foreach": True}


def build_optimizer(
    parameters: Iterable[tuple[str, str, Parameter]], config: LinkConfig, layers: Mapping[str, LoRA] | None = None
) -> Stepping:
    """A new optimizer with empty state, one group per role (law 4).

    Args:
        parameters: (name, role, parameter) of everything that trains.
        layers: module -> its layer, for updates that look at A and B together.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, role, parameter in parameters:
        rate = config.head_learning_rate if role == "head" else config.learning_rate
        group = groups.setdefault(role, {"params": [], "names": [], "role": role, "lr": rate, "peak": rate})
        group["params"].append(parameter)
        group["names"].append(name)
    return UPDATES[config.update.kind](list(groups.values()), layers or {}, config)
