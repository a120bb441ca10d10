"""The process that DVC works in for one flow run: orders in, DVC's and the stages' lines out, each ended by a verdict.

Started by its path, since a workspace may hold another version of this package; it imports nothing of the project.
"""

from __future__ import annotations

import os
import sys

__all__ = ["END", "main"]

END = "\0end "  # begins the line with the order's own word and DVC's exit code: no stage can know the word


def main() -> None:
    """Read `stage TAB file TAB word` lines; bring each stage up to date as `dvc repro --single-item` does.

    The file is where the stage leaves its exit code (`COLA_FAILURE`). What DVC imports is paid once a run, not once a
    stage. Stages get an empty input: the orders are not theirs.
    """
    with os.fdopen(os.dup(0), encoding="utf-8") as orders:
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        from dvc.cli import main as dvc

        while order := orders.readline():
            stage, os.environ["COLA_FAILURE"], word = order.rstrip("\n").split("\t")
            code = dvc(["repro", "--single-item", stage])
            print(f"\n{END}{word} {code}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
