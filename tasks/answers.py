"""What both evaluation stages share: the test sample, a model of the chain, and its answers with progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.context import Context
from tasks.places import ARTIFACTS
from tasks.progress import progress

if TYPE_CHECKING:
    from cola_core.evaluation.answers import Answers
    from cola_core.lineage import Link
    from cola_core.rows import Row, Task

__all__ = ["BASE", "PREPARED", "answers_of", "test_sample"]

BASE, PREPARED = ARTIFACTS / "fetch/model", ARTIFACTS / "prepare"


def test_sample(context: Context) -> tuple[Task, list[Row]]:
    """The task and the rows that every model of this run is scored on."""
    from cola_core.config.report import EvaluateConfig
    from cola_core.evaluation.answers import sample
    from cola_core.rows import Task
    from cola_core.split_files import read_rows

    config = context.section(EvaluateConfig, "evaluate")
    rows = sample(read_rows(PREPARED / "test.arrow"), config.rows)
    return Task.read(PREPARED / "task.json"), rows


def answers_of(context: Context, name: str, chain: Sequence[Link], task: Task, rows: Sequence[Row]) -> Answers:
    """Rebuild base + chain and let it answer `rows`."""
    from cola_core.config.recipe import MachineConfig
    from cola_core.config.report import EvaluateConfig
    from cola_core.data.tokens import open_tokenizer
    from cola_core.evaluation.answers import answer
    from cola_core.knot import open_chain

    config = context.section(EvaluateConfig, "evaluate")
    objective = open_chain(BASE, chain, task, context.section(MachineConfig, "machine"))
    tokenizer: Any = open_tokenizer(BASE) if task.kind == "generate" else None  # nothing else is decoded
    with progress(f"{context.stage} {name}") as tick:
        return answer(
            objective,
            rows,
            config.batch,
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            lambda done, total, tokens: tick(done, total, tokens, ""),
            config.batch_tokens,
        )
