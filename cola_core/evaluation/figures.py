"""Figures of a chain, as SVG and PNG files whose bytes depend on the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["draw_confusion", "draw_losses", "draw_ranks", "draw_scores"]

matplotlib.rcParams |= {"svg.hashsalt": "cola", "svg.fonttype": "path", "figure.constrained_layout.use": True}
matplotlib.rcParams["font.size"] = 9
BLUE, RED, GREY = "#2b6cb0", "#c05621", "#718096"


def draw_losses(folder: Path, losses: Sequence[Mapping[str, Any]]) -> None:
    """Training and validation loss over the whole chain; a line at every knot.

    Args:
        losses: {link, step, loss, validation} with steps counted over the chain.
    """
    figure = Figure(figsize=(6, 3))
    axes = figure.subplots()
    axes.plot([e["step"] for e in losses], [e["loss"] for e in losses], color=BLUE, lw=1, label="training, per step")
    seen = [(e["step"], e["validation"]) for e in losses if e["validation"] is not None]
    axes.plot(*zip(*seen, strict=True), "o-", color=RED, ms=4, label="validation")
    for before, after in pairwise(losses):
        if before["link"] != after["link"]:
            axes.axvline(before["step"] + 0.5, color=GREY, ls="--", lw=1)
            at, where = (before["step"] + 0.5, 1), ("data", "axes fraction")
            axes.annotate(f"knot {before['link']}", at, (3, -10), where, "offset points", color=GREY)
    axes.set(xlabel="optimizer step", ylabel="loss", ylim=(0, None))
    axes.legend(frameon=False)
    _save(figure, folder / "losses")


def draw_ranks(folder: Path, ranks: Mapping[int, Mapping[str, int]]) -> None:
    """One heat map per link: blocks across, kinds of module down."""
    kinds = sorted({_kind(name) for modules in ranks.values() for name in modules})
    blocks = sorted({_block(name) for modules in ranks.values() for name in modules})
    top = max(rank for modules in ranks.values() for rank in modules.values())
    height = 0.6 + len(ranks) * (0.5 + 0.22 * len(kinds))
    figure = Figure(figsize=(max(4, 0.24 * len(blocks) + 2), height))
    grid = figure.subplots(len(ranks), 1, squeeze=False)
    for axes, (link, modules) in zip(grid[:, 0], ranks.items(), strict=True):
        table = [[math.nan] * len(blocks) for _ in kinds]
        for name, rank in modules.items():
            table[kinds.index(_kind(name))][blocks.index(_block(name))] = rank
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axes.set(title=f"rank per module, link {link}", yticks=range(len(kinds)), yticklabels=kinds, xlabel="block")
        figure.colorbar(image, ax=axes)
    _save(figure, folder / "ranks")


def draw_confusion(folder: Path, table: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """True label down, predicted label across; each cell its count."""
    size = 1.5 + 0.5 * len(labels)
    figure = Figure(figsize=(size + 0.5, size))
    axes = figure.subplots()
    axes.imshow([[n / max(1, sum(row)) for n in row] for row in table], cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(table):
        for x, count in enumerate(row):
            axes.text(x, y, str(count), ha="center", va="center", color="white" if count > sum(row) / 2 else "black")
    axes.set(xlabel="predicted", ylabel="true", yticks=range(len(labels)), yticklabels=labels)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    _save(figure, folder / "confusion")


def draw_scores(folder: Path, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Accuracy of every model with its interval.

    Args:
        metrics: name -> {accuracy, accuracy_low, accuracy_high}.
    """
    figure = Figure(figsize=(6, 0.6 + 0.35 * len(metrics)))
    axes = figure.subplots()
    for y, m in enumerate(metrics.values()):
        axes.plot([m["accuracy_low"], m["accuracy_high"]], [y, y], color=GREY, lw=2)
        axes.plot(m["accuracy"], y, "o", color=BLUE)
    axes.set(yticks=range(len(metrics)), yticklabels=list(metrics), xlim=(0, 1), xlabel="accuracy, with its interval")
    axes.invert_yaxis()
    _save(figure, folder / "scores")


def _kind(name: str) -> str:
    """The part of a module's name after its last number: self_attn.q_proj."""
    parts = name.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[last + 1 :])


def _block(name: str) -> tuple[str, int]:
    """Where a module stands: (stack, number), such as ("model.layers", 12)."""
    parts = name.split(".")
    first = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:first]), int(parts[first])


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
