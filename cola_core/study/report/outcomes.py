"""The test scores: accuracy against the baseline, loss and calibration, and how they go along a count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean

from cola_core.study.compare import Block as Place
from cola_core.study.compare import Comparison, Estimate, block_of, estimate, over_rows, scores
from cola_core.study.design import Panel
from cola_core.study.report.blocks import Block, Drawing, Heading, Table, Text
from cola_core.study.report.figures import draw_forest, draw_steps
from cola_core.study.report.findings import IDLE, Findings
from cola_core.study.results import Result

__all__ = ["accuracy", "along", "examples", "loss"]


def accuracy(findings: Findings) -> Iterator[Block]:
    """Test accuracy by recipe and task, the difference from the baseline, and the forest plot."""
    design, level = findings.design, findings.design.tests.level
    found = scores(design, findings.results, "accuracy", headline=False)
    against = {each.recipe: each for each in findings.comparisons("accuracy")}
    most = max((each.difference.n for each in against.values()), default=0)
    yield Heading("Test accuracy")
    yield Text(
        f"Per cent, mean over seeds with {100 * (1 - level):g} % t intervals; the difference from "
        f"`{design.tests.baseline}` is over blocks of the tasks in the mean. Rows marked with what they spent "
        "otherwise are no equal comparison; a mean stands where all tasks in it were run, and a difference over fewer "
        "blocks than others says how many. A cell that failed to train counts as its base model, with its fitted head. "
        "p after Holm; of controls among themselves."
    )
    head = ["recipe", *findings.panels.values(), "mean", "difference", "p", "verdict"]
    rows = [[title, *_idle(findings, name), "", "", "", ""] for name, title in IDLE.items()]
    for recipe in design.recipes:
        cells = [_scored(found[recipe], panel, level) for panel in findings.panels]
        mean = _mean(findings, recipe, found[recipe], 100.0, 2)
        rows.append([_marked(findings, recipe), *cells, mean, *_against(against.get(recipe), findings, most)])
    yield Table(head, rows)
    if against:
        forest = [(name, each.difference) for name, each in against.items()]
        svg = draw_forest(forest, design.tests.margin, f"accuracy - {design.tests.baseline}, points")
        yield Drawing("forest", svg, "Mean difference over blocks with its interval; the band is the margin.")


def _idle(findings: Findings, name: str) -> list[str]:
    """On every panel, the mean accuracy of what answers without training."""
    each = [
        [r.content[name]["accuracy"] for r in findings.tests if r.cell.group.panel == panel and name in r.content]
        for panel in findings.panels
    ]
    return [f"{100 * fmean(values):.1f}" if values else "" for values in each]


def _marked(findings: Findings, recipe: str) -> str:
    """A recipe's name with what makes its row no equal comparison."""
    marks = [*(findings.spent[recipe].unequal if recipe in findings.spent else ())]
    marks += [f"{findings.failed[recipe]} failed"] if findings.failed[recipe] else []
    edges = [findings.panels[g.panel] for g, each in findings.usable.items() if g.recipe == recipe and each.edge]
    marks += [f"rate at the end of all tried: {' '.join(edges)}"] if edges else []
    return f"{recipe} ({', '.join(marks)})" if marks else recipe


def _mean(findings: Findings, recipe: str, found: Mapping[Place, float], scale: float, digits: int) -> str:
    """Over the tasks in the mean, each by its own mean over seeds, so that a task with more seeds weighs no more."""
    each: dict[Panel, list[float]] = {}
    for (model, task, _), score in found.items():
        if findings.design.tasks[task].headline:
            each.setdefault((model, task), []).append(score)
    told = each and findings.whole(recipe)
    return f"{scale * fmean(fmean(values) for values in each.values()):.{digits}f}" if told else ""


def _scored(found: Mapping[Place, float], panel: Panel, level: float) -> str:
    values = [score for (model, task, _), score in found.items() if (model, task) == panel]
    return _interval(estimate(values, level)) if values else ""


def _interval(found: Estimate, scale: float = 100.0, digits: int = 1) -> str:
    return found.told(scale, f".{digits}f") if found.n > 1 else f"{scale * found.mean:.{digits}f}"


def _against(found: Comparison | None, findings: Findings, most: int, rising: bool = True) -> list[str]:
    if found is None:
        return ["", "", ""]
    fewer = f", {found.difference.n} blocks" if found.difference.n < most else ""
    scale, digits = (100.0, 2) if rising else (1.0, 4)
    verdict = found.verdict(findings.design.tests, rising) if found.recipe in findings.compared else "control"
    return [_interval(found.difference, scale, digits) + fewer, f"{found.holm:.3f}", verdict]


