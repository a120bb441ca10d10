"""Bytes of tensors, exactly: every allocation and release that torch's profiler saw, added up in order."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile

__all__ = ["left_bytes", "peak_bytes"]


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that `work` held at any time above what was held before it."""
    return max(accumulate(_traced(work), initial=0))


def left_bytes(work: Callable[[], object]) -> int:
    """The bytes that `work` leaves, its result among them."""
    return sum(_traced(work))


def _traced(work: Callable[[], object]) -> list[int]:
    """What every event allocated, or released (below zero), in order; the result of `work` lives to the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    found = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    del result
    return [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")]
