"""A process that runs cells of a study: the stages that DVC would run, one after the other, in one process.

Orders come as lines of JSON, each answered by one. What no link has touched yet - data, head, the base's
scores, the first probe - is kept by what decides it and shared between cells; the rest lies in the cell's own folder.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_core.config.reading import read_yaml
from cola_core.errors import RetryError, TrainingError, UserError, of_the_system
from cola_core.files import new_dir, read_json, tree_hash, write_json
from cola_core.locks import alone
from cola_core.secrets import guard, mask
from tasks.context import open_context
from tasks.follow import end_with_parent
from tasks.harvest import harvest, leave_record
from tasks.places import home
from tasks.records import identity, machine
from tasks.resume import ROOT, forget_finished
from tasks.stage import Stopped, prepare_process

__all__ = ["StageOrder", "main"]


@dataclass(frozen=True)
class StageOrder:
    """One stage as dvc.yaml resolves it.

    name: such as `link@2`; params: dotted keys of params.yaml; deps, outs: paths as dvc.yaml has them;
    shared: whether no link comes before it, so that other cells may have the same outs.
    """

    name: str
    params: list[str]
    deps: list[str]
    outs: list[str]
    shared: bool

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """What it reads of params.yaml, by dotted key; none where something is left out."""
        return {dotted: _value(raw, dotted) for dotted in self.params}


def main() -> None:
    """Answer `{"folder": ..., "stages": [...], "record": ...}` with `{"result": ...}` or `{"error": ..., ...}`.

    The result is what `tasks.harvest` takes of a cell that has trained, and what each stage took; of one whose
    training failed, why. The folder holds the cell's params.yaml, and its outs until whoever ordered it removes it.
    An error has its line, its stage and a code: 2 is a mistake, 75 may succeed later, 1 is a crash.
    """
    guard()
    prepare_process()
    end_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        for line in sys.stdin:
            order = json.loads(line)
            stages = [StageOrder(**stage) for stage in order["stages"]]
            answer = _answer(Path(order["folder"]), stages, order["record"])
            print(json.dumps(answer), file=answers, flush=True)


def _answer(folder: Path, stages: list[StageOrder], noted: Mapping[str, Any]) -> dict[str, Any]:
    os.chdir(folder)
    with _log(folder / "log.txt"):
        spent, stage, started = dict[str, Any](), "harvest", time.time()
        try:
            raw = read_yaml(Path("params.yaml"))
            importlib.import_module("torch").set_num_threads(raw["machine"]["threads"])
            for order in stages:
                stage = order.name
                spent[stage] = _bring(order, raw)
            forget_finished()
            trained = any(name.startswith("link@") for name in spent)
            found = harvest(raw) if trained else {}
        except TrainingError as error:
            found, trained = {"failed": str(error)}, True
        except (UserError, RetryError) as error:
            return _told(stage, error, error.exit_code)
        except Exception as error:
            refused = of_the_system(error)
            return _told(stage, refused or error, refused.exit_code if refused else 1)
        finally:
            gc.collect()
        if trained:
            leave_record(noted, raw, found, started)
        return {"result": {**found, "spent": spent, "machine": machine()}}


def _told(stage: str, error: Exception, code: int) -> dict[str, Any]:
    line = " ".join(str(error).split()) or type(error).__name__
    return {"error": mask(line if code != 1 else f"{type(error).__name__}: {line}"), "stage": stage, "code": code}


def _bring(order: StageOrder, raw: Mapping[str, Any]) -> dict[str, float]:
    """Make the outs of one stage, or take them from where the same stage left them; returns what making them took."""
    key = _key(order, raw)
    if not order.shared:
        stamp = Path("stages") / f"{order.name}.json"
        if not (stamp.is_file() and read_json(stamp)["key"] == key):
            begun = stamp.with_suffix(".begun")
            cut = {"interrupted": 1.0} if begun.is_file() else {}  # what was spent before a kill, nobody knows
            stamp.parent.mkdir(exist_ok=True)
            begun.touch()
            write_json(stamp, {"key": key, "spent": _run(order) | cut})
        return dict(read_json(stamp)["spent"])
    place = home() / "studies" / "shared" / key
    with alone(place.with_suffix(".lock")):
        if not place.is_dir():
            spent = _run(order)
            with new_dir(place) as folder:
                write_json(folder / "spent.json", spent)
                _keep(order, folder)
    os.utime(place)  # its age is counted from its last use
    for out in order.outs:
        _point(Path(out), place / out)
    return dict(read_json(place / "spent.json"))


def _run(order: StageOrder) -> dict[str, float]:
    """Run one stage; returns its seconds by the clock and by the processor, which other work does not stretch."""
    name, _, key = order.name.partition("@")
    context = open_context(name, key or None)
    context.watched = False
    began, computed = time.monotonic(), time.process_time()
    importlib.import_module(f"tasks.{name}").main(context)
    return {"seconds": round(time.monotonic() - began, 3), "cpu": round(time.process_time() - computed, 3)}


def _keep(order: StageOrder, folder: Path) -> None:
    """Move what the stage has made to where every cell finds it."""
    for out in order.outs:
        (folder / out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).replace(folder / out)


def _point(out: Path, place: Path) -> None:
    if out.is_symlink() and out.readlink() == place:
        return
    if out.is_dir() and not out.is_symlink():  # left by a process that was killed before it could hand it over
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.symlink_to(place)


def _key(order: StageOrder, raw: Mapping[str, Any]) -> str:
    """What decides the stage's outs, as DVC sees it: parameters, what it reads, and the code."""
    reads = {dep: identity(Path(dep)) if dep.startswith("artifacts/") else tree_hash(ROOT / dep) for dep in order.deps}
    values = order.values(raw)
    text = json.dumps([order.name, values, reads], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _value(raw: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        raw = raw.get(part) if isinstance(raw, Mapping) else None
    return raw


@contextmanager
def _log(path: Path) -> Iterator[None]:
    """What the stages print, and whatever their libraries do, goes to a file."""
    before = [os.dup(1), os.dup(2)]
    with path.open("ab") as file:
        sys.stdout.flush()
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, saved in zip((1, 2), before, strict=True):
                os.dup2(saved, number)
                os.close(saved)


if __name__ == "__main__":
    try:
        main()
    except Stopped as stopped:
        sys.exit(128 + stopped.number)
