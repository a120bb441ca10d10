"""What the sweep tells: how wide a recipe's learning rates are, what an untuned one costs, the best losses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import fmean

from cola_core.study.design import Group, Panel
from cola_core.study.report.blocks import Block, Drawing, Heading, Table, Text
from cola_core.study.report.figures import draw_curves
from cola_core.study.report.findings import Findings
from cola_core.study.traits import NEAR

__all__ = ["robust"]


def robust(findings: Findings) -> Iterator[Block]:
    """What learning rates a recipe takes, what an untuned one costs, and how well a tuned one validates."""
    design, found = findings.design, findings.usable
    if not found:
        return
    default, swept = design.sweep.default, findings.swept
    panels = {panel: name for panel, name in findings.panels.items() if any(g.panel == panel for g in found)}
    yield Heading("Learning rates")
    yield Text(
        f"From the sweep, by validation loss. Usable decades: the widest range of neighbouring rates within {NEAR:g} "
        "nats of the best (≥ where it ends with the trials, so it may be wider; where nothing is learnt, all rates "
        f"are); {f'untuned: the loss above the best at {default:g}; ' if default else ''}"
        f"tuned: the best loss beside that of `{design.tests.baseline}`. Means over the tasks in the mean."
    )
    head = ["recipe", "usable decades", *["untuned"] * bool(default), "tuned"]
    yield Table(head, [_traits(findings, r) for r in design.recipes])
    yield Text("The best validation loss on each task, and the rate that it chose.")
    best = partial(_best, findings)
    yield Table(["recipe", *panels.values()], [[r, *(best(Group(*p, r)) for p in panels)] for r in design.recipes])
    if any(each.edge for each in found.values()):
        yield Text("* still at the end of all rates that were tried.")
    groups = {name: [g for g in found if g.panel == panel] for panel, name in panels.items()}
    lines = {name: {g.recipe: swept[g] for g in mine} for name, mine in groups.items()}
    dots = {name: {g.recipe: found[g].rate for g in mine} for name, mine in groups.items()}
    caption = "Validation loss of the sweep, without its highest; a dot where the rate was chosen."
    yield Drawing("rates", draw_curves(lines, dots), caption)


def _traits(findings: Findings, recipe: str) -> list[str]:
    """Usable decades, the cost of not tuning, and the best loss beside the baseline's: means over what counts."""
    counted = [panel for panel in findings.panels if findings.design.tasks[panel[1]].headline]
    mine = {panel: each for panel in counted if (each := findings.usable.get(Group(*panel, recipe)))}
    over = [each.default for each in mine.values() if each.default is not None]
    untuned = [f"{fmean(over):.4f}" if over else ""] if findings.design.sweep.default else []
    beside = [more for panel in mine if (more := _beside(findings, panel, recipe)) is not None]
    wider = "≥ " * any(each.open for each in mine.values())
    return [
        recipe,
        f"{wider}{fmean(each.decades for each in mine.values()):.2f}" if mine else "",
        *untuned,
        f"{fmean(beside):+.4f}" if beside else "",
    ]


def _beside(findings: Findings, panel: Panel, recipe: str) -> float | None:
    """The best loss beside the baseline's; None for the baseline, and before it was swept."""
    mine, theirs = Group(*panel, recipe), Group(*panel, findings.design.tests.baseline)
    if mine == theirs or theirs not in findings.usable:
        return None
    return findings.swept[mine][findings.usable[mine].rate] - findings.swept[theirs][findings.usable[theirs].rate]


def _best(findings: Findings, group: Group) -> str:
    if group not in findings.usable:
        return ""
    chosen = findings.usable[group]
    return f"{findings.swept[group][chosen.rate]:.3f} at {chosen.rate:g}{'*' * chosen.edge}"
