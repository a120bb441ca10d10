"""The flow as a scheduled deployment on a local process; schedules run the branch's last commit."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

from cola_core.config.base import parse
from cola_core.config.reading import load_yaml
from cola_core.config.recipe import MachineConfig
from flows.child import quiet
from flows.slots import pool_size
from flows.snapshot import checkout, git

__all__ = ["serve"]


def serve(name: str, cron: str | None, every: float | None, gate: bool = False) -> None:
    """Announce the deployment and start its runs until stopped; runs can also be started from Prefect's UI.

    A server that goes away later is waited for, however long.

    Args:
        cron: when to start, such as `0 2 * * *`.
        every: seconds between two starts, instead of `cron`.
        gate: let each run's chain try for the champion's place.

    Raises:
        UserError: the last commit's params.yaml names no machine.
        RetryError: there is no server to begin with.
    """
    root = checkout()
    quiet()
    params = load_yaml(git(root, "show", "HEAD:params.yaml").decode())  # what its runs will take
    threads = parse(MachineConfig, params.get("machine"), "machine").threads
    from prefect.types.entrypoint import EntrypointType

    from flows.pipeline import cola_pipeline
    from flows.server import back_again, check_server

    check_server()
    when: dict[str, Any] = {"interval": timedelta(seconds=every)} if every else {"cron": cron}
    start = partial(
        cola_pipeline.serve,
        name=name,
        parameters={"committed": True, **({"promote": True} if gate else {})},
        limit=pool_size(threads),
        entrypoint_type=EntrypointType.MODULE_PATH,
        **when,
    )
    while True:
        try:
            return start()
        except Exception:  # Prefect gives up after three vain questions, however its groups of errors are nested
            if not back_again():
                raise
