"""When to kill: at a random instant, or within what is most easily torn."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

__all__ = ["ANY", "Trigger", "somewhere", "trigger"]

ANY = "any instant"


@dataclass
class Trigger:
    """When to kill: what the output matches or a kind of file that appears, `after` more seconds, or at `latest`.

    stage: the one it needs, without its link; none for what may happen in any.
    """

    name: str
    stage: str = ""
    text: str = ""
    files: str = ""
    after: float = 0.0
    latest: float = 9.0


def trigger(draw: random.Random, slow: float, steps: int, ahead: Collection[str]) -> Trigger:
    """A random instant, or one within what is most easily torn.

    Args:
        slow: how many times later all of it is, on a large model.
        steps: of every link.
        ahead: the stages that run next.
    """
    soon = 25.0
    kinds = [
        Trigger(ANY, latest=draw.uniform(0.2, 9.0)),
        Trigger("in a write", files="artifacts/**/.*.cola-tmp", after=draw.uniform(0.0, 0.01), latest=15.0),
        Trigger("in a checkpoint", files=".cola/resume/*/.*.cola-tmp", after=draw.uniform(0.0, 0.004), latest=15.0),
        Trigger("in dvc.lock", text="Updating lock file", after=draw.uniform(0.0, 0.3), latest=15.0),
        Trigger("in fetch", "fetch", "Running stage 'fetch'", after=draw.uniform(0.5, 5.0), latest=soon),
        Trigger("in prepare", "prepare", "Running stage 'prepare'", after=draw.uniform(0.5, 3.0), latest=soon),
        Trigger("in a probe", "profile", "Running stage 'profile@", after=draw.uniform(2.0, 8.0), latest=soon),
        Trigger("in a step", "link", r"link@\d: \d+/", after=draw.uniform(0.0, 1.0), latest=soon),
        Trigger("at a knot", "link", f" {steps}/{steps} ", after=draw.uniform(0.0, 0.8), latest=soon),
        Trigger("in merge", "merge", "Running stage 'merge'", after=draw.uniform(0.5, 8.0), latest=soon),
        Trigger("while tables are made", "link", "", ".mlflow.db.*.cola-tmp", draw.uniform(0.0, 5.0), soon),
        Trigger("in sync", "register", "-m tasks.sync", after=draw.uniform(0.0, 8.0), latest=2 * soon),
        Trigger(
            "between file and MLflow",
            "register",
            "Running stage 'register'",
            after=draw.uniform(1.0, 12.0),
            latest=soon,
        ),
    ]
    found = draw.choice([kind for kind in kinds if not kind.stage or kind.stage in ahead])
    return replace(found, after=found.after * slow, latest=found.latest * slow)


def somewhere(draw: random.Random, stages: Sequence[str], patience: float) -> Trigger:
    """A first kill in any stage: with near ones alone, few lives would be killed in the last."""
    text = f"Running stage '{draw.choice(stages)}'"
    return Trigger(ANY, text=text, after=draw.uniform(0.0, 5.0), latest=patience)
