"""A plan as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from flows.plan import Line, Plan

__all__ = ["print_plan"]

FATES = {"run": "runs", "restore": "from the cache", "keep": "up to date"}


def print_plan(plan: Plan) -> None:
    """Print stages with their costs, the timings, the setting to choose, and what cannot be known yet."""
    console = Console()
    table = Table("stage", "", "trained", "memory", "TFLOP", "time")
    for line in plan.lines:
        table.add_row(*_cells(line))
    console.print(table)
    due = [line.seconds for line in plan.lines if line.fate == "run" and line.seconds is not None]
    if due:
        console.print(f"stages that run, together: about {_duration(sum(due))}")
    for timing in plan.timings:
        setting = f"{timing.machine.device}, {timing.machine.threads} thread(s), {timing.machine.dtype}"
        console.print(
            f"micro-step of {timing.work.tokens:,.0f} tokens: {timing.seconds:.2f} s on {setting}", highlight=False
        )
    if plan.timings:
        better = plan.better
        words = f"fastest here: {better.argument}" if better else "the setting in params.yaml is as fast as any here"
        console.print(words, style="bold", highlight=False)
    for words in plan.unknown:
        console.print(words, style="dim", highlight=False)


def _cells(line: Line) -> list[str]:
    fate, cost = FATES[line.fate], line.cost
    if cost is None:
        return [line.stage, fate, "", "", "", ""]
    trained = f"{cost.trainable:,}" if cost.trainable else ""
    work = f"{cost.flops / 1e12:.2f}" if cost.flops is not None else "?"
    seconds = _duration(line.seconds) if line.seconds is not None else "?"
    return [line.stage, fate, trained, f"{cost.memory / 2**20:,.0f} MiB", work, seconds]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
