"""A link's losses in MLflow while it trains, from a thread: training never waits for it and never fails with it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any

from cola_core.errors import RetryError, UserError, system_told
from cola_core.locks import alone
from cola_core.secrets import mask
from tasks.context import Context
from tasks.places import home
from tasks.store import Store, open_store

__all__ = ["Live"]

PATIENCE = 30.0  # seconds that `close` waits for a slow store
HURRY = 2.0  # and after a stop or a failure, which must not wait for it: `sync` ends the run too

Point = tuple[int, int, dict[str, float]]  # step, milliseconds since 1970, values


class Live:
    """The live run of one stage: `step` and `close`, or a with-block that closes by itself.

    The run bears the stage's record id, so `sync` completes this run instead of making a second one. MLflow is
    imported in the thread, at the first step after `after` seconds: it takes seconds of a core, and a stage that has
    ended by then has nobody watching; its curve is posted by `sync`, as after any trouble, which is one printed line.
    """

    def __init__(self, context: Context, after: float = 0.0) -> None:
        self._begin = time.monotonic() + after
        self._run = {"id": context.record_id, "stage": context.stage, "experiment": context.raw["register"]["name"]}
        self._points: SimpleQueue[Point | None] = SimpleQueue()
        self._status = "FINISHED"
        self._thread: Thread | None = None

    def __enter__(self) -> Live:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        self.close("KILLED" if stopped else "FAILED" if kind else "FINISHED")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over the numbers of one step; returns at once."""
        self._points.put((step, int(time.time() * 1000), dict(values)))
        if self._thread is None and time.monotonic() >= self._begin:
            self._thread = Thread(target=self._work, name="mlflow-live", daemon=True)
            self._thread.start()

    def close(self, status: str = "FINISHED") -> None:
        """Write out what is queued and end the run with an MLflow status (FINISHED, FAILED, KILLED)."""
        if self._thread is None:
            return
        self._status = status
        self._points.put(None)
        self._thread.join(PATIENCE if status == "FINISHED" else HURRY)
        if self._thread.is_alive():
            self._tell("MLflow is slow; `cola sync` posts the rest")
        self._thread = None

    def _work(self) -> None:
        """Log, in a locked file: while it is, `sync` leaves the run alone; later it sees that the process died."""
        marker = home() / "live" / f"{self._run['id']}.json"
        try:
            with system_told(), alone(marker):
                marker.write_text(json.dumps(self._run), encoding="utf-8")
                with open_store() as store:
                    self._log_all(store)
        except (UserError, RetryError) as error:
            self._tell(str(error))
        except Exception as error:  # training must outlive whatever a tracking store can think of
            self._tell(mask(f"MLflow: {error!r}"))

    def _log_all(self, store: Store) -> None:
        run_id = store.run(self._run, int(time.time() * 1000)).info.run_id
        store.client.set_tag(run_id, "cola.stage", self._run["stage"])
        while points := self._waiting():
            store.log(run_id, "metrics", _metrics([point for point in points if point]))
            if points[-1] is None:
                break
        store.client.set_terminated(run_id, self._status)

    def _waiting(self) -> list[Point | None]:
        """At least one point, and all others that wait, since one call for many costs what one call for one does."""
        points = [self._points.get()]
        while points[-1] is not None:
            try:
                points.append(self._points.get_nowait())
            except Empty:
                break
        return points

    def _tell(self, line: str) -> None:
        print(f"{self._run['stage']}: live log: {' '.join(line.split())}", file=sys.stderr, flush=True)


def _metrics(points: list[Point]) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(name, float(value), at, step) for step, at, values in points for name, value in values.items()]
