"""One life: a clone whose command is killed, every process of it, and started again until it has ended well."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from cola_core.config.reading import read_yaml
from tests.chaos.triggers import ANY, Trigger, somewhere, trigger
from tests.tiny import environment

__all__ = ["STAGES", "Life", "misplaced"]

STAGES = ["fetch", "prepare", "head", "evaluate_base"]
STAGES += [f"{name}@{link}" for link in (1, 2) for name in ("profile", "allocate", "link")]
STAGES += ["merge", "evaluate", "register"]
COLA = [sys.executable, "-m", "flows.cli"]
MAKE, FLOW = ["make", "run"], [*COLA, "run"]
PATIENCE = 3600.0  # seconds after which a command that was not killed has hung
TICK = re.compile(r"link@(\d): (\d+)/")
STAGE = re.compile(r"Running stage '(\w+)")


@dataclass
class Life:
    """One clone, its kills so far, and what went wrong.

    leap: whether the first kill may fall into any stage; else into the next ones, as all others do.
    """

    folder: Path
    cache: str
    draw: random.Random
    slow: float = 1.0
    leap: bool = True
    kills: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def live(self, most: int, flows: float = 0.2) -> None:
        """Kill up to `most` times, then let it end; `flows`: the share of `cola run`, twice that in the end."""
        while len(self.kills) < most and not self.failures:
            command = FLOW if self.draw.random() < flows else MAKE
            if not self._start(command, self._next()):
                break
        if not self.failures:
            self._end(by_flow=self.draw.random() < 2 * flows)

    def _next(self) -> Trigger:
        if self.leap and not self.kills:
            return somewhere(self.draw, STAGES, PATIENCE)
        return trigger(self.draw, self.slow, self._steps(), self._ahead())

    def _end(self, by_flow: bool) -> None:
        """Let the command end; a flow's results are then brought to the checkout."""
        self._start(FLOW if by_flow else MAKE, None)
        if by_flow and not self.failures:
            name = re.findall(r"cola adopt (\S+)", (self.folder.parent / "log").read_text())[-1]
            self._start([*COLA, "adopt", name], None)

    def _start(self, command: list[str], trigger: Trigger | None) -> bool:
        """Run the command until it is killed (True) or ends by itself."""
        before, log = _kept_steps(self.folder), self.folder.parent / "log"
        with log.open("w") as out:
            child = subprocess.Popen(
                command, cwd=self.folder, env=self._environment(), stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            killed = self._wait(child, trigger, log)
        text = log.read_text(errors="replace")
        self.failures += misplaced(text, before, self._steps())
        if killed:
            where = ["no stage", *STAGE.findall(text)][-1]
            self.kills.append(f"{'cola run' if command is FLOW else 'make run'}, {killed}: {where}")
        elif child.returncode:
            self.failures.append(f"after {self.kills[-1:]}: exit code {child.returncode}\n{text[-3000:]}")
        return bool(killed)

    def _wait(self, child: subprocess.Popen[bytes], trigger: Trigger | None, log: Path) -> str:
        """When it was killed; nothing where it ended by itself."""
        limit = time.monotonic() + (trigger.latest if trigger else PATIENCE)
        while child.poll() is None:
            due = bool(trigger and self._due(trigger, log))
            if due or time.monotonic() > limit:
                time.sleep(trigger.after if trigger and due else 0.0)
                if child.poll() is not None:
                    break  # meanwhile, by itself
                self._kill()
                child.wait()
                if trigger is None:
                    self.failures.append(f"hung\n{log.read_text(errors='replace')[-3000:]}")
                return trigger.name if trigger and (due or trigger.name == ANY) else ANY
            time.sleep(0.005)
        return ""

    def _due(self, trigger: Trigger, log: Path) -> bool:
        if trigger.text:
            return bool(re.search(trigger.text, log.read_text(errors="replace")))
        with suppress(FileNotFoundError):  # a folder went while it was looked through
            return bool(trigger.files) and next(self.folder.glob(trigger.files), None) is not None
        return False

    def _environment(self) -> dict[str, str]:
        temporary = self.folder.parent / "tmp"
        temporary.mkdir(exist_ok=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        quiet = {"PREFECT_HOME": str(self.folder.parent / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        mark = {"COLA_CHAOS": str(self.folder), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PATH": path}
        return environment(self.cache) | quiet | mark

    def _kill(self) -> None:
        """SIGKILL to every process of this life, in whatever group it is."""
        while found := list(self._processes()):
            for number in found:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.01)

    def _processes(self) -> Iterator[int]:
        mark = f"COLA_CHAOS={self.folder}\0".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes() and b"\nState:\tZ" not in (entry / "status").read_bytes():
                    yield int(entry.name)

    def _steps(self) -> int:
        return int(read_yaml(self.folder / "params.yaml")["chain"]["1"]["link"]["steps"])

    def _ahead(self) -> list[str]:
        """The next stages of the checkout, without their links."""
        lock = self.folder / "dvc.lock"
        text = lock.read_text() if lock.exists() else ""  # a kill may have cut it off
        return [name.partition("@")[0] for name in STAGES if f"  {name}:\n" not in text][:3]


def _kept_steps(root: Path) -> list[int]:
    """The last step of every link that has a checkpoint."""
    kept = []
    for path in (root / ".cola/resume").glob("*/state.safetensors"):
        with safe_open(path, framework="pt") as file:
            kept.append(int(json.loads(file.metadata()["progress"])["step"]))
    return kept


def misplaced(text: str, kept: list[int], steps: int) -> list[str]:
    """What is wrong with the first step a command told of: it is the one after the checkpoint.

    Or the checkpoint's own, if its validation was pending; 1 if no link was under way.

    Args:
        text: what the command printed.
        kept: the steps of the checkpoints it found.
        steps: of every link; a checkpoint of the last one belongs to a link that is as good as done.
    """
    first = TICK.search(text)
    right = {step + more for step in kept if step < steps for more in (0, 1)} or {1}
    if not first or int(first[2]) in {*right, *(step for step in kept if step == steps)}:
        return []
    return [f"link@{first[1]} went on with step {first[2]}, its checkpoint was of step {kept}"]
