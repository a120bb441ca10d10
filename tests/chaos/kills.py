"""Kill real runs at random instants, start them again, and see that nothing was lost: `python -m tests.chaos.kills`.

A life is one clone of the project on a tiny model. Its command, `make run` or sometimes `cola run`, is killed with
SIGKILL, every process of it, and started again until it has ended well. Then its hashes must be an undisturbed run's,
and nothing may be left over.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from cola_core.assets.cache import cache_root
from tests.chaos.checks import Outcome, outcome
from tests.chaos.life import STAGES, Life
from tests.chaos.projects import prepare, prepare_real
from tests.tiny import ROOT, hashes

__all__ = ["main"]


def _undisturbed(project: Path, cache: str) -> Outcome:
    """What a run that nobody disturbs comes to."""
    life = Life(project, cache, random.Random(0))
    life.live(0, flows=0.0)
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
    folder, started = Path(tempfile.mkdtemp(prefix="cola-chaos-")), time.monotonic()
    if real:
        ended = [_real(folder, kills, random.Random(seed))]
    else:
        ended = list(_lives(folder, kills, seed, each, flows, jobs))
    failed = sum(bool(wrong) for _, wrong in ended)
    where = Counter(kill for life, _ in ended for kill in life.kills)
    print(*(f"{times:4} {what}" for what, times in where.most_common()), sep="\n")
    minutes = (time.monotonic() - started) / 60
    print(f"{where.total()} kills, {failed} lives with a failure, {minutes:.1f} min")
    if failed:
        raise SystemExit(f"kept: {folder}")
    shutil.rmtree(folder)


def _lives(folder: Path, kills: int, seed: int, each: int, flows: float, jobs: int) -> Iterator[tuple[Life, list[str]]]:
    """So many kills on the tiny model; each life as it ends, with what was wrong with it."""
    wanted = _undisturbed(prepare(folder / "undisturbed/project"), str(folder / "undisturbed/cache"))
    done, lives, numbers = 0, set[Future[tuple[Life, list[str]]]](), count(1)
    with ThreadPoolExecutor(jobs) as pool:
        while lives or done < kills:
            while len(lives) < jobs and done + each * len(lives) < kills:
                number = next(numbers)
                place, draw = folder / f"life{number}", random.Random(f"{seed}/{number}")
                lives.add(pool.submit(_life, place, draw, each, flows, wanted))
            for ended in wait(lives, return_when=FIRST_COMPLETED).done:
                lives.remove(ended)
                life, wrong = ended.result()
                done += len(life.kills)
                _tell(life, wrong, f"{done} in all")
                yield life, wrong


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


def _real(folder: Path, kills: int, draw: random.Random) -> tuple[Life, list[str]]:
    """The default recipe, killed `kills` times."""
    life = Life(prepare_real(folder / "killed"), str(cache_root()), draw, slow=12.0, leap=False)
    life.live(kills, flows=0.0)
    wrong = life.failures or _really_differs(outcome(life.folder, life.cache), folder, life.cache)
    _tell(life, wrong, "of the real model")
    return life, wrong


def _really_differs(found: Outcome, folder: Path, cache: str) -> list[str]:
    """What differs from the committed dvc.lock, or, where the processor makes other last digits, from a run here."""
    wrong = found.differences(Outcome(hashes(ROOT), [], Counter(FINISHED=len(STAGES)), 1, ""))
    if not wrong:
        return []
    print("not what the committed dvc.lock tells; now a run that nobody disturbs", flush=True)
    return found.differences(_undisturbed(prepare_real(folder / "undisturbed"), cache))


if __name__ == "__main__":
    typer.run(main)
