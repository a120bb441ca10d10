"""A study's results made up for tests: known effects, so that what a report tells of them can be checked."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from cola_core.config.base import parse
from cola_core.study.design import Cell, Design, Group
from cola_core.study.results import Result

MODULES = [f"encoder.layer.{block}.{kind}" for block in range(3) for kind in ("query", "value", "dense")]


def design(**changes: Any) -> Design:
    """Three recipes on two tasks, one of which counts in the mean."""
    raw: dict[str, Any] = {
        "name": "made_up",
        "title": "A made-up study",
        "question": "Does it work?",
        "expected": "It does.",
        "out": "out",
        "set": [],
        "models": {"tiny": {"set": ["model=tiny_bert"]}},
        "tasks": {"one": {"set": ["task=r8"]}, "two": {"set": ["task=r8"], "headline": False}},
        "recipes": {
            "lora": {"set": ["method=lora"]},
            "gora": {"set": ["method=gora"], "note": "ranks | start"},
            "wide": {"set": ["method=lora"], "control": True},
        },
        "sweep": {"learning_rates": [1e-4, 1e-3, 1e-2], "seeds": [100], "default": 1e-3},
        "seeds": [0, 1, 2, 3, 4],
        "budget": {"steps": 20},
        "tests": {"baseline": "lora"},
    }
    return parse(Design, {**raw, **changes}, "", file="study")


def result(cell: Cell, accuracy: float, links: int = 2, rows: int = 400, loss: float = 0.5) -> Result:
    """One cell that scored `accuracy` to within a row."""
    rng = np.random.default_rng([cell.seed, zlib.crc32(cell.group.task.encode())])
    hits = np.zeros(rows, dtype=int)
    hits[: round(accuracy * rows)] = 1
    probe = {"loss": 1.0, "gap": 10.0, "gap_valid": 1.0} if cell.group.recipe == "gora" else None
    ranks = {name: int(rng.integers(4, 32)) if probe else 8 for name in MODULES}
    link = {
        "kept": True, "kept_step": 10, "steps": 10, "tokens": 1000, "probe_tokens": 100 if probe else 0,
        "trainable_parameters": 200 if cell.group.recipe == "wide" else 100, "validation_loss": loss, "ranks": ranks,
        "budget": 100, "spent": 100, "losses": [1.0 - 0.05 * step for step in range(10)], "validation": [[10, loss]],
        "knot_change": 0.0, "probe": probe, "adapter": "a" * 64, "chain": "c" * 64,
    }  # fmt: skip
    scored = {
        "metrics": {"accuracy": accuracy, "loss": loss, "calibration_error": 0.1, "macro_f1": accuracy},
        "base": {"accuracy": 0.4},
        "predictions": {"correct": "".join(map(str, hits)), "loss": [loss] * rows},
    }
    content = {"key": "k", "command": "dvc exp run -S seed=0", "links": [link] * links}
    content |= {"spent": {"prepare": {"seconds": 9.0, "cpu": 9.0}, "link@1": {"seconds": 6.0, "cpu": 5.0}}}
    content |= {"validation_loss": loss, **(scored if cell.phase == "test" else {})}
    return Result(cell, content)


def results(made: Design, effects: dict[str, float], noise: float = 0.004, seed: int = 0) -> list[Result]:
    """A whole study: a sweep whose best rate is the middle one, and test cells around 0.8 plus each recipe's effect."""
    rng, found = np.random.default_rng(seed), []
    for group in made.groups():
        for place, rate in enumerate(made.rates(group.recipe)):
            found.append(result(Cell("sweep", group, rate, 100), 0.0, loss=0.5 + 0.1 * abs(place - 1)))
        found += [_scored(group, s, effects.get(group.recipe, 0.0), noise, rng) for s in made.seeds]
    return found


def _scored(group: Group, seed: int, effect: float, noise: float, rng: np.random.Generator) -> Result:
    block = np.random.default_rng(seed).normal(0, 0.01)  # what all recipes share on this seed
    return result(Cell("test", group, 1e-3, seed), float(0.8 + effect + block + rng.normal(0, noise)))
