"""Print the scores of the last evaluation: majority class, base model, every prefix of the chain."""

from __future__ import annotations

import sys

from cola_core.errors import UserError
from cola_core.evaluation.scoreboard import scoreboard
from cola_core.files import read_json
from tasks.places import ARTIFACTS

if __name__ == "__main__":
    try:
        print(scoreboard(read_json(ARTIFACTS / "evaluate" / "metrics.json")))
    except UserError as error:
        print(f"show: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
