"""The Prefect flow: one run of the pipeline in a workspace of its own, one task per stage that DVC knows."""

# No `from __future__ import annotations`: a deployment's process could not resolve the flow's own annotations.
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import prefect
from prefect import Task, get_run_logger, runtime
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.states import Completed, Failed
from pydantic import WithJsonSchema

from cola_core.config.params import Params, check_params
from cola_core.config.reading import load_yaml
from cola_core.errors import RetryError, UserError, system_told
from cola_core.sealed import read_sealed
from cola_core.secrets import mask
from flows.about import about
from flows.artifacts import show
from flows.child import Dvc
from flows.clean import trim
from flows.compose import choices, compose
from flows.gate import judge_challenger, lines
from flows.graph import Stage, outline
from flows.mend import mend
from flows.posting import post
from flows.server import only_shown, reported, stoppable
from flows.slots import pool_size, slot
from flows.snapshot import checkout, runs, snapshot, unpacked
from flows.workspace import Workspace, opened
from tasks.gate import SettledError

__all__ = ["cola_pipeline"]

PROJECT = Path(__file__).resolve().parents[1]
RETRY_SECONDS = 30.0
STRINGS = WithJsonSchema({"type": "array", "items": {"type": "string"}})
State = prefect.State[Any]


def _names(group: str) -> WithJsonSchema:
    """Prefect's UI offers the names in conf/<group>/ in a list; `compose` refuses others with its own clear line.

    A schema that said "or null" would hide the list behind a switch; a field left empty is not sent at all.
    """
    return WithJsonSchema({"type": "string", "enum": choices(PROJECT, group)})


@prefect.flow(name="cola-pipeline")
def cola_pipeline(
    method: Annotated[str | None, _names("method")] = None,
    task: Annotated[str | None, _names("task")] = None,
    model: Annotated[str | None, _names("model")] = None,
    chain: Annotated[str | None, _names("chain")] = None,
    seed: Annotated[int | None, WithJsonSchema({"type": "integer"})] = None,
    overrides: Annotated[list[str] | None, STRINGS] = None,
    committed: bool = False,
    promote: bool = False,
) -> State:
    """Fine-tune a model by a chain of low-rank adapters, then merge, evaluate and register it.

    A field left empty is as params.yaml stands. Every stage of dvc.yaml is a task; one that has nothing to do ends as
    Cached. The run works in a git worktree of its own; its last message is the command that brings the results to the
    checkout.

    Args:
        method: the recipe, from conf/method.
        task: the data and how they become prompts, from conf/task.
        model: the base model, from conf/model.
        chain: how many links, from conf/chain.
        seed: of every random stream.
        overrides: more settings as `key.key=value`, such as `link.learning_rate=1e-4`.
        committed: run the branch's last commit instead of the files as they stand, as schedules do.
        promote: let the registered chain try for the champion's place afterwards, as `cola promote` does.
    """
    picks = {"method": method, "task": task, "model": model, "chain": chain}
    changes = [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]
    with stoppable():
        return reported(_attempt(picks, changes, committed, promote))


def _attempt(picks: Mapping[str, str | None], changes: list[str], committed: bool, promote: bool) -> State:
    """The run, whose mistakes and outages are its end and no crash."""
    try:
        with system_told():
            root = checkout()
            for line in mend(root):
                get_run_logger().info(line)
            tree = snapshot(root, committed)
            with unpacked(root, tree, "conf", "params.yaml") as folder:
                text = compose(folder, picks, changes)
            ended, place = _run(root, tree, text)
            return _judged(check_params(load_yaml(text)), place, ended) if promote and ended.is_completed() else ended
    except (UserError, RetryError) as error:
        return Failed(message=str(error), data=error)


def _run(root: Path, tree: str, text: str) -> tuple[State, Path]:
    """Wait for a place, open the workspace, do the stages, hand the records on; returns the end and the workspace."""
    params = load_yaml(text)
    title = f"{params['recipe']}/{params['task']}/seed{params['seed']}"
    log = get_run_logger()
    only_shown("the run's name", lambda: _name(title))
    size = pool_size(params["machine"]["threads"])
    busy = f"all {size} places (cores / threads) are taken; this run starts when one is free"
    with slot(runs(root).parent / "slots", size, lambda: log.info(busy)), opened(root, tree, text, title) as workspace:
        log.info("workspace %s", workspace.path)
        failed = _stages(workspace)
        post(workspace.path)
        if failed:
            return failed, workspace.path
        workspace.finish()
        trim(root)
        return Completed(message=f"bring the results to the checkout: cola adopt {workspace.run}"), workspace.path


def _judged(params: Params, place: Path, ran: State) -> State:
    """The gate as one more task, for the run's own chain by its own settings, whatever is registered meanwhile."""
    version = read_sealed(place / "artifacts/register/registration.json", "registration")["version"]
    judged: State = gate(params, str(version), return_state=True)
    if judged.is_completed():
        return ran
    return Failed(message=judged.message, data=judged.result(raise_on_failure=False))


@prefect.task(name="gate", task_run_name="gate", cache_policy=NO_CACHE)
def gate(params: Params, version: str) -> State:
    """Judge a version; after a night without changes there is nothing to decide, and that is no failure."""
    try:
        told = list(lines(judge_challenger(params, params.registry.name, version)))
    except SettledError as error:
        return Completed(name="Cached", message=str(error))
    except (UserError, RetryError) as error:
        return Failed(message=str(error), data=error)
    for line in told:
        get_run_logger().info(line)
    return Completed(message=told[0])


def _name(title: str) -> None:
    with get_client(sync_client=True) as client:
        client.update_flow_run(runtime.flow_run.id, name=title)


def _stages(workspace: Workspace) -> State | None:
    """Every stage of the graph as a task, one at a time, up to the first that fails; returns the flow's failure."""
    ended: dict[str, State] = {}
    found, due = outline(workspace.path)  # the workspace is this run's alone: what is not due now will not be later
    with Dvc(workspace) as dvc:
        for stage in found:
            before = [ended[name] for name in stage.after]
            task = _as_task(workspace, stage, dvc if stage.name in due else None)
            state = task(return_state=True, wait_for=before)
            if not state.is_completed():
                return Failed(message=state.message, data=state.result(raise_on_failure=False))
            ended[stage.name] = state
    return None


def _as_task(workspace: Workspace, stage: Stage, dvc: Dvc | None) -> "Task[[], State]":
    """The Prefect task of one stage, named, described and retried as tasks/<stage>.py says; without `dvc`, Cached."""
    told = about(workspace.path, stage.task)

    def run_stage() -> State:
        log = get_run_logger()
        try:
            ran = dvc is not None and dvc.repro(stage.name, lambda line: log.info(mask(line)))
            show(workspace.path, stage)
            return Completed() if ran else Completed(name="Cached", message="nothing changed")
        except RetryError as error:
            if runtime.task_run.run_count <= told.retries:
                raise
            return Failed(message=str(error), data=error)
        except UserError as error:
            return Failed(message=str(error), data=error)

    return Task(
        run_stage,
        name=stage.name,
        task_run_name=stage.name,
        description=told.description,
        cache_policy=NO_CACHE,
        retries=told.retries,
        retry_delay_seconds=RETRY_SECONDS,
        retry_condition_fn=_may_succeed_later,
    )


def _may_succeed_later(_: Any, __: Any, state: State) -> bool:
    """Only exit code 75 says so."""
    return isinstance(state.result(raise_on_failure=False), RetryError)
