"""When to kill: at a random instant, or within what is most easily torn."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

__all__ = ["Trigger", "trigger"]


@dataclass
class Trigger:
    """When to kill: a text in the output or a kind of file that appears, `after` more seconds, or at `latest`."""

    name: str
    text: str = ""
    files: str = ""
    after: float = 0.0
    latest: float = 9.0


def trigger(draw: random.Random, slow: float, steps: int) -> Trigger:
    """A random instant, or one within what is most easily torn.

    Args:
        slow: how many times later all of it is, on a large model.
        steps: of every link.
    """
    kinds = [
        Trigger("any instant", latest=draw.uniform(0.2, 9.0)),
        Trigger("in a write", files="artifacts/**/.*.cola-tmp", after=draw.uniform(0.0, 0.01), latest=15.0),
        Trigger("in a checkpoint", files=".cola/resume/*/.*.cola-tmp", after=draw.uniform(0.0, 0.004), latest=15.0),
        Trigger("in dvc.lock", text="Updating lock file", after=draw.uniform(0.0, 0.3), latest=15.0),
        Trigger("in a step", text="link@", after=draw.uniform(0.0, 0.4), latest=15.0),
        Trigger("at a knot", text=f" {steps}/{steps} ", after=draw.uniform(0.0, 0.8), latest=15.0),
        Trigger("in merge", text="Running stage 'merge'", after=draw.uniform(0.5, 4.0), latest=15.0),
        Trigger("while tables are made", files=".mlflow.db.*.cola-tmp", after=draw.uniform(0.0, 5.0), latest=15.0),
        Trigger("in sync", text="-m tasks.sync", after=draw.uniform(0.0, 8.0), latest=15.0),
        Trigger("between file and MLflow", text="Running stage 'register'", after=draw.uniform(1.0, 8.0), latest=15.0),
    ]
    found = draw.choice(kinds)
    return replace(found, after=found.after * slow, latest=found.latest * slow)