def loss(findings: Findings) -> Iterator[Block]:
    """Test loss and calibration error, each beside the baseline's."""
    design = findings.design
    yield Heading("Test loss and calibration")
    yield Text(
        "Means over tasks, differences over blocks. The loss is the negative log-probability of the right answer in "
        "nats; the calibration error is the expected one over 15 bins. Both are secondary: tested in the same way, "
        "each corrected by itself."
    )
    names = {"loss": "test loss", "calibration_error": "calibration error"}
    against = {metric: {c.recipe: c for c in findings.comparisons(metric)} for metric in names}
    most = max((c.difference.n for found in against.values() for c in found.values()), default=0)
    rows = []
    for recipe in design.recipes:
        row = [recipe]
        for metric in names:
            values = scores(design, findings.results, metric)[recipe]
            row += [
                _mean(findings, recipe, values, 1.0, 4),
                *_against(against[metric].get(recipe), findings, most, False),
            ]
        rows.append(row)
    yield Table(["recipe", *(x for name in names.values() for x in (name, "difference", "p", "verdict"))], rows)


def examples(findings: Findings) -> Iterator[Block]:
    """What the choice of test rows alone leaves open, for the very models that were trained."""
    design, level = findings.design, findings.design.tests.level
    rows = []
    for recipe in design.recipes:
        if recipe != design.tests.baseline:
            cells = [_over_rows(findings, panel, recipe, level) for panel in findings.panels]
            rows += [[recipe, *cells]] if any(cells) else []
    if not rows or not findings.same_rows:
        return
    yield Heading("The same rows, model against model")
    yield Text(
        f"Points of accuracy beside `{design.tests.baseline}`, each row's answer averaged over the seeds that both "
        f"have trained, with {100 * (1 - level):g} % intervals of the paired bootstrap over test rows: how far these "
        "models differ, whatever other seeds would give. Not corrected for their number."
    )
    yield Table(["recipe", *findings.panels.values()], rows)


def _over_rows(findings: Findings, panel: Panel, recipe: str, level: float) -> str:
    mine, theirs = (
        {r.cell.seed: r for r in findings.scored(panel, name)} for name in (recipe, findings.design.tests.baseline)
    )
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return ""
    return _interval(over_rows([mine[s] for s in both], [theirs[s] for s in both], level))


def along(findings: Findings) -> Iterator[Block]:
    """Families of recipes along a count, such as links of a chain: training loss, test loss and accuracy."""
    design = findings.design
    if not design.families:
        return
    level, baseline = design.tests.level, design.tests.baseline
    panels: dict[str, dict[str, dict[int, Estimate]]] = {}
    means: dict[tuple[str, str], float] = {}
    for quantity, read in QUANTITIES.items():
        found = {recipe: _by_block(findings, recipe, read) for recipe in design.recipes}
        means |= {(quantity, recipe): fmean(values.values()) for recipe, values in found.items() if values}
        panels[quantity] = {
            family: dict(_differences(recipes, found, found[baseline], level))
            for family, recipes in design.families.items()
        }
    yield Heading(f"Along {design.across}")
    yield Text(
        "Means over the tasks in the mean and all seeds that trained, and the difference from "
        f"`{baseline}` over blocks with t intervals, which the figure shows; the training loss is that of the last ten "
        "steps."
    )
    yield Drawing("along", draw_steps(panels, design.across), f"Difference from {baseline} along the count.")
    rows = [
        [family, str(at), *(_of(means.get((q, recipe)), panels[q][family].get(at)) for q in QUANTITIES)]
        for family, recipes in design.families.items()
        for at, recipe in recipes.items()
    ]
    yield Table(["family", design.across, *QUANTITIES], rows)


def _by_block(findings: Findings, recipe: str, read: Callable[[Result], float]) -> dict[Place, float]:
    """A quantity of a recipe's cells of tasks in the mean, by model, task and seed."""
    tasks = findings.design.tasks
    mine = (r for r in findings.tests if r.cell.group.recipe == recipe and tasks[r.cell.group.task].headline)
    return {block_of(result): read(result) for result in mine}


def _differences(
    recipes: Mapping[int, str], found: Mapping[str, Mapping[Place, float]], base: Mapping[Place, float], level: float
) -> Iterator[tuple[int, Estimate]]:
    for at, recipe in recipes.items():
        if both := sorted(found[recipe].keys() & base.keys()):
            yield at, estimate([found[recipe][block] - base[block] for block in both], level)


def _of(mean: float | None, difference: Estimate | None) -> str:
    if mean is None or difference is None:
        return ""
    return f"{mean:.4f}: {difference.told(1.0, '+.4f')}"


def _training(result: Result) -> float:
    """Mean training loss of the last steps of the chain."""
    losses = [loss for link in result.content["links"] for loss in link["losses"]]
    return fmean(losses[-10:])


QUANTITIES: dict[str, Callable[[Result], float]] = {
    "training loss": _training,
    "test loss": lambda result: result.metrics["loss"],
    "accuracy": lambda result: result.metrics["accuracy"],
}
