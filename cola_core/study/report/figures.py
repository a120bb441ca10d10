"""The figures of a study's report, as SVG texts whose bytes depend on the numbers alone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from cola_core.study.compare import Estimate

__all__ = ["draw_curves", "draw_forest", "draw_losses", "draw_ranks", "draw_steps"]

SETTINGS = {"svg.hashsalt": "cola", "svg.fonttype": "path", "figure.constrained_layout.use": True, "font.size": 9}
INK, GREY, PALE = "#1a202c", "#718096", "#e2e8f0"
COLOURS = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
KIND = re.compile(r"\.\d+\.")


def draw_forest(rows: Sequence[tuple[str, Estimate]], margin: float, what: str) -> str:
    """Differences from the baseline with their intervals, in points; the band is the margin."""
    figure = _figure(7, 0.9 + 0.3 * len(rows))
    axes = figure.subplots()
    axes.axvspan(-100 * margin, 100 * margin, color=PALE, lw=0)
    axes.axvline(0, color=GREY, lw=1)
    for place, (_, found) in enumerate(rows):
        axes.plot([100 * found.low, 100 * found.high], [place, place], color=INK, lw=1.6)
        axes.plot(100 * found.mean, place, "s", color=INK, ms=5)
    axes.set(yticks=range(len(rows)), yticklabels=[name for name, _ in rows], xlabel=what, ylim=(len(rows) - 0.5, -0.5))
    _bare(axes)
    return _svg(figure)


def draw_curves(
    panels: Mapping[str, Mapping[str, Mapping[float, float]]], chosen: Mapping[str, Mapping[str, float]]
) -> str:
    """Validation loss against the learning rate: one panel a task, one line a recipe, a dot where it was chosen.

    The highest sixth of a panel's losses leaves it upwards: one rate that diverged would flatten all else.
    """
    recipes = sorted({recipe for lines in panels.values() for recipe in lines})
    figure = _figure(10, 2.9 * math.ceil(len(panels) / 3) + 0.5)
    grid = figure.subplots(math.ceil(len(panels) / 3), 3, squeeze=False)
    for axes, (task, lines) in zip(grid.flat, panels.items(), strict=False):
        for recipe, curve in lines.items():
            shown = {rate: loss for rate, loss in sorted(curve.items()) if math.isfinite(loss)}
            colour = COLOURS[recipes.index(recipe) % 20]
            axes.plot(list(shown), list(shown.values()), color=colour, lw=1.2, label=recipe)
            if (rate := chosen[task].get(recipe)) in shown:
                axes.plot(rate, shown[rate], "o", color=colour, ms=4.5)
        losses = [loss for curve in lines.values() for loss in curve.values() if math.isfinite(loss)]
        low, high = (float(np.quantile(losses, share)) for share in (0.0, 5 / 6)) if losses else (0.0, 0.0)
        if low < high:
            axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        axes.set(xscale="log", title=task, xlabel="learning rate", ylabel="validation loss")
        _bare(axes)
    _without(grid.flat, len(panels))
    _legend(figure, grid.flat[0])
    return _svg(figure)


def draw_losses(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[int]]]]) -> str:
    """Training loss over the chain, one panel a task: a line a recipe, smoothed over steps, a tick at every knot.

    Args:
        panels: task -> recipe -> (mean loss of every step over seeds, steps after which a knot was tied).
    """
    recipes = sorted({recipe for lines in panels.values() for recipe in lines})
    figure = _figure(10, 2.9 * math.ceil(len(panels) / 3) + 0.5)
    grid = figure.subplots(math.ceil(len(panels) / 3), 3, squeeze=False)
    for axes, (task, lines) in zip(grid.flat, panels.items(), strict=False):
        for recipe, (losses, knots) in lines.items():
            colour, smooth = COLOURS[recipes.index(recipe) % 20], _smoothed(losses)
            axes.plot(range(1, len(smooth) + 1), smooth, color=colour, lw=1.2, label=recipe)
            axes.plot(knots, [smooth[knot - 1] for knot in knots], "|", color=colour, ms=11, mew=1.6)
        axes.set(title=task, xlabel="optimizer step", ylabel="training loss")
        _bare(axes)
    _without(grid.flat, len(panels))
    _legend(figure, grid.flat[0])
    return _svg(figure)


def draw_ranks(maps: Mapping[str, Mapping[str, float]]) -> str:
    """One heat map a name: kinds of module down, blocks across, the mean rank in each."""
    names = sorted({module for ranks in maps.values() for module in ranks})
    kinds, blocks = sorted({KIND.sub(".", name) for name in names}), sorted({_block(name) for name in names})
    top = max(rank for ranks in maps.values() for rank in ranks.values())
    figure = _figure(10, 0.4 + math.ceil(len(maps) / 4) * (0.7 + 0.22 * len(kinds)))
    grid = figure.subplots(math.ceil(len(maps) / 4), 4, squeeze=False, sharey=True)
    image: Any = None
    for axes, (title, ranks) in zip(grid.flat, maps.items(), strict=False):
        table = [[math.nan] * len(blocks) for _ in kinds]
        for name, rank in ranks.items():
            table[kinds.index(KIND.sub(".", name))][blocks.index(_block(name))] = rank
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        short = [kind.split("layer.")[-1] for kind in kinds]
        axes.set(title=title, yticks=range(len(kinds)), yticklabels=short, xticks=range(len(blocks)), xlabel="block")
        axes.title.set_fontsize(8)
    _without(grid.flat, len(maps))
    figure.colorbar(image, ax=grid, label="rank")
    return _svg(figure)


def draw_steps(panels: Mapping[str, Mapping[str, Mapping[int, Estimate]]], across: str) -> str:
    """Numbers along a count, such as links of a chain: one panel a quantity, one line with intervals a family."""
    figure = _figure(3.4 * len(panels), 3.2)
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (quantity, lines) in zip(grid.flat, panels.items(), strict=True):
        for index, (name, points) in enumerate(lines.items()):
            at, found = list(points), list(points.values())
            errors = [[e.mean - e.low for e in found], [e.high - e.mean for e in found]]
            shifted = [x * (1 + 0.03 * index) for x in at]
            axes.errorbar(shifted, [e.mean for e in found], errors, fmt="o-", ms=4, lw=1.2, capsize=2, label=name)
        axes.set(xscale="log", xlabel=across, title=quantity)
        at = sorted({x for points in lines.values() for x in points})
        axes.set_xticks(at, [str(x) for x in at])
        axes.minorticks_off()
        _bare(axes)
    _legend(figure, grid.flat[0])
    return _svg(figure)


def _smoothed(values: Sequence[float], window: int = 10) -> list[float]:
    """Means of up to `window` steps around each."""
    sums, half = [0.0, *accumulate(values)], window // 2
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[high] - sums[low]) / (high - low) for low, high in ends]


def _block(name: str) -> int:
    found = KIND.search(name)
    return int(found.group().strip(".")) if found else 0


def _figure(width: float, height: float) -> Figure:
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        return Figure(figsize=(width, height), layout="constrained")


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _without(grid: Any, used: int) -> None:
    for axes in list(grid)[used:]:
        axes.set_visible(False)


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
