"""Which values compose: a pair that cannot is refused with both names and the reason, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["OWN_PROFILE", "REFUSALS", "Refusal", "refused"]


# Initialisers that read their link's own profile, and how many of its directions each rank takes.
OWN_PROFILE = {"gora": 1}


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


ALLOCATOR, PROBE, DIRECTIONS = "allocate.allocator", "profile.probe", "profile.directions"
INITIALISER, PARAMETRISATION = "link.initialiser", "link.parametrisation"
UPDATE, PRUNING, QUANTISE, DTYPE, DEVICE = (
    *("link.update", "link.pruning", "link.quantise"),
    *("machine.dtype", "machine.device"),
)

REFUSALS = (
    _no(ALLOCATOR, "gora", PROBE, "none", "ranks come from the probe's gradient"),
    _no(INITIALISER, "gora", PROBE, "none", "B comes from the probe's gradient"),
    _no(INITIALISER, "gora", DIRECTIONS, "none", "B comes from the sketch S = G A_max^T"),
    _no(INITIALISER, "kaiming", PARAMETRISATION, "frozen_b", "B would stay 0, and A without a gradient"),
    _no(INITIALISER, "random_b", PARAMETRISATION, "frozen_a", "A would stay 0, and B without a gradient"),
    _no(PARAMETRISATION, "frozen_a frozen_b", UPDATE, "lora_plus", "one factor alone trains, so there is no ratio"),
    _no(PARAMETRISATION, "plain", UPDATE, "fedavg",
        "both factors train, and the mean of the clients' products B A is not the product of their means"),
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
