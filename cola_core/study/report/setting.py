"""What a report says before its results: the set-up, and what could be seen in it at all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from statistics import fmean

from cola_core.study.compare import detectable
from cola_core.study.design import Sweep
from cola_core.study.report.blocks import Block, Heading, Table, Text
from cola_core.study.report.findings import Findings

__all__ = ["set_up", "sight"]


def set_up(findings: Findings) -> Iterator[Block]:
    """How cells were trained and scored; models, tasks and recipes."""
    design = findings.design
    yield Heading("Set-up")
    swept, fresh = len(design.sweep.seeds), len(design.seeds)
    scored = (
        f"the test rows{' are the same for every seed, and' * findings.same_rows} are scored by {fresh} fresh seeds at "
        "the chosen rate alone"
        if fresh
        else "no test row is scored: this is a look at validation data"
    )
    charged = " A probe's rows are paid for with one and a half training rows each." if design.budget.charge else ""
    yield Text(
        f"Every cell trains {design.budget.steps} optimizer steps in all, whatever its number of links.{charged} Each "
        f"recipe's learning rate is chosen on each task by validation loss ({swept} seed{'s' * (swept > 1)} that no "
        f"test score uses), from {_grid(design.sweep)}; {scored}."
    )
    yield Text(_origin(findings))
    yield Table(["model", "what it is"], [[name, arm.note] for name, arm in design.models.items()], wide=[1])
    tasks = [[n, "yes" if a.headline else "no", str(_rows(findings, n)), a.note] for n, a in design.tasks.items()]
    yield Table(["task", "in the mean", "test rows", "which"], tasks, wide=[3])
    roles = {True: "control", False: "compared"}
    recipes = [
        [n, "baseline" if n == design.tests.baseline else roles[a.control], a.note] for n, a in design.recipes.items()
    ]
    yield Table(["recipe", "role", "what it is"], recipes, wide=[2])


def _grid(sweep: Sweep) -> str:
    if sweep.by == "optuna":
        return f"{sweep.trials} trials of Optuna's"
    return f"a grid that is extended while the best stands at its end, at most {sweep.extend} times"


def _origin(findings: Findings) -> str:
    """Whether one code and one kind of machine made all cells: only then do they differ by nothing else."""
    codes = Counter(str(result.content.get("code", "?")) for result in findings.results)
    machines = Counter(
        " ".join(str(value) for _, value in sorted(result.content.get("machine", {}).items()))
        for result in findings.results
    )
    kinds = [f"{count} on {kind or 'an unknown machine'}" for kind, count in machines.most_common()]
    made = [f"{count} by code {code}" for code, count in codes.most_common()]
    return f"Cells: {', '.join(made)}; {', '.join(kinds)} (instructions, threads, torch)."


def _rows(findings: Findings, task: str) -> int | str:
    return next((len(r.correct) for r in findings.tests if r.cell.group.task == task), "?")


def sight(findings: Findings) -> Iterator[Block]:
    """What could be seen at all: told before what was seen."""
    design = findings.design
    found, compared = findings.comparisons("accuracy"), len(findings.compared)
    tested = [each for each in found if each.recipe in findings.compared]
    tasks = sum(arm.headline for arm in design.tasks.values())
    blocks = min((each.difference.n for each in tested), default=tasks * len(design.models) * len(design.seeds))
    size = detectable(blocks, compared, design.tests)
    yield Heading("What can be seen")
    text = (
        f"The primary test is a paired t over {blocks} blocks (model, task, seed) of each of {compared} recipes "
        f"against `{design.tests.baseline}`, with Holm's correction. With a power of {design.tests.power:g} it finds "
        f"a mean difference of {size:.2f} standard deviations of a block's difference."
    )
    if tested:
        sd = math.sqrt(fmean(each.sd**2 for each in tested))
        text += (
            f" That standard deviation turned out to be {100 * sd:.2f} points (root mean square over recipes), so the "
            f"smallest detectable difference is **{100 * sd * size:.2f} points**. Below it, no difference and cannot "
            f"tell are parted by the interval, corrected for {compared} recipes: inside {100 * design.tests.margin:g} "
            "point either way is the former."
        )
    yield Text(text)
