"""The test scores: accuracy against the baseline, loss and calibration, and how they go along a count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean

from cola_core.study.compare import Comparison, Estimate, estimate, scores
from cola_core.study.report.blocks import Block, Drawing, Heading, Table, Text
from cola_core.study.report.figures import draw_forest, draw_steps
from cola_core.study.report.findings import Findings
from cola_core.study.results import Result

__all__ = ["accuracy", "along", "loss"]


def accuracy(findings: Findings) -> Iterator[Block]:
    """Test accuracy by recipe and task, the difference from the baseline, and the forest plot."""
    design, level = findings.design, findings.design.tests.level
    found = scores(design, findings.results, "accuracy", headline=False)
    against = {each.recipe: each for each in findings.comparisons("accuracy")}
    yield Heading("Test accuracy")
    yield Text(
        f"Per cent, mean over seeds with {100 * (1 - level):g} % t intervals; the difference from "
        f"`{design.tests.baseline}` is over blocks of the tasks in the mean. Rows marked with what they spent "
        "otherwise are no equal comparison. p after Holm; of controls among themselves."
    )
    tasks = [(model, task) for model in design.models for task in design.tasks]
    several = len(design.models) > 1
    head = ["recipe", *(f"{m} {t}" if several else t for m, t in tasks), "mean", "difference", "p", "verdict"]
    rows = []
    for recipe in design.recipes:
        cells = [_scored(found[recipe], model, task, level) for model, task in tasks]
        counted = [s for (_, task, _), s in found[recipe].items() if design.tasks[task].headline]
        marks = [*(findings.spent[recipe].unequal if recipe in findings.spent else ())]
        marks += [f"{findings.failed[recipe]} failed"] if findings.failed[recipe] else []
        name = f"{recipe} ({', '.join(marks)})" if marks else recipe
        mean = f"{100 * fmean(counted):.2f}" if counted else ""
        rows.append([name, *cells, mean, *_against(against.get(recipe), findings)])
    yield Table(head, rows)
    if against:
        forest = [(name, each.difference) for name, each in against.items()]
        svg = draw_forest(forest, design.tests.margin, f"accuracy - {design.tests.baseline}, points")
        yield Drawing("forest", svg, "Mean difference over blocks with its interval; the band is the margin.")


def _scored(found: Mapping[tuple[str, str, int], float], model: str, task: str, level: float) -> str:
    values = [score for (m, t, _), score in found.items() if (m, t) == (model, task)]
    return _interval(estimate(values, level)) if values else ""


def _interval(found: Estimate, scale: float = 100.0, digits: int = 1) -> str:
    mean, low, high = (f"{scale * value:.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]" if found.n > 1 else mean


def _against(found: Comparison | None, findings: Findings, rising: bool = True) -> list[str]:
    if found is None:
        return ["", "", ""]
    signed = Estimate(found.difference.mean, found.difference.low, found.difference.high, found.difference.n)
    scale, digits = (100.0, 2) if rising else (1.0, 4)
    verdict = found.verdict(findings.design.tests, rising) if found.recipe in findings.compared else "control"
    return [_interval(signed, scale, digits), f"{found.holm:.3f}", verdict]


def loss(findings: Findings) -> Iterator[Block]:
    """Test loss and calibration error, each beside the baseline's."""
    design = findings.design
    yield Heading("Test loss and calibration")
    yield Text(
        "Mean over blocks. The loss is the negative log-probability of the right answer in nats; the calibration error "
        "is the expected one over 15 bins. Both are secondary: tested in the same way, each corrected by itself."
    )
    names = {"loss": "test loss", "calibration_error": "calibration error"}
    against = {metric: {c.recipe: c for c in findings.comparisons(metric)} for metric in names}
    rows = []
    for recipe in design.recipes:
        row = [recipe]
        for metric in names:
            values = list(scores(design, findings.results, metric)[recipe].values())
            row += [f"{fmean(values):.4f}" if values else "", *_against(against[metric].get(recipe), findings, False)]
        rows.append(row)
    yield Table(["recipe", *(x for name in names.values() for x in (name, "difference", "p", "verdict"))], rows)


def along(findings: Findings) -> Iterator[Block]:
    """Families of recipes along a count, such as links of a chain: training loss, test loss and accuracy."""
    design = findings.design
    if not design.families:
        return
    level = design.tests.level
    panels: dict[str, dict[str, dict[int, Estimate]]] = {name: {} for name in QUANTITIES}
    for quantity, read in QUANTITIES.items():
        for family, recipes in design.families.items():
            values = {
                at: [read(r) for r in findings.tests if r.cell.group.recipe == name] for at, name in recipes.items()
            }
            panels[quantity][family] = {at: estimate(found, level) for at, found in values.items() if found}
    yield Heading(f"Along {design.across}")
    yield Text("Means over all tasks and seeds with t intervals; the training loss is that of the last ten steps.")
    yield Drawing("along", draw_steps(panels, design.across), "Loss and accuracy along the count.")
    head = ["family", design.across, *QUANTITIES]
    rows = [
        [family, str(at), *(_of(panels[quantity][family].get(at)) for quantity in QUANTITIES)]
        for family, recipes in design.families.items()
        for at in recipes
    ]
    yield Table(head, rows)


def _of(found: Estimate | None) -> str:
    return _interval(found, 1.0, 4) if found else ""


def _training(result: Result) -> float:
    """Mean training loss of the last steps of the chain."""
    losses = [loss for link in result.content["links"] for loss in link["losses"]]
    return fmean(losses[-10:])


QUANTITIES: dict[str, Callable[[Result], float]] = {
    "training loss": _training,
    "test loss": lambda result: result.metrics["loss"],
    "accuracy": lambda result: result.metrics["accuracy"],
}
