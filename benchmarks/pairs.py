"""Two ways of doing the same work, timed in turn: A B A B, and compared pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Pairs", "alternate", "timed"]

SPREAD = (0.1, 0.9)  # the ratio's low and high: eight pairs of ten lie between


@dataclass
class Pairs:
    """Seconds (or bytes, or whatever both sides are measured in) of neighbouring runs of ours and the peer's."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def add(self, ours: float, peer: float) -> None:
        """One more pair."""
        self.ours.append(ours)
        self.peer.append(peer)

    @property
    def ratios(self) -> list[float]:
        """ours / peer, pair by pair: what disturbs the machine for longer than a pair drops out."""
        return [a / b for a, b in zip(self.ours, self.peer, strict=True)]

    @property
    def median(self) -> float:
        """The middle ratio."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The ratios' 10th and 90th percentile."""
        low, high = np.quantile(self.ratios, SPREAD)
        return float(low), float(high)


def alternate(ours: Callable[[], object], peer: Callable[[], object], pairs: int, warm_up: int = 1) -> Pairs:
    """Time both in turn, `pairs` times after `warm_up` rounds that are not counted."""
    found = Pairs()
    for counted in _rounds(pairs, warm_up):
        a, b = timed(ours), timed(peer)
        if counted:
            found.add(a, b)
    return found


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _rounds(pairs: int, warm_up: int) -> Iterator[bool]:
    yield from [False] * warm_up
    yield from [True] * pairs
