"""What a link is too short for, or would hand on before it is done: ranks that are closed or moved while it trains."""

from __future__ import annotations

from cola_core.config.recipe import AllocateConfig, LinkConfig
from cola_core.config.training_values import Ablation, AdaLora, Beam

__all__ = ["refused_rounds"]


def refused_rounds(link: LinkConfig, allocate: AllocateConfig) -> list[tuple[bool, str]]:
    """Every reason with whether it holds for `link` and the ranks that it starts with."""
    pruning, steps = link.pruning, link.steps
    budget = _refused_budget(link, link.update, allocate) if isinstance(link.update, AdaLora) else []
    return [
        *budget,
        (isinstance(pruning, Ablation) and pruning.first >= steps,
         f"link.pruning.first {getattr(pruning, 'first', 0)} with link.steps {steps}: no round would have its turn; "
         f"set it to at most {steps - 1}, or raise schedule.horizon, which the links share"),
        (isinstance(pruning, Beam) and 2 * pruning.every > steps,
         f"link.pruning.every {getattr(pruning, 'every', 0)} with link.steps {steps}: no rank would ever be pruned; "
         f"set it to at most {steps // 2}, or raise schedule.horizon, which the links share"),
    ]  # fmt: skip


def _refused_budget(link: LinkConfig, update: AdaLora, allocate: AllocateConfig) -> list[tuple[bool, str]]:
    same, rank = allocate.allocator.kind in ("uniform", "layer_subset"), allocate.rank
    idle = update.first + update.last
    early = "a step before the budget is final has more ranks than it"
    return [
        (idle >= link.steps,
         f"link.update: first and last are {idle} steps together: fewer than link.steps ({link.steps}) leave some in "
         "which the budget falls"),
        (same and update.rank >= rank,  # what other allocators give is known when the link starts
         f"link.update.rank {update.rank} with allocate.rank {rank}: no gate would ever be closed; start with more"),
        (link.keep == "best", f"link.keep 'best' with link.update 'adalora': {early}; use link.keep: last"),
        (link.patience is not None, f"link.patience with link.update 'adalora': {early}; use link.patience: null"),
    ]  # fmt: skip
