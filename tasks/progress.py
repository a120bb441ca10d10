"""Progress of long work: a live bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Tick", "progress"]

LINE_SECONDS = 5.0  # a log gets a line at most this often, besides the first and the last step

# tick(done, total, tokens of this step, text such as "loss 0.123")
Tick = Callable[[int, int, int, str], None]


@contextmanager
def progress(name: str) -> Iterator[Tick]:
    """Yield a function to call after every step; it shows how far the work is, its speed and the time left."""
    show = _bar if sys.stdout.isatty() else _lines
    with show(name) as tick:
        yield tick


@contextmanager
def _bar(name: str) -> Iterator[Tick]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task, meter = bar.add_task(name, total=None, text=""), _Meter()

        def tick(done: int, total: int, tokens: int, text: str) -> None:
            bar.update(task, completed=done, total=total, text=f"{text}  {meter(tokens):,.0f} tokens/s")

        yield tick


@contextmanager
def _lines(name: str) -> Iterator[Tick]:
    meter, said = _Meter(), [0.0]
    first: list[tuple[int, float]] = []  # where and when the count began: a resumed link does not begin at 0

    def tick(done: int, total: int, tokens: int, text: str) -> None:
        now, speed = time.monotonic(), meter(tokens)
        if not first:
            first.append((done, now))
        steps = done - first[0][0]
        if now - said[0] < LINE_SECONDS and steps > 0 and done < total:
            return
        said[0] = now
        left = f"{(now - first[0][1]) / steps * (total - done):.0f} s left" if steps else ""
        print(f"{name}: {done}/{total}  {text}  {speed:,.0f} tokens/s  {left}".rstrip(), flush=True)

    yield tick


class _Meter:
    """Tokens per second since the start."""

    def __init__(self) -> None:
        self.started, self.tokens = time.monotonic(), 0

    def __call__(self, tokens: int) -> float:
        self.tokens += tokens
        return self.tokens / max(1e-9, time.monotonic() - self.started)
