"""Prefect's server may be away at any moment: what only shows is left out then, and a run ends by its own verdict."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import httpx
from prefect import State, get_run_logger
from prefect.client.orchestration import get_client
from prefect.exceptions import Abort, TerminationSignal
from prefect.settings import PREFECT_API_TLS_INSECURE_SKIP_VERIFY, PREFECT_API_URL, PREFECT_HOME
from prefect.states import Crashed

from cola_core.errors import RetryError
from cola_core.locks import alone

__all__ = ["Unreported", "back_again", "check_server", "leave", "only_shown", "reported", "stoppable"]

PATIENCE = 5.0  # seconds for a server that accepts connections and says nothing

gone = Event()


class Unreported(Abort):
    """How a run ended when no server is there to be told.

    Prefect's engine passes an Abort on without a call; for any other end it would try for minutes and call it a crash.
    """

    def __init__(self, state: State[Any]) -> None:
        super().__init__(state.message)
        self.state = state
        gone.set()


def _trouble() -> str | None:
    """Why the server does not answer, in one line, or none; started first where it is a temporary one.

    Not by Prefect's client, which would try again for minutes.
    """
    try:
        health = f"{get_client(sync_client=True).api_url}health"
        httpx.get(health, timeout=PATIENCE, verify=not PREFECT_API_TLS_INSECURE_SKIP_VERIFY.value()).raise_for_status()
    except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: a temporary server that did not start
        return _line(error)
    return None


def only_shown(what: str, call: Callable[[], None]) -> None:
    """Make a call that results do not depend on; if the server is away, one warning stands in its place."""
    found = _trouble()
    try:
        if found is None:
            return call()
    except httpx.HTTPError as error:
        found = _line(error)
    get_run_logger().warning("Prefect's server is away (%s): %s not shown", found, what)
    return None


def reported(ended: State[Any]) -> State[Any]:
    """`ended`, for Prefect to report.

    Raises:
        Unreported: nobody is there to report it to.
    """
    if found := _trouble():
        get_run_logger().warning("Prefect's server is away (%s): its pages will not tell how this run ended", found)
        raise Unreported(ended)
    return ended


@contextmanager
def stoppable() -> Iterator[None]:
    """Let a stop through at once where nobody could be told: Ctrl-C in a terminal ends a temporary server too."""
    try:
        yield
    except (KeyboardInterrupt, TerminationSignal) as stop:
        if _trouble():
            raise Unreported(Crashed(message="stopped")) from stop
        raise


def _quiet() -> None:
    """Leave a line of what Prefect's observers tell with tracebacks of its insides when the server goes."""
    logging.raiseExceptions = False  # what cannot be logged to the server is on this terminal all the same
    logging.getLogger("prefect.events.clients").setLevel(logging.CRITICAL)
    for observer in ("FlowRunCancellingObserver", "FlowRunSuspendingObserver"):
        logging.getLogger(f"prefect.{observer}").addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = record.exc_text = None
    return True


def check_server() -> None:
    """Refuse to start without a server: the run would be seen by nobody.

    Raises:
        RetryError: no answer, and what to do.
    """
    _quiet()
    with alone(PREFECT_HOME.value() / "cola.lock"):  # two temporary servers that make one database spoil it
        found = _trouble()
    if found:
        gone.set()
        address = PREFECT_API_URL.value()
        advice = "start it with `cola ui`, or unset PREFECT_API_URL for a temporary one" if address else "try again"
        raise RetryError(f"Prefect's server at {address or 'a free port'}: no answer ({found}); {advice}")


def back_again(poll: float = 5.0) -> bool:
    """Whether the server had gone, once it is there again; one line tells that it is waited for."""
    if (found := _trouble()) is None:
        return False
    print(f"Prefect's server is away ({found}); waiting for it", file=sys.stderr, flush=True)
    while _trouble():
        time.sleep(poll)
    return True


def leave(code: int) -> None:
    """End this process here if the server is gone.

    On the ordinary way out Prefect tries for minutes to send all that waits.
    """
    if not gone.is_set():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if not PREFECT_API_URL.value():
        from prefect.server.api.server import SubprocessASGIServer

        SubprocessASGIServer().stop()
    os._exit(code)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:300]
