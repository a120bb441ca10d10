"""The study as a Prefect flow: every cell is a task run, on floor(cores / threads) processes."""

# No `from __future__ import annotations`: a deployment's process could not resolve the flow's own annotations.
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from queue import Queue
from typing import Any

import prefect
from prefect import Task, get_run_logger, runtime
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from cola_core.config.reading import read_yaml
from cola_core.errors import RetryError, UserError, system_told
from cola_core.files import tree_hash
from cola_core.locks import try_lock
from cola_core.study.design import Cell, Design, Group, read_design
from cola_core.study.results import Result, read_results, result_file
from cola_core.study.sweep import counted, current, wanted
from flows.posting import post
from flows.server import reported, stoppable
from flows.slots import pool_size
from flows.snapshot import checkout
from flows.study.board import Board, board
from flows.study.disk import used
from flows.study.estimate import estimate
from flows.study.keep import keep
from flows.study.orders import Orders, planning
from flows.study.pool import Pool
from flows.study.writing import write_report
from tasks.places import home

__all__ = ["cola_study"]

RETRIES, RETRY_SECONDS = 2, 10.0
OLD = "superseded"
DYING = 3.0  # seconds in which a study that was killed lets go of its lock
State = prefect.State[Any]
Ended = tuple[Cell, Result | Exception]


@prefect.flow(name="cola-study")
def cola_study(file: str, hours: float | None = None) -> State:
    """Run every cell of a study that has no result yet, then write its report; a result, once written, is final.

    Args:
        file: the study's file, relative to the checkout.
        hours: start no cell after so many; what runs then is finished.
    """
    with stoppable():
        return reported(_attempt(Path(file), hours))


def _attempt(file: Path, hours: float | None) -> State:
    try:
        with system_told():
            root = checkout()
            design = read_design(root / file)
            lock = try_lock(home() / "studies" / f"{design.name}.lock", DYING)
            if lock is None:
                raise RetryError(f"{design.name}: this study is already going; wait for it")
            with lock, planning(design, root) as orders:
                return _Study(design, root, orders).run(hours)
    except (UserError, RetryError) as error:
        return Failed(message=str(error), data=error)


@contextmanager
def _closed_early(pool: Pool) -> Iterator[None]:
    """End what the pool runs where a stop ends the block, instead of waiting for it."""
    try:
        yield
    except BaseException:
        pool.close()
        raise


