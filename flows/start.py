"""Start one flow run from the command line: mistakes are told before Prefect is even imported."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_core.errors import RetryError, UserError
from cola_core.study.design import read_design
from flows.child import quiet
from flows.compose import compose
from flows.snapshot import checkout, snapshot, unpacked

if TYPE_CHECKING:
    from prefect import State

__all__ = ["register_winners", "start", "start_study"]


def start(picks: Mapping[str, str | None], seed: int | None, overrides: Sequence[str], committed: bool) -> None:
    """Check the parameters, run the flow, and print the command that adopts its results.

    Args:
        picks: {group of conf/: choice}; see `flows.pipeline.cola_pipeline` for the rest.

    Raises:
        UserError, RetryError: what went wrong, in the words of the stage that failed.
    """
    root = checkout()
    seeded = [*overrides, *([f"seed={seed}"] if seed is not None else [])]
    with unpacked(root, snapshot(root, committed), "conf", "params.yaml") as folder:
        compose(folder, picks, seeded)

    def pipeline() -> State[Any]:
        from flows.pipeline import cola_pipeline

        return cola_pipeline(**picks, seed=seed, overrides=list(overrides), committed=committed, return_state=True)

    _to_the_end(pipeline)


def start_study(file: Path, hours: float | None) -> None:
    """Run what is missing of a study, and print where its report is.

    Raises:
        UserError, RetryError: a mistake in the study's file, or what stopped a cell.
    """
    read_design(file)
    root = checkout()
    if not file.resolve().is_relative_to(root):
        raise UserError(f"{file}: outside the checkout {root}, whose code it would run; copy it there")
    inside = file.resolve().relative_to(root)

    def study() -> State[Any]:
        from flows.study.flow import cola_study

        return cola_study(str(inside), hours, return_state=True)

    _to_the_end(study)


def register_winners(file: Path) -> None:
    """Train the best chain of every task of a study again as a run of the pipeline, which registers it.

    Raises:
        UserError, RetryError: the study has no results, or what went wrong in a run.
    """
    from cola_core.study.results import read_results
    from cola_core.study.sweep import counted
    from flows.study.orders import planning
    from flows.study.winners import overrides_of, winners

    design = read_design(file)
    with planning(design, checkout()) as orders:
        made = filter(orders.makes, read_results(checkout() / design.out))
        best = list(winners(design, counted(design, made)))
    if not best:
        raise UserError(f"{design.out}: no recipe has all its seeds yet; run the study first")
    for result in best:
        print(f"{result.cell.name}: of the recipe with the lowest validation loss", flush=True)
        start({}, None, overrides_of(result), committed=False)


def _to_the_end(flow: Callable[[], State[Any]]) -> None:
    """Run a flow and tell its end: its last message, or its error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        state = _run(flow)
    except (KeyboardInterrupt, SystemExit):
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        raise
    if state.is_completed():
        print(state.message)
        return
    error = state.result(raise_on_failure=False)
    raise error if isinstance(error, RetryError) else UserError(state.message or f"the run ended as {state.name}")


def _run(flow: Callable[[], State[Any]]) -> State[Any]:
    """The server first, then the flow; its last state, whether Prefect could be told of it or not."""
    quiet()
    from httpx import HTTPError

    from flows.server import Unreported, check_server, gone

    check_server()
    try:
        return flow()
    except Unreported as end:
        if end.__cause__:
            raise end.__cause__ from None
        return end.state
    except HTTPError as error:
        gone.set()
        raise RetryError(f"Prefect's server went away ({error}); the same command goes on from here") from None
