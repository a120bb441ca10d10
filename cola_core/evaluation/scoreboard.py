"""The models of one evaluation side by side, as every table shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["cell", "compared", "scoreboard"]


def compared(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name -> scores: majority class, base model, then every prefix; the last prefix is the whole chain.

    Args:
        metrics: the content of metrics.json.
    """
    named = {"majority class": metrics.get("majority"), "base model": metrics.get("base")}
    prefixes = metrics.get("prefixes", {})
    named |= {"link 1" if k == "1" else f"links 1..{k}": prefixes[k] for k in sorted(prefixes, key=int)}
    return {name: scores for name, scores in named.items() if scores}


def cell(scores: Mapping[str, Any], name: str) -> str:
    """A score with its interval, `0.912 [0.884, 0.938]`; `-` where it was not taken."""
    if name not in scores:
        return "-"
    return f"{scores[name]:.3f} [{scores[name + '_low']:.3f}, {scores[name + '_high']:.3f}]"


def scoreboard(metrics: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    lines = [f"{'':<16}{'accuracy':<24}{'macro-F1':<24}n"]
    for name, scores in compared(metrics).items():
        lines.append(f"{name:<16}{cell(scores, 'accuracy'):<24}{cell(scores, 'macro_f1'):<24}{scores['n']}")
    return "\n".join(lines)
