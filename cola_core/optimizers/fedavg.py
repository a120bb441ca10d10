"""FedAvg in one process: every step of the link is a round of clients that train on rows of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD

from cola_core.config.training_values import FedAvg as Options
from cola_core.interrupts import uninterrupted
from cola_core.optimizers.privacy import Reading, check_accountant, epsilon, private_gradient
from cola_core.optimizers.shards import Rounds, shards
from cola_core.optimizers.stepping import Stepping
from cola_core.processes import check_alone
from cola_core.seeds import derive

if TYPE_CHECKING:
    from cola_core.config.recipe import LinkConfig
    from cola_core.health import Course
    from cola_core.rows import Row

__all__ = ["FedAvg"]


class FedAvg(Stepping):
    """FederatedAveraging, arXiv 1602.05629, Algorithm 1, all clients in every round: w <- sum_k (n_k / n) w_k.

    w_k: the server's w after `local_steps` steps of plain SGD (weight decay is added to the gradient) on client k's
    rows. Where one factor is frozen and equal everywhere, the mean of the clients' products B_k A is the product of
    their mean, as in FFA-LoRA, arXiv 2403.12313. Nothing is kept from round to round but w.
    """

    def __init__(self, groups: list[dict[str, Any]], config: LinkConfig) -> None:
        """Check what the rounds need.

        Raises:
            UserError: privacy is asked for and nobody could account for it, or several processes run.
        """
        super().__init__(groups, {"weight_decay": config.weight_decay})
        assert isinstance(config.update, Options)
        self.config, self.options = config, config.update
        self.trained = [p for group in self.param_groups for p in group["params"]]
        if self.options.privacy:
            check_accountant()
        check_alone("link.update 'fedavg'", "its clients train one after the other")

    def plan(self, rows: Sequence[Row], course: Course) -> Rounds:
        """Every round's batches; a client holds the same rows in every link of a chain."""
        options, config = self.options, self.config
        held = shards([row.label for row in rows], options.clients, options.concentration, course.seed)
        stream, poisson = derive(course.seed, course.link, "data"), options.privacy is not None
        self.rounds = Rounds(held, config.batch, config.steps, options.local_steps, poisson, stream)
        return self.rounds

    def collect(self, batches: Sequence[Sequence[Sequence[int]]], read: Reading) -> tuple[float, int]:
        """Let every client train; afterwards every `grad` is w - sum_k (n_k / n) w_k, and the parameters are w again.

        Args:
            batches: of every client, of every local step, from `plan`.

        Returns:
            mean loss over all rows that were read, each before the local step that read it, and their tokens.
        """
        moved, told = [torch.zeros_like(p) for p in self.trained], list[tuple[int, float, int]]()
        for client, steps in enumerate(batches):
            with self._given_back() as server:
                told += self._train(client, steps, read)
                for total, before, parameter in zip(moved, server, self.trained, strict=True):
                    total += self.rounds.weights[client] * (before - parameter.detach())
        if not told:  # no row was drawn in the whole round: the loss told is that of one row
            told = [(1, *read([next(row for shard in self.rounds.held for row in shard)]))]
        for total, parameter in zip(moved, self.trained, strict=True):
            parameter.grad = total
        return sum(n * loss for n, loss, _ in told) / sum(n for n, _, _ in told), sum(tokens for *_, tokens in told)

    @contextmanager
    def _given_back(self) -> Iterator[list[torch.Tensor]]:
        """The server's parameters, which the block may change: also a run that is stopped in it keeps whole rounds."""
        server = [p.detach().clone() for p in self.trained]
        try:
            yield server
        finally:
            with uninterrupted(), torch.no_grad():
                for parameter, before in zip(self.trained, server, strict=True):
                    parameter.copy_(before)

    def _train(self, client: int, steps: Sequence[Sequence[int]], read: Reading) -> Iterator[tuple[int, float, int]]:
        """One client's local steps: (rows, mean loss, tokens) of all that was read."""
        local, privacy = SGD([dict(group) for group in self.param_groups], foreach=True), self.options.privacy
        for rows in steps:
            self.zero_grad()
            if privacy:
                found = private_gradient(self.trained, rows, read, privacy, self.rounds.expected[client])
                yield from ((1, *one) for one in found)
            else:
                yield (len(rows), *read(rows))
            local.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """The server takes the clients' mean."""
        for parameter in self.trained:
            parameter.sub_(parameter.grad)

    def record(self, rounds: int, earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What link.json tells of the clients: rows, local steps and, under privacy, the epsilon of the chain so far.

        Args:
            rounds: that were trained.
            earlier: the records of the links before this one, whose steps on the same rows add to epsilon.
        """
        steps, privacy = rounds * self.options.local_steps, self.options.privacy
        clients: list[dict[str, Any]] = [{"rows": len(shard), "steps": steps} for shard in self.rounds.held]
        for number, (client, rate) in enumerate(zip(clients, self.rounds.rates, strict=True)):
            if privacy and client["rows"]:
                spent = [_spent(record, number) for record in earlier]
                told = epsilon([*spent, (privacy.noise, rate, steps)], privacy.delta)
                client |= {"rate": rate, "epsilon": told, "delta": privacy.delta}
        return {"clients": clients}


def _spent(record: Mapping[str, Any], client: int) -> tuple[float, float, int]:
    """(noise, rate, steps) of one client in an earlier link."""
    held = record["clients"][client]
    return record["link_section"]["update"]["privacy"]["noise"], held["rate"], held["steps"]
