"""What an evaluation leaves for people: tables for plots, figures, one self-contained HTML page."""

from __future__ import annotations

import csv
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_core.evaluation.answers import Answers
from cola_core.evaluation.figures import draw_confusion, draw_losses, draw_ranks, draw_scores
from cola_core.evaluation.metrics import confusion
from cola_core.evaluation.scoreboard import cell, compared
from cola_core.lineage import Link

__all__ = ["write_report"]

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a202c}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #e2e8f0}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}code{font-size:.9em}"""


def write_report(
    folder: Path, metrics: Mapping[str, Any], chain: Sequence[Link], answers: Answers, labels: list[str]
) -> None:
    """Write losses.csv, ranks.csv, confusion.csv, figures/*.svg and *.png, and report.html into `folder`."""
    losses, ranks = chain_losses(chain), {link.number: link.record["ranks"] for link in chain[1:]}
    figures = folder / "figures"
    _write_csv(folder / "losses.csv", losses)
    _write_csv(
        folder / "ranks.csv", [{"link": k, "module": n, "rank": r} for k, m in ranks.items() for n, r in m.items()]
    )
    draw_losses(figures, losses)
    draw_ranks(figures, ranks)
    draw_scores(figures, compared(metrics))
    if labels:
        pairs = zip(answers.gold, answers.predicted, strict=True)
        _write_csv(folder / "confusion.csv", [{"actual": gold, "predicted": said} for gold, said in pairs])
        draw_confusion(figures, confusion(answers.predicted, answers.gold, labels), labels)
    page = _page(metrics, chain, [path.read_text(encoding="utf-8") for path in sorted(figures.glob("*.svg"))])
    (folder / "report.html").write_text(page, encoding="utf-8")


def chain_losses(chain: Sequence[Link]) -> list[dict[str, Any]]:
    """Every training step of the chain: {link, step (counted over the chain), loss, validation}."""
    found: list[dict[str, Any]] = []
    for link in chain[1:]:
        offset = found[-1]["step"] if found else 0
        with (link.folder / "losses.csv").open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                validation = float(line["validation"]) if line["validation"] else None
                step = offset + int(line["step"])
                found.append({"link": link.number, "step": step, "loss": float(line["loss"]), "validation": validation})
    return found


def _page(metrics: Mapping[str, Any], chain: Sequence[Link], figures: Sequence[str]) -> str:
    base = chain[0].record["base"]
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{cell(s, 'accuracy')}<td>{cell(s, 'macro_f1')}<td>{s['n']}"
        for name, s in compared(metrics).items()
    )
    links = "".join(
        f"<tr><td>{link.number}<td>{link.record['steps']}<td>{link.record['kept_step']}<td>{link.record['tokens']:,}"
        f"<td>{link.record['trainable_parameters']:,}<td>{link.record['knot']['score_change']:.1e}"
        for link in chain[1:]
    )
    drawings = "".join(svg[svg.index("<svg") :] for svg in figures)
    return (
        f"<!doctype html><meta charset=utf-8><title>Chain {chain[-1].hash[:12]}</title><style>{STYLE}</style>"
        f"<h1>Chain <code>{chain[-1].hash[:12]}</code></h1>"
        f"<p>{len(chain) - 1} links over <code>{html.escape(base['asset'])}</code>"
        f"<h2>Scores on the test sample</h2><table><tr><th>model<th>accuracy<th>macro-F1<th>n{rows}</table>"
        "<p>Intervals: percentile bootstrap over test rows, one training seed."
        "<h2>Links</h2><table><tr><th>link<th>steps<th>kept<th>tokens<th>trainable parameters<th>change at the knot"
        f"{links}</table>{drawings}\n"
    )


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
