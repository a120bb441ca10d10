"""One random stream per purpose, derived from (seed, link, purpose): drawing more in one moves no other (law 6)."""

from __future__ import annotations

import hashlib

__all__ = ["derive", "of_layer"]


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as `derive(0, 2, "init", "layers.0.q_proj")`.

    Args:
        seed: the run's seed.
        purpose: what the stream is for; equal words give equal streams.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def of_layer(seed: int, link: int, module: str) -> int:
    """The seed of what one layer of one link draws for its own form."""
    return derive(seed, link, "form", module)