@dataclass
class _Study:
    design: Design
    root: Path
    orders: Orders

    def run(self, hours: float | None) -> State:
        """Cells until none is missing, the time is over, or one shows a mistake in the study."""
        until = time.monotonic() + hours * 3600 if hours is not None else float("inf")
        folder = self.root / self.design.out
        self._set_aside(folder)
        results = current(self.design, read_results(folder))
        size = self._size()
        with Pool(self.orders.code, self.root, size) as pool:
            self._tell_estimate(results, pool, size, hours)
            trouble = self._cells(Board(self.design, results, size), pool, until)
        post(self.root)
        page = write_report(self.orders, self.root) if counted(self.design, results) else None
        if trouble is not None:
            return Failed(message=str(trouble), data=trouble)
        shared = home() / "studies"
        get_run_logger().info(
            "disk: results %.1f MiB; what cells share %.0f MiB in %s, of which `cola clean` removes what is old",
            *(used(folder) / 2**20, used(shared) / 2**20, shared),
        )
        left = len(list(wanted(self.design, results)))
        told = f"{left} cells are left; the same command goes on" if left else "all cells are done"
        return Completed(message=f"{told}; report: {page}")

    def _tell_estimate(self, results: list[Result], pool: Pool, size: int, hours: float | None) -> None:
        missing = list(wanted(self.design, results))
        if not missing:
            return
        seconds = estimate(self.design, self.orders, results, pool, home() / "studies" / self.design.name)
        limit = f"; stops after {hours:g} h" if hours is not None else ""
        get_run_logger().info(
            "%s: %d results are there; the rest takes about %.1f h on %d processes, more where a grid is extended%s",
            *(self.design.name, len(results), seconds / 3600 / size, size, limit),
        )

    def _cells(self, shown: Board, pool: Pool, until: float) -> Exception | None:
        """Keep all processes busy; returns what showed a mistake, after which no further cell was started."""
        ended: Queue[Ended] = Queue()
        running: dict[Cell, PrefectFuture[Any]] = {}
        trouble: Exception | None = None
        threads: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(shown.size)
        with board(shown), threads as runner, _closed_early(pool):
            while True:
                going = trouble is None and time.monotonic() < until
                waiting = (cell for cell in wanted(self.design, shown.results) if cell not in running)
                for cell in islice(waiting, shown.size - len(running)) if going else ():
                    shown.started(cell)
                    running[cell] = runner.submit(self._task(cell, pool, ended.put), {}, [])
                if not running:
                    return trouble
                cell, outcome = ended.get()
                running.pop(cell).wait()
                if isinstance(outcome, Exception):
                    trouble = outcome
                else:
                    get_run_logger().info(shown.ended(outcome))

    def _set_aside(self, folder: Path) -> None:
        """Keep results whose parameters are not those of the study in `superseded/`, until they are again."""
        for here, there, made in ((folder / OLD, folder, True), (folder, folder / OLD, False)):
            for result in read_results(here):
                if self.orders.makes(result) == made:
                    told = "taken back" if made else "of other parameters than the study has now; set aside"
                    get_run_logger().warning("%s: %s", result.cell.name, told)
                    (there / "cells").mkdir(parents=True, exist_ok=True)
                    file = result_file(here, result.cell, result.content["key"])
                    file.replace(there / "cells" / file.name)

    @cached_property
    def groups(self) -> set[Group]:
        """Every group of the study, each composed and checked before the first cell starts."""
        groups = list(self.design.groups())
        for group in groups:
            self.orders.of_group(group)
        return set(groups)

    @cached_property
    def version(self) -> str:
        """A hash of the code that stages depend on by dvc.yaml: other edits change no result."""
        stages = read_yaml(self.orders.code / "dvc.yaml")["stages"].values()
        files = {dep for stage in stages for dep in stage.get("do", stage)["deps"] if dep.endswith(".py")}
        text = "".join(tree_hash(self.orders.code / file) for file in sorted(files))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _size(self) -> int:
        """Cells that run at once: those with most threads decide."""
        return min(pool_size(self.orders.of_group(group)["machine"]["threads"]) for group in self.groups)

    def _task(self, cell: Cell, pool: Pool, ended: Callable[[Ended], None]) -> "Task[[], State]":
        def run_cell() -> State:
            try:
                result = self._cell(cell, pool)
            except (UserError, RetryError) as error:
                if isinstance(error, RetryError) and not pool.closed and runtime.task_run.run_count <= RETRIES:
                    raise
                ended((cell, error))
                return Failed(message=str(error), data=error)
            except BaseException as error:
                mistake = UserError(f"{cell.name}: {type(error).__name__}: {error}")
                ended((cell, mistake))
                if isinstance(error, Exception):
                    return Failed(message=str(mistake), data=mistake)
                raise
            ended((cell, result))
            return Completed(name="Diverged", message=result.content["failed"]) if result.failed else Completed()

        return Task(
            run_cell,
            name="cell",
            task_run_name=cell.name,
            cache_policy=NO_CACHE,
            retries=RETRIES,
            retry_delay_seconds=RETRY_SECONDS,
        )

    def _cell(self, cell: Cell, pool: Pool) -> Result:
        planned = self.orders.plan(cell)
        folder = home() / "studies" / self.design.name / f"{cell.name}-{planned.key[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "params.yaml").write_text(planned.params, encoding="utf-8")
        result = keep(self.root / self.design.out, planned, pool.run(planned.order(folder)), self.version)
        shutil.rmtree(folder, ignore_errors=True)
        return result
