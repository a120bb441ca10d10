"""Start one flow run from the command line: mistakes are told before Prefect is even imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cola_core.errors import RetryError, UserError
from flows.child import quiet
from flows.compose import compose
from flows.snapshot import checkout, snapshot, unpacked

__all__ = ["start"]


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
    quiet()
    from flows.pipeline import cola_pipeline

    state = cola_pipeline(**picks, seed=seed, overrides=list(overrides), committed=committed, return_state=True)
    if state.is_completed():
        print(state.message)
        return
    error = state.result(raise_on_failure=False)
    raise error if isinstance(error, RetryError) else UserError(state.message or f"the run ended as {state.name}")
