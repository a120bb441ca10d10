"""Kill real runs at random instants, start them again, and see that nothing was lost: `python -m tests.chaos.kills`.

A life is one clone of the project on a tiny model. Its command, `make run` or sometimes `cola run`, is killed with
SIGKILL, every process of it, and started again until it has ended well. Then its hashes must be an undisturbed run's,
and nothing may be left over.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated

import typer
from safetensors import safe_open

from cola_core.assets.cache import cache_root
from cola_core.config.base import read_yaml
from tests.chaos.checks import Outcome, outcome
from tests.chaos.projects import prepare, prepare_real
from tests.chaos.triggers import Trigger, trigger
from tests.tiny import environment, hashes

__all__ = ["Life", "main"]

MAKE, FLOW = ["make", "run"], [sys.executable, "-m", "flows.cli", "run"]
PATIENCE = 3600.0  # seconds after which a command that was not killed has hung
TICK = re.compile(r"link@(\d): (\d+)/")


@dataclass
class Life:
    """One clone, its kills so far, and what went wrong."""

    folder: Path
    cache: str
    draw: random.Random
    slow: float = 1.0
    kills: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def live(self, most: int, flows: float = 0.2) -> None:
        """Kill up to `most` times, then let it end; `flows` is the share of commands that are `cola run`."""
        while len(self.kills) < most and not self.failures:
            command = FLOW if self.draw.random() < flows else MAKE
            if not self._start(command, trigger(self.draw, self.slow, self._steps())):
                break
        if not self.failures:
            self._start(MAKE, None)

    def _start(self, command: list[str], trigger: Trigger | None) -> bool:
        """Run the command until it is killed (True) or ends by itself."""
        before, log = self._kept_steps(), self.folder.parent / "log"
        with log.open("w") as out:
            child = subprocess.Popen(
                command, cwd=self.folder, env=self._environment(), stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            killed = self._wait(child, trigger, log)
        text = log.read_text(errors="replace")
        self._check_steps(text, before)
        if killed:
            self.kills.append(f"{'cola run' if command is FLOW else 'make run'}, {trigger.name if trigger else ''}")
        elif child.returncode:
            self.failures.append(f"after {self.kills[-1:]}: exit code {child.returncode}\n{text[-3000:]}")
        return killed

    def _wait(self, child: subprocess.Popen[bytes], trigger: Trigger | None, log: Path) -> bool:
        limit = time.monotonic() + (trigger.latest if trigger else PATIENCE)
        while child.poll() is None:
            if time.monotonic() > limit or (trigger and self._due(trigger, log)):
                time.sleep(trigger.after if trigger else 0.0)
                self._kill()
                child.wait()
                if trigger is None:
                    self.failures.append(f"hung\n{log.read_text(errors='replace')[-3000:]}")
                return True
            time.sleep(0.005)
        return False

    def _due(self, trigger: Trigger, log: Path) -> bool:
        if trigger.text:
            return trigger.text in log.read_text(errors="replace")
        return bool(trigger.files) and next(self.folder.glob(trigger.files), None) is not None

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

    def _kept_steps(self) -> list[int]:
        """The last step of every link that has a checkpoint and has not ended."""
        import json

        states = (self.folder / ".cola/resume").glob("*/state.safetensors")
        kept = []
        for path in (path for path in states if not (path.parent / "done").exists()):
            with safe_open(path, framework="pt") as file:
                kept.append(int(json.loads(file.metadata()["progress"])["step"]))
        return kept

    def _check_steps(self, text: str, kept: list[int]) -> None:
        """The first step of a link that went on is the one after its checkpoint (or its pending validation)."""
        first = TICK.search(text)
        if first and kept and int(first[2]) - 1 not in [*kept, *(step - 1 for step in kept), 0]:
            self.failures.append(f"link@{first[1]} went on with step {first[2]}, its checkpoint was of step {kept}")


def undisturbed(folder: Path) -> Outcome:
    """What a run that nobody disturbs comes to."""
    life = Life(prepare(folder / "project"), str(folder / "cache"), random.Random(0))
    life.live(0)
    if life.failures:
        raise SystemExit(f"the undisturbed run failed: {life.failures[0]}")
    return outcome(life.folder, life.cache)


def main(
    kills: Annotated[int, typer.Option(help="In all.")] = 200,
    seed: Annotated[int, typer.Option(help="Of instants and commands.")] = 0,
    each: Annotated[int, typer.Option(help="Kills in one life at most.")] = 12,
    flows: Annotated[float, typer.Option(help="Share of `cola run`.")] = 0.15,
    jobs: Annotated[int, typer.Option(help="Lives at once.")] = 2,
    real: Annotated[bool, typer.Option("--real", help="One life of the default recipe on the real model.")] = False,
) -> None:
    """Kill until there were `kills`; exit code 1 if anything was lost or left."""
    if real:
        return _real(kills, random.Random(seed))
    done, failed, started = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cola-chaos-") as name, ThreadPoolExecutor(jobs) as pool:
        wanted = undisturbed(Path(name) / "undisturbed")
        lives, numbers = set[Future[tuple[Life, list[str]]]](), count(1)
        while lives or done < kills:
            while len(lives) < jobs and done + each * len(lives) < kills:
                number = next(numbers)
                place, draw = Path(name) / f"life{number}", random.Random(f"{seed}/{number}")
                lives.add(pool.submit(_life, place, draw, each, flows, wanted))
            for ended in wait(lives, return_when=FIRST_COMPLETED).done:
                lives.remove(ended)
                life, wrong = ended.result()
                done, failed = done + len(life.kills), failed + bool(wrong)
                _tell(life, wrong, f"{done} in all, {time.monotonic() - started:.0f} s")
    print(f"{done} kills, {failed} lives with a failure, {(time.monotonic() - started) / 60:.1f} min")
    raise SystemExit(bool(failed))


def _life(place: Path, draw: random.Random, most: int, flows: float, wanted: Outcome) -> tuple[Life, list[str]]:
    """One life, and what was wrong with it; one that was well leaves no files."""
    life = Life(prepare(place / "project"), str(place / "cache"), draw)
    life.live(most, flows)
    wrong = life.failures or outcome(life.folder, life.cache).differences(wanted)
    if not wrong:
        shutil.rmtree(place)
    return life, wrong


def _tell(life: Life, wrong: list[str], rest: str) -> None:
    print(f"{life.folder.parent.name}: {len(life.kills)} kills, {rest}", flush=True)
    for line in [*life.kills, *wrong] if wrong else []:
        print(f"  {line}", flush=True)


def _real(kills: int, draw: random.Random) -> None:
    """The default recipe, killed `kills` times, against the hashes of the committed dvc.lock."""
    with tempfile.TemporaryDirectory(prefix="cola-chaos-") as name:
        root = prepare_real(Path(name))
        wanted, started = hashes(root), time.monotonic()
        life = Life(root, str(cache_root()), draw, slow=12.0)
        life.live(kills, flows=0.0)
        wrong = life.failures or outcome(root, life.cache).differences(Outcome(wanted, [], Counter(), 1, ""))
        minutes = (time.monotonic() - started) / 60
        print(*life.kills, *wrong, f"{len(life.kills)} kills of the real model, {minutes:.1f} min", sep="\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
