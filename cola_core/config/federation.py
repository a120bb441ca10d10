"""What a federated update cannot be combined with, where numbers or other links are concerned."""

from __future__ import annotations

from collections.abc import Sequence

from cola_core.config.recipe import LinkConfig, ProfileConfig
from cola_core.config.training_values import FedAvg

__all__ = ["refused_federation"]


def refused_federation(
    link: LinkConfig, links: Sequence[LinkConfig], source: ProfileConfig, task: str, model: str
) -> list[tuple[bool, str]]:
    """Every reason with whether it holds for `link`.

    Args:
        links: of the whole chain; source: the profile that the link reads; task, model: `prepare.kind` and
            `fetch.model.kind`.
    """
    update = link.update
    if not isinstance(update, FedAvg):
        return []
    private, others = update.privacy is not None, [other.update for other in links]
    same = all(isinstance(u, FedAvg) and u.privacy and _shards(u) == _shards(update) for u in others)
    return [
        (link.clip is not None,
         "link.clip with link.update 'fedavg': it would bound the mean of the clients' steps, not a gradient; "
         "set link.clip to null"),
        (update.concentration is not None and task == "generate",
         "link.update.concentration with prepare.kind 'generate': rows are dealt out by label, and have none"),
        (private and source.probe != "none",
         f"link.update.privacy with profile.probe {source.probe!r}: it reads the training rows without noise"),
        (private and "activations" in source.directions,
         "link.update.privacy with profile.directions 'activations': they are read of training rows without noise"),
        (private and model == "encoder",
         "link.update.privacy with an encoder: its head is fitted to the training rows without noise"),
        (private and not same,
         "link.update.privacy beside a link without it or with other clients: that link trains on the same rows, "
         "and epsilon could not be told"),
    ]  # fmt: skip


def _shards(update: FedAvg) -> tuple[int, float | None]:
    """What decides which rows a client holds."""
    return update.clients, update.concentration
