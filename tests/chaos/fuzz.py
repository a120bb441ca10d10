"""Spoilt files by the thousand: each gets a right answer or one clear line, never a traceback, a hang or half a file.

python -m tests.chaos.fuzz --files 1000 --seed 0 [--kind params] [--jobs 2]      what fails is kept under --save
python -m tests.chaos.fuzz --kind params --replay FILE                 one kept file again
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from cola_core.errors import RetryError, UserError
from tests.chaos.readers import KINDS, Kind

__all__ = ["Tally", "judged", "main", "replay", "run_kind"]

HANG = 10.0  # seconds for one file
LONG = 2000  # characters of an error line
MEMORY = 4 << 30  # bytes that reading one file may add
FAST = next((path for path in ("/dev/shm",) if Path(path).is_dir()), None)  # artifacts are fsynced: not on a disk here


@dataclass
class Tally:
    """What became of the files of one kind; failures: what went wrong by the number of the file."""

    kind: str
    files: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: dict[int, str] = field(default_factory=dict)


def judged(kind: Kind, data: bytes) -> tuple[str, str]:
    """Read one file: ("accepted" | "refused" | "failed", and what was said)."""
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        path = Path(folder) / kind.name
        path.write_bytes(data)
        try:
            kind.read(path)
        except (UserError, RetryError) as error:
            left = sorted(p.name for p in Path(folder).iterdir() if p != path)
            return _told(str(error)) if not left else ("failed", f"refused, but left {left}")
        except BaseException as error:
            return "failed", _where(error)
        return "accepted", ""


def made(kind: Kind, seed: int, index: int) -> bytes:
    """File number `index`; file 0 is a good one."""
    draw = random.Random(f"{kind.name}/{seed}/{index}")
    return kind.broken(draw) if index else kind.seeds()[0]


def run_kind(name: str, files: int, seed: int = 0, save: Path | None = None) -> Tally:
    """Read `files` spoilt files in a child process, which is ended and begun again where one hangs or kills it."""
    tally, started = Tally(name), time.monotonic()
    while tally.files < files:
        _child(tally, lambda pipe: _work(pipe, name, range(tally.files, files), seed), files)
    for index in tally.failures if save else []:
        save.mkdir(parents=True, exist_ok=True)
        (save / f"{name}-{seed}-{index}").write_bytes(made(KINDS[name], seed, index))
    tally.seconds = time.monotonic() - started
    return tally


def replay(name: str, path: Path) -> tuple[str, str]:
    """The verdict over one kept file, in this process, where a debugger can follow."""
    return judged(KINDS[name], path.read_bytes())


def _child(tally: Tally, work: Callable[[Connection], None], files: int) -> None:
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(there,))
    process.start()
    there.close()
    try:
        while tally.files < files:
            _count(tally, *(here.recv() if here.poll(HANG) else ("failed", f"no answer in {HANG:g} s")))
            if process.is_alive() and "no answer" in tally.failures.get(tally.files - 1, ""):
                return
    except EOFError:
        process.join()
        _count(tally, "failed", f"the process died ({process.exitcode})")
    finally:
        process.kill()
        process.join()


def _count(tally: Tally, verdict: str, line: str) -> None:
    if not tally.files and verdict == "refused":
        verdict, line = "failed", f"file 0 is whole, and was refused: {line}"
    if verdict == "failed":
        tally.failures[tally.files] = line
    tally.accepted += verdict == "accepted"
    tally.refused += verdict == "refused"
    tally.files += 1


def _work(pipe: Connection, name: str, indices: range, seed: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for index in indices:
            pipe.send(judged(KINDS[name], made(KINDS[name], seed, index)))


def _told(line: str) -> tuple[str, str]:
    if not line.strip() or not line.isprintable() or len(line) > LONG:
        return "failed", f"not one clear line ({len(line)} characters): {line[:200]!r}"
    return "refused", line


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "site-packages" not in f.filename][-3:]
    return f"{type(error).__name__} at {' > '.join(own)}: {str(error)[:200]!r}"


def main(arguments: list[str] | None = None) -> int:
    """Print one line per kind and one per failure; 1 if there was any."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS), action="append")
    parser.add_argument("--jobs", type=int, default=1, help="kinds at once")
    parser.add_argument("--save", type=Path, default=Path(tempfile.gettempdir()) / "cola-fuzz")
    parser.add_argument("--replay", type=Path, help="a kept file of the one --kind given")
    asked = parser.parse_args(arguments)
    if asked.replay:
        print(*replay(asked.kind[0], asked.replay), sep=": ")
        return 0
    shutil.rmtree(asked.save, ignore_errors=True)
    failed = 0
    print(f"{'kind':<16}{'files':>6}{'accepted':>10}{'refused':>9}{'seconds':>9}{'failures':>10}")
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("fork")) as pool:
        one = partial(run_kind, files=asked.files, seed=asked.seed, save=asked.save)
        for tally in pool.map(one, asked.kind or KINDS):
            failed += len(tally.failures)
            _tell(tally, f"{asked.save}/{tally.kind}-{asked.seed}")
    return int(failed > 0)


def _tell(tally: Tally, kept: str) -> None:
    counts = f"{tally.files:>6}{tally.accepted:>10}{tally.refused:>9}{tally.seconds:>9.1f}{len(tally.failures):>10}"
    print(f"{tally.kind:<16}{counts}", flush=True)
    for index, line in tally.failures.items():
        print(f"  {line}\n    python -m tests.chaos.fuzz --kind {tally.kind} --replay {kept}-{index}")


if __name__ == "__main__":
    sys.exit(main())
