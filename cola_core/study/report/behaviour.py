"""How recipes behave: losses over the chain, ranks, gaps, cost; and every cell with its command."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from statistics import fmean

from cola_core.study.report.blocks import Block, Details, Drawing, Heading, Table, Text
from cola_core.study.report.figures import draw_losses, draw_ranks
from cola_core.study.report.findings import Findings
from cola_core.study.results import Result
from cola_core.study.traits import Spending, agreement

__all__ = ["cells", "chain", "cost", "ranks"]

KINDS = ("links", "seeds", "tasks")


def chain(findings: Findings) -> Iterator[Block]:
    """Training loss over the chain, and the Frank-Wolfe gap before every link."""
    panels: dict[str, dict[str, tuple[Sequence[float], Sequence[int]]]] = {}
    shown = [findings.design.tests.baseline, *findings.compared]
    for panel, title in findings.panels.items():
        lines = {name: _over_chain(found) for name in shown if (found := findings.scored(panel, name))}
        panels |= {title: lines} if lines else {}
    yield Heading("Over the chain")
    yield Text("Training loss, mean over seeds and smoothed over ten steps; a bar where a knot was tied.")
    yield Drawing("losses", draw_losses(panels), "Training loss over the chain.")
    rows = [
        [title, name, *(f"{gap:.1f}" for gap in gaps)]
        for panel, title in findings.panels.items()
        for name in findings.design.recipes
        if len(gaps := _gaps(findings.scored(panel, name))) > 1
    ]
    if rows:
        yield Text(
            "Frank-Wolfe gap at each link's start, in a nuclear-norm ball around the root weights "
            "([COLA](https://arxiv.org/abs/2401.04151), section 4), summed over modules; mean over seeds. It bounds "
            "how far the loss could still fall if it were convex; by COLA's theorem its mean falls with longer chains."
        )
        most = max(len(row) for row in rows) - 2
        head = ["task", "recipe", *(f"before link {k + 1}" for k in range(most))]
        yield Table(head, [row + [""] * (most + 2 - len(row)) for row in rows])


def _over_chain(found: Sequence[Result]) -> tuple[Sequence[float], Sequence[int]]:
    curves = [[loss for link in r.content["links"] for loss in link["losses"]] for r in found]
    knots = list(accumulate(len(link["losses"]) for link in found[0].content["links"]))[:-1]
    return [fmean(losses) for losses in zip(*curves, strict=False)], knots


def _gaps(found: Sequence[Result]) -> list[float]:
    """Mean over cells of every link's gap; empty where no gradient was taken."""
    each = [[link["probe"]["gap"] for link in r.content["links"] if link["probe"]] for r in found]
    return [fmean(gaps) for gaps in zip(*each, strict=False)]


def ranks(findings: Findings) -> Iterator[Block]:
    """Where ranks went, and whether allocations agree."""
    maps: dict[str, dict[str, float]] = {}
    rows = []
    for recipe in findings.design.recipes:
        if found := agreement(findings.tests, recipe):
            rows.append([recipe, *(f"{found[kind]:.2f}" if kind in found else "" for kind in KINDS)])
            for panel, title in findings.panels.items():
                maps |= _maps(f"{recipe} {title}", findings.scored(panel, recipe))
    if not rows:
        return
    yield Heading("Ranks")
    yield Text(
        "Mean Spearman correlation of ranks over modules, between links of one chain, between seeds, between tasks; "
        "then the mean ranks over seeds."
    )
    yield Table(["recipe", *KINDS], rows)
    yield Drawing("ranks", draw_ranks(maps), "Mean rank over seeds of every module, per recipe, task and link.")


def _maps(title: str, found: Sequence[Result]) -> dict[str, dict[str, float]]:
    maps = {}
    for number in range(len(found[0].content["links"]) if found else 0):
        tables = [r.content["links"][number]["ranks"] for r in found]
        maps[f"{title} {number + 1}"] = {name: fmean(table[name] for table in tables) for name in tables[0]}
    return maps


def cost(findings: Findings) -> Iterator[Block]:
    """What recipes spend, in processor time and in the sweep."""
    yield Heading("Cost")
    yield Text(
        "Means per test cell over tasks in the mean: trainable parameters at a time, training tokens with a probe's at "
        "one and a half, processor seconds of probes and links, points of accuracy gained over the base model with its "
        "fitted head, and processor seconds for each of them; a cell that failed to train is left out, and so are the "
        "seconds of one that was killed and resumed. The sweep: all its cells."
    )
    rows = []
    for recipe in findings.design.recipes:
        mine = (r for r in findings.results if r.cell.group.recipe == recipe)
        swept = sum(r.cpu_seconds for r in mine if r.cell.phase == "sweep") / 3600
        rows.append([recipe, *_spent(findings.spent.get(recipe)), f"{swept:.2f}"])
    head = ["recipe", "parameters", "tokens", "cpu s", "points gained", "cpu s per point", "sweep, cpu h"]
    yield Table(head, rows)


def _spent(found: Spending | None) -> list[str]:
    if found is None:
        return [""] * 5
    each = f"{found.cpu_seconds / found.points:.1f}" if found.points > 0 else "-"
    amounts = f"{found.parameters:,.0f}", f"{found.tokens:,.0f}", f"{found.cpu_seconds:.1f}", f"{found.points:.2f}"
    return [*amounts, each]


def cells(findings: Findings) -> Iterator[Block]:
    """Every cell: its scores, its MLflow run, and the command that runs it again."""
    yield Heading("Cells")
    failed = sum(result.failed for result in findings.results)
    yield Text(
        f"{len(findings.results)} cells, {failed} of which failed to train. Each command runs a cell again under DVC "
        "and gives the same adapter with the same code on the same kind of processor; links lead to MLflow runs while "
        "`cola ui` is up."
    )
    for recipe in findings.design.recipes:
        mine = [result for result in findings.results if result.cell.group.recipe == recipe]
        rows = [_row(findings, result) for result in sorted(mine, key=lambda result: result.cell)]
        if rows:
            head = ["cell", "validation loss", "accuracy", "chain", "command"]
            yield Details(f"{recipe}: {len(rows)} cells", Table(head, rows, wide=[4]))


def _row(findings: Findings, result: Result) -> list[str]:
    name, address = result.cell.name, findings.links.get(result.cell)
    loss = result.validation_loss
    accuracy = f"{100 * result.metrics['accuracy']:.2f}" if result.metrics else ""
    chain = "" if result.failed else str(result.content["links"][-1]["chain"])[:12]
    shown = f"{loss:.4f}" if math.isfinite(loss) else str(result.content["failed"])
    return [f"[{name}]({address})" if address else name, shown, accuracy, chain, f"`{result.content['command']}`"]
