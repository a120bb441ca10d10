"""How every stage runs: mistakes and stops are one line, and a record of the run is left for MLflow."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cola_core.errors import RetryError, UserError, of_the_system
from cola_core.files import write_json
from cola_core.secrets import guard, mask
from tasks.context import Context, Done, open_context
from tasks.follow import follow
from tasks.records import record

__all__ = ["Stopped", "prepare_process", "run"]

QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
IMPORTED = 50_000  # new objects between two collections: torch's and transformers' stay, 700 at a time costs a second
# Intel's kernels else may split a sum by the load and the caches they find; this costs nothing and fixes both.
STEADY = {"MKL_CBWR": "AUTO"}


def run(stage: Callable[[Context], Done]) -> None:
    """Run one stage as `python -m tasks.<stage> [link]` and exit: 0, 2 for a user's mistake, 75 to try again later."""
    guard()
    prepare_process()
    name = Path(sys.argv[0]).stem
    try:
        follow(name)
        context = open_context(name, sys.argv[1] if len(sys.argv) > 1 else None)
        _tracked(stage, context)
    except (UserError, RetryError) as error:
        sys.exit(_complain(name, str(error), error.exit_code))
    except Stopped as stopped:
        line = "stopped; the same command goes on from here, a link from its last step"
        sys.exit(_complain(name, line, 128 + stopped.number))


def prepare_process() -> None:
    """The environment, the collector and the signals of a process that runs stages."""
    for name, value in {**QUIET, **STEADY}.items():
        os.environ.setdefault(name, value)
    gc.set_threshold(IMPORTED)
    atexit.register(gc.freeze)  # nor need Python look through all of it before it goes: a second more
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; what is open is closed and a link's checkpoint is written on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _stop(number: int, _: object) -> None:
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)  # a second one would cut off what the first one saves
    raise Stopped(number)


def _tracked(stage: Callable[[Context], Done], context: Context) -> None:
    """Run and record; a crash leaves a record too, but a user's mistake or a full disk leaves nothing."""
    started = time.time()
    try:
        record(context, stage(context), started)
    except (UserError, RetryError):
        raise
    except Exception as error:
        if refused := of_the_system(error):
            raise refused from error
        with suppress(OSError):
            record(context, Done(), started, "FAILED")
        raise


def _complain(stage: str, line: str, code: int) -> int:
    """One line on stderr, and for a flow that asks (COLA_FAILURE names a file) the exit code that DVC hides from it."""
    told = mask(f"{stage}: {' '.join(line.split())}")
    print(told, file=sys.stderr, flush=True)
    if note := os.environ.get("COLA_FAILURE"):
        with suppress(OSError):
            write_json(Path(note), {"code": code, "line": told})
    return code
