"""What every stage shares: read params.yaml, refuse mistakes in one line, run, and leave a record of the run."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from cola_core.config.base import parse, read_yaml
from cola_core.errors import RetryError, UserError, of_the_system
from cola_core.files import write_json
from cola_core.secrets import guard, mask
from tasks.follow import follow
from tasks.records import record

__all__ = ["Context", "Done", "run"]

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
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Done:
    """What a stage tells of itself when it has ended well.

    metrics: numbers for the record; inputs, outputs: paths whose hashes tie records together;
    artifacts: files worth keeping with an MLflow run; series: {metric: [[step, value], ...]} curves.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    inputs: Sequence[Path] = ()
    outputs: Sequence[Path] = ()
    artifacts: Sequence[Path] = ()
    series: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass
class Context:
    """The parameters of one stage, and a note of those it read."""

    stage: str
    key: str | None
    raw: dict[str, Any]
    record_id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    used: dict[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """A top-level value such as `seed`.

        Raises:
            UserError: params.yaml does not have it.
        """
        if name not in self.raw:
            raise UserError(f"params.yaml: {name}: missing")
        self.used[name] = self.raw[name]
        return self.raw[name]

    def section(self, model: type[Model], name: str, key: str | None = None) -> Model:
        """Section `name`, with the changes of link `key` (default: the stage's own link) laid over it.

        Raises:
            UserError: a mistake in the section.
        """
        key = key or self.key
        changes = self.raw["chain"][key].get(name, {}) if key else {}
        data = {**self.value(name), **changes} if changes else self.value(name)
        self.used[name] = data
        return parse(model, data, f"chain.{key}.{name}" if changes else name)


def open_context(stage: str, key: str | None, params: Path = Path("params.yaml")) -> Context:
    """Read and check params.yaml for one stage.

    The whole file is checked, so that a mistake in link 2 is told before link 1 has trained. The checker is imported by
    name: it can only refuse, never change an output, so it is no dependency of the stage in dvc.yaml.

    Raises:
        UserError: any mistake in the file, or a link that the chain does not have.
    """
    raw = read_yaml(params)
    importlib.import_module("cola_core.config.params").check_params(raw)
    if key is not None and key not in raw["chain"]:
        raise UserError(f"params.yaml: chain has no link '{key}'; it has {', '.join(raw['chain'])}")
    return Context(stage=f"{stage}@{key}" if key else stage, key=key, raw=raw)


def run(stage: Callable[[Context], Done]) -> None:
    """Run one stage as `python -m tasks.<stage> [link]` and exit: 0, 2 for a user's mistake, 75 to try again later."""
    guard()
    for name, value in {**QUIET, **STEADY}.items():
        os.environ.setdefault(name, value)
    gc.set_threshold(IMPORTED)
    atexit.register(gc.freeze)  # nor need Python look through all of it before it goes: a second more
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
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
