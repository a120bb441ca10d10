"""The process that DVC works in for one flow run: orders in, DVC's and the stages' lines out, each ended by a verdict.

Started by its path, since a workspace may hold another version of this package; it imports nothing of the project.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from threading import Thread

__all__ = ["END", "main"]

END = "\0end "  # begins the line with the order's own word and DVC's exit code: no stage can know the word
LOOK = 0.2  # seconds between two looks at who the parent is


def main() -> None:
    """Read `stage TAB file TAB word` lines; bring each stage up to date as `dvc repro --single-item` does.

    Its one argument is the flow's process id. The file is where the stage leaves its exit code (`COLA_FAILURE`). What
    DVC imports is paid once a run, not once a stage. Stages get an empty input: the orders are not theirs.
    """
    Thread(target=_follow, args=[int(sys.argv[1])], daemon=True).start()
    with os.fdopen(os.dup(0), encoding="utf-8") as orders:
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        from dvc.cli import main as dvc

        while order := orders.readline():
            stage, os.environ["COLA_FAILURE"], word = order.rstrip("\n").split("\t")
            code = dvc(["repro", "--single-item", stage])
            print(f"\n{END}{word} {code}", flush=True)


def _follow(parent: int) -> None:
    """End with the flow, stage and all, however it ended: else nobody would see what it trains, and it holds the lock.

    A stage killed at any instant goes on from its last checkpoint when the same run is started again.
    """
    while os.getppid() == parent:
        time.sleep(LOOK)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
