"""docs/performance.md's measured part: a table and a figure of one results file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cola_core.files import new_file, read_json

__all__ = ["put_into", "table"]

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def table(results: Mapping[str, Any]) -> str:
    """The machine in a line, then a row per figure."""
    about = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines = [
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['memory_gb']} GB, "
        f"{', '.join(about['instructions'])}; Python {about['python']}, {packages}; commit {about['commit']}, "
        f"{about['date']}.",
        "",
        "| figure | ours | peer | ratio (10 % .. 90 %) | n | goal | met |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in results["rows"]),
    ]
    notes = [f"- `{row['id']}`: {row['note']}." for row in results["rows"] if row["note"]]
    return "\n".join([*lines, "", *notes])


def put_into(page: Path, results: Path, figure: Path) -> None:
    """Replace what stands between the markers of `page`, and draw the curves beside it."""
    content = read_json(results)
    picture = ""
    if content["curves"]:
        _draw(content["curves"], figure)
        picture = f"\n\n![tokens per second, memory, the sampled probe]({figure.name})"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    with new_file(page) as temporary:
        between = f"{BEGIN}\n\n{table(content)}{picture}\n\n{END}"
        temporary.write_text(before + between + rest.split(END)[1], encoding="utf-8")


def _line(row: Mapping[str, Any]) -> str:
    peer = _number(row["peer"], row["unit"]) if row["peer"] is not None else ""
    ratio = ""
    if row["ratio_median"] is not None:
        ratio = f"**{row['ratio_median']:.3g}** ({row['ratio_low']:.3g} .. {row['ratio_high']:.3g})"
    met = {True: "yes", False: "**no**", None: ""}[row["met"]]
    goal = "" if row["goal"] is None else f"{'>=' if row['at_least'] else '<='} {row['goal']:g}"
    ours = _number(row["ours"], row["unit"])
    return f"| {row['what']} (`{row['id']}`) | {ours} | {peer} | {ratio} | {row['n']} | {goal} | {met} |"


def _number(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.3g} {unit}".strip()


def _draw(curves: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s and memory against rank, modules, length and batch; the sampled probe's trade."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 3), constrained_layout=True, squeeze=False)
    for axis, curve in zip(axes[0], curves, strict=True):
        _one(axis, curve)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _one(axis: Any, curve: Mapping[str, Any]) -> None:
    points = curve["points"]
    if curve["id"] == "probe-sampled":
        axis.plot([p["memory_share"] for p in points], [p["equal_ranks"] for p in points], "o-")
        axis.set(xlabel="memory / target weights", ylabel="share of equal ranks", ylim=(0, 1), title="sampled probe")
        return
    axis.set(xlabel=curve["id"].removeprefix("tokens-"), title="tokens/s (blue), MiB (grey)")
    for side, key, style in ((axis, "tokens_per_second", "o-"), (axis.twinx(), "peak_mib", "s--")):
        y = [p[key] for p in points]
        side.plot([str(p["x"]) for p in points], y, style, color="grey" if side is not axis else None)
        side.set(ylim=(0, 1.15 * max(y)))
