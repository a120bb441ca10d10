"""How firm the differences in accuracy are: on tasks that are learnt at all, and with tasks as what is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean

from cola_core.study.compare import Block as Place
from cola_core.study.compare import Estimate, estimate, scores
from cola_core.study.design import Panel
from cola_core.study.report.blocks import Block, Heading, Table, Text
from cola_core.study.report.findings import Findings

__all__ = ["firm"]


def firm(findings: Findings) -> Iterator[Block]:
    """The primary differences beside those over learnt tasks alone and over task means."""
    design = findings.design
    whole = {each.recipe: each for each in findings.comparisons("accuracy")}
    if not whole:
        return
    learnt = ", ".join(findings.panels[panel] for panel in findings.learnt)
    counted = {panel: name for panel, name in findings.panels.items() if design.tasks[panel[1]].headline}
    idle = ", ".join(name for panel, name in counted.items() if panel not in findings.learnt)
    yield Heading("How firm the differences are")
    yield Text(
        f"Learnt, so that recipes can differ by more than noise: {learnt or 'nothing'}; not learnt: {idle or 'nothing'}"
        " (the mean gain over base and majority class, with its t interval over seeds). Tasks that are not learnt "
        "pull every difference towards none. Blocks of one task share its test rows and each recipe's rate, so the "
        "tests above speak of these tasks, rows and rates; over task means, few as they are, speaks of other tasks "
        "like these. Points, each interval by itself; p after Holm."
    )
    there = {each.recipe: each for each in findings.comparisons("accuracy", findings.learnt)} if idle else whole
    found, rows = scores(design, findings.results, "accuracy"), []
    for recipe, each in whole.items():
        mine = there.get(recipe)
        means = _over_tasks(found[recipe], found[design.tests.baseline])
        over = estimate(means, design.tests.level) if len(means) > 1 else None
        corrected = [_points(mine.difference), f"{mine.holm:.3f}"] if mine else ["", ""]
        rows.append([recipe, _points(each.difference), *corrected, _points(over) if over else ""])
    yield Table(["recipe", "over blocks", "over blocks of learnt tasks", "p", "over task means"], rows)


def _over_tasks(mine: Mapping[Place, float], base: Mapping[Place, float]) -> list[float]:
    """The mean difference of every model and task."""
    by: dict[Panel, list[float]] = {}
    for model, task, seed in mine.keys() & base.keys():
        by.setdefault((model, task), []).append(mine[model, task, seed] - base[model, task, seed])
    return [fmean(each) for _, each in sorted(by.items())]


def _points(found: Estimate) -> str:
    return found.told(100.0, "+.2f")
