"""The pipeline and then the gate, as one flow for a schedule."""

# No `from __future__ import annotations`: a deployment's process could not resolve the flow's own annotations.
from typing import Any

import prefect
from prefect import get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from cola_core.errors import RetryError, UserError, system_told
from flows.gate import judge_challenger, lines
from flows.pipeline import ChainName, MethodName, ModelName, Overrides, Seed, TaskName, cola_pipeline
from flows.server import reported, stoppable
from flows.snapshot import checkout
from tasks.gate import SettledError

__all__ = ["cola_nightly"]

State = prefect.State[Any]


@prefect.flow(name="cola-nightly")
def cola_nightly(
    method: MethodName = None,
    task: TaskName = None,
    model: ModelName = None,
    chain: ChainName = None,
    seed: Seed = None,
    overrides: Overrides = None,
    committed: bool = True,
) -> State:
    """Run the pipeline, then let its chain try for the champion's place. Arguments: as of `cola-pipeline`."""
    ran: State = cola_pipeline(method, task, model, chain, seed, overrides, committed, return_state=True)
    if not ran.is_completed():
        return ran
    with stoppable():
        return reported(_gate())


def _gate() -> State:
    judged: State = gate(return_state=True)
    return Completed(message=judged.message) if judged.is_completed() else Failed(message=judged.message)


@prefect.task(name="gate", task_run_name="gate", cache_policy=NO_CACHE)
def gate() -> State:
    """Judge the challenger; after a night without changes there is nothing to decide, and that is no failure."""
    log = get_run_logger()
    try:
        with system_told():
            told = list(lines(judge_challenger(checkout(), None)))
    except SettledError as error:
        return Completed(name="Cached", message=str(error))
    except (UserError, RetryError) as error:
        return Failed(message=str(error), data=error)
    for line in told:
        log.info(line)
    return Completed(message=told[0])
