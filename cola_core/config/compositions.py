"""Which values compose: a pair that cannot is refused with both names and the reason, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["OWN_PROFILE", "REFUSALS", "Refusal", "refused"]


# Initialisers that read their link's own profile: which of its directions, and how many for every rank.
OWN_PROFILE = {"gora": ("sketch", 1), "lora_ga": ("gradient", 2), "eva": ("activations", 1)}


@dataclass(frozen=True)
class Refusal:
    """Any of `values` under `key` with any of `others` under `other`."""

    key: str
    values: frozenset[str]
    other: str
    others: frozenset[str]
    reason: str

    def meets(self, chosen: Mapping[str, str]) -> bool:
        """Whether `chosen`, key -> value, holds the pair."""
        return chosen[self.key] in self.values and chosen[self.other] in self.others


def _no(key: str, values: str, other: str, others: str, reason: str) -> Refusal:
    return Refusal(key, frozenset(values.split()), other, frozenset(others.split()), reason)


ALLOCATOR, PROBE = "allocate.allocator", "profile.probe"
INITIALISER, PARAMETRISATION = "link.initialiser", "link.parametrisation"
UPDATE, PRUNING, QUANTISE, DTYPE, DEVICE = (
    *("link.update", "link.pruning", "link.quantise"),
    *("machine.dtype", "machine.device"),
)

STEPPING = "gora lora_ga loftq momentum"  # B A is not 0 at the start
PAIRS, GATES, SHORTCUTS = (
    "plain frozen_a frozen_b dense nola",
    "gated softmax_gated",
    "res_is res_bs res_ms res_ms_weights",
)
NOT_PLAIN = f"frozen_a frozen_b dense nola {GATES} {SHORTCUTS}"
NOT_IDENTITY = f"kaiming random_b cora eva {STEPPING}"

REFUSALS = (
    _no(ALLOCATOR, "gora", PROBE, "none", "ranks come from the probe's gradient"),
    _no(INITIALISER, "gora", PROBE, "none", "B comes from the probe's gradient"),
    _no(INITIALISER, "lora_ga", PROBE, "none sampled", "A and B are singular vectors of the probe's whole gradients"),
    _no(INITIALISER, "loftq", QUANTISE, "none", "its pair makes up for what quantising takes, here nothing"),
    _no(INITIALISER, "kaiming eva momentum", PARAMETRISATION, "frozen_b", "B starts at 0 and would stay there"),
    _no(INITIALISER, "random_b cora", PARAMETRISATION, "frozen_a", "A starts at 0 and would stay there"),
    _no(INITIALISER, "gaussian", PARAMETRISATION, f"{PAIRS} softmax_gated {SHORTCUTS}", "its B A asks for gates of 0"),
    _no(INITIALISER, "gaussian", PRUNING, "beam_lora alora", "its B A asks for gates, which these rounds lack"),
    _no(INITIALISER, "gaussian", UPDATE, "lora_pro lora_rite lora_ggpo fedavg", "its B A asks for gates"),
    _no(INITIALISER, "identity", ALLOCATOR, "uniform gora layer_subset eva", "an identity fills a side"),
    _no(INITIALISER, "identity", PARAMETRISATION, f"frozen_a frozen_b nola {GATES} {SHORTCUTS}",
        "the factor that starts at 0 is the one that trains"),
    _no(ALLOCATOR, "uniform gora layer_subset eva", PARAMETRISATION, "dense", "an identity fills a side"),
    _no(ALLOCATOR, "full", INITIALISER, "gora lora_ga eva", "a profile keeps fewer directions than a whole side has"),
    _no(ALLOCATOR, "full", PRUNING, "beam_lora alora", "ranks are moved, and a whole side has no use for more"),
    _no(INITIALISER, "identity", PRUNING, "beam_lora alora", "ranks would be moved out of the identity"),
    _no(INITIALISER, "identity", UPDATE, "proximal adalora fedavg", "they ask for gates or a factor that is frozen"),
    _no(PARAMETRISATION, "dense", INITIALISER, NOT_IDENTITY, "the factor that it freezes is the identity"),
    _no(INITIALISER, STEPPING, PARAMETRISATION, SHORTCUTS, "its start would count in later blocks too"),
    _no(INITIALISER, f"{STEPPING} cora eva", PARAMETRISATION, "nola", "its start could not be drawn again from a seed"),
    _no(ALLOCATOR, "gora eva", PARAMETRISATION, "res_ms res_ms_weights", "A of one block feeds another's B"),
    _no(UPDATE, "lora_plus", PARAMETRISATION, "frozen_a frozen_b dense", "one factor alone trains: no ratio"),
    _no(UPDATE, "penalised", PARAMETRISATION, "nola", "A and B are coefficients there, and no factors to be bounded"),
    _no(UPDATE, "lora_pro lora_rite", PARAMETRISATION, NOT_PLAIN, "it steps both A and B, of s B A alone"),
    _no(UPDATE, "proximal", PARAMETRISATION, f"{PAIRS} softmax_gated {SHORTCUTS}", "it thresholds free gates"),
    _no(UPDATE, "adalora", PARAMETRISATION, f"{PAIRS} softmax_gated {SHORTCUTS}", "it closes free gates"),
    _no(UPDATE, "lora_ggpo", PARAMETRISATION, f"dense nola {GATES} {SHORTCUTS}", "its noise follows B A's gradient"),
    _no(UPDATE, "fedavg", PARAMETRISATION, f"plain dense nola {GATES} {SHORTCUTS}",
        "what trains is no linear part of B A: the mean of the clients' products is not the product of their means"),
    _no(PRUNING, "beam_lora", PARAMETRISATION, f"{PAIRS} gated {SHORTCUTS}", "it compares a softmax's gates"),
    _no(PRUNING, "alora", PARAMETRISATION, f"frozen_b dense nola {GATES} {SHORTCUTS}", "a new rank starts at B = 0"),
    _no(PRUNING, "beam_lora alora", UPDATE, "proximal adalora", "free gates are closed, and there are none"),
    _no(PRUNING, "alora", UPDATE, "lora_rite", "what it keeps of a basis of so many ranks would not fit another"),
    _no(PRUNING, "beam_lora", UPDATE, "lora_pro lora_rite", "they step A and B of s B A alone, without gates"),
    _no(PRUNING, "beam_lora", UPDATE, "fedavg", "gates are no linear part of B A, so clients cannot be averaged"),
    _no(PRUNING, "beam_lora", UPDATE, "lora_ggpo", "its noise follows the gradient of one pair B A, without gates"),
    _no(DTYPE, "bf16", DEVICE, "mps", "never tried on such a device"),
)  # fmt: skip


def refused(chosen: Mapping[str, str]) -> str | None:
    """The first refusal that `chosen` meets, as a line; None where all pairs compose.

    Args:
        chosen: every key of the axes -> the value it has.
    """
    for refusal in REFUSALS:
        if refusal.meets(chosen):
            one, two = (f"{key} {chosen[key]!r}" for key in (refusal.key, refusal.other))
            return f"{one} with {two}: {refusal.reason}"
    return None
