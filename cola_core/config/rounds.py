"""What a link is too short for, or would hand on before it is done: ranks that are closed or moved while it trains."""

from __future__ import annotations

from cola_core.config.recipe import LinkConfig
from cola_core.config.training_values import Ablation, AdaLora, Beam

__all__ = ["refused_rounds"]


def refused_rounds(link: LinkConfig, rank: int) -> list[tuple[bool, str]]:
    """Every reason with whether it holds for `link`.

    Args:
        rank: `allocate.rank`, a module's ranks at the start.
    """
    pruning, steps = link.pruning, link.steps
    budget = _refused_budget(link, link.update, rank) if isinstance(link.update, AdaLora) else []
    return [
        *budget,
        (isinstance(pruning, Ablation) and pruning.first >= steps,
         f"link.pruning.first {getattr(pruning, 'first', 0)} with link.steps {steps}: no round would have its turn"),
        (isinstance(pruning, Beam) and 2 * pruning.every > steps,
         f"link.pruning.every {getattr(pruning, 'every', 0)} with link.steps {steps}: no rank would ever be pruned; at "
         f"most {steps // 2} is"),
    ]  # fmt: skip


def _refused_budget(link: LinkConfig, update: AdaLora, rank: int) -> list[tuple[bool, str]]:
    idle = update.first + update.last
    early = "a step before the budget is final has more ranks than it"
    return [
        (idle >= link.steps,
         f"link.update: first and last are {idle} steps together: fewer than link.steps ({link.steps}) leave some in "
         "which the budget falls"),
        (update.rank >= rank,
         f"link.update.rank {update.rank} with allocate.rank {rank}: no gate would ever be closed; start with more"),
        (link.keep == "best", f"link.keep 'best' with link.update 'adalora': {early}; use link.keep: last"),
        (link.patience is not None, f"link.patience with link.update 'adalora': {early}; use link.patience: null"),
    ]  # fmt: skip
