"""Peak bytes of tensors, exactly: every allocation and release that torch's profiler saw, added up in order."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that `work` held at any time above what was held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    found = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted((event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]")
    held = most = 0
    for _, size in events:
        held += size
        most = max(most, held)
    return most
