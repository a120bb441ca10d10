"""The rows of a simulated federation: which of them every client holds, and which it reads in a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cola_core.rows import order
from cola_core.seeds import derive

__all__ = ["Rounds", "shards"]

Batches = list[list[int]]  # row indices of every local step


def shards(labels: Sequence[int], clients: int, concentration: float | None, seed: int) -> list[list[int]]:
    """Deal the rows out to the clients; every row goes to one of them.

    Args:
        labels: of all rows.
        concentration: None = at random, sizes differ by one row at most; a number = of every label each client gets a
            share drawn from Dirichlet(concentration, ..., concentration) (Li et al., arXiv 2102.02079, section 4,
            'distribution-based label imbalance'): the smaller the number, the fewer labels a client knows.

    Returns:
        one ascending list of row indices per client; under a small concentration it may be empty.
    """
    generator = np.random.default_rng(derive(seed, "shards"))
    if concentration is None:
        shuffled = generator.permutation(len(labels)).tolist()
        return [sorted(shuffled[k::clients]) for k in range(clients)]
    held: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(labels)):
        rows = generator.permutation([i for i, mine in enumerate(labels) if mine == label])
        shares = generator.dirichlet([concentration] * clients)
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for shard, part in zip(held, np.split(rows, cuts), strict=True):
            shard += part.tolist()
    return [sorted(shard) for shard in held]


class Rounds:
    """What every client reads, by round.

    weights: n_k / n, of every client; expected: rows of a local step on average; rates: probability that a row is in a
    local step's batch, where batches are drawn (`poisson`).
    """

    def __init__(self, held: Sequence[Sequence[int]], batch: int, rounds: int, steps: int, poisson: bool, seed: int):
        """Set up every client's stream of batches.

        Args:
            held: row indices of every client, from `shards`.
            steps: local steps of a round.
            poisson: every row comes into a batch on its own, with probability `batch` / rows of the client, as the
                accountant of `privacy` assumes; else batches of `batch` rows from seeded epochs, as everywhere.
        """
        self.held = held
        self.weights = [len(shard) / sum(map(len, held)) for shard in held]
        self.expected = [min(batch, len(shard)) if poisson else batch for shard in held]
        self.rates = [size / max(1, len(shard)) for size, shard in zip(self.expected, held, strict=True)]
        streams = [derive(seed, "client", k) for k in range(len(held))]
        if poisson:
            self._turns = [_drawn(*client, steps) for client in zip(held, self.rates, streams, strict=True)]
        else:
            self._turns = [_in_turn(shard, batch, rounds, steps, s) for shard, s in zip(held, streams, strict=True)]

    def __getitem__(self, number: int) -> list[Batches]:
        """The batches of every client in round `number`, the first is 0; none for a client without rows."""
        return [turn(number) if shard else [] for turn, shard in zip(self._turns, self.held, strict=True)]


def _in_turn(shard: Sequence[int], batch: int, rounds: int, steps: int, seed: int) -> Callable[[int], Batches]:
    plan = order(len(shard), batch, rounds * steps, seed) if shard else []
    return lambda number: [[shard[i] for i in rows] for rows in plan[number * steps : (number + 1) * steps]]


def _drawn(shard: Sequence[int], rate: float, seed: int, steps: int) -> Callable[[int], Batches]:
    def turn(number: int) -> Batches:
        generator = torch.Generator().manual_seed(derive(seed, number))
        chosen = torch.rand(steps, len(shard), generator=generator, dtype=torch.float64) < rate
        return [[shard[i] for i in row.nonzero().flatten().tolist()] for row in chosen]

    return turn
