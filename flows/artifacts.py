"""What a finished stage shows in Prefect's UI: a table of ranks, a table of scores, the figures."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from cola_core.evaluation.scoreboard import cell, compared
from flows.graph import Stage
from flows.server import only_shown

__all__ = ["show"]


def show(root: Path, stage: Stage) -> None:
    """Make the artifacts of `stage` from its files below `root`; a stage without any shows nothing.

    A workspace may hold another version of the project than this code: files it cannot read fail no stage, nor does a
    server that is away.
    """
    if stage.task not in SHOWN:
        return
    try:
        only_shown(f"{stage.name}'s artifacts", lambda: SHOWN[stage.task](root, stage))
    except (KeyError, TypeError, ValueError) as error:
        get_run_logger().warning("%s: its files are not as expected here, nothing is shown: %r", stage.name, error)


def _ranks(root: Path, stage: Stage) -> None:
    """Rank and importance of every module of one link."""
    content = _read(root / "artifacts" / "links" / str(stage.key) / "ranks.json")
    ranks = content.get("ranks", {})
    columns = {name: content[name] for name in ("importance", "advantage", "clamped") if content.get(name)}
    rows = [
        {"module": module, "rank": rank, **{name: _plain(values.get(module)) for name, values in columns.items()}}
        for module, rank in ranks.items()
    ]
    if rows:
        told = f"link {stage.key}: {content['spent']:,} of {content['budget']:,} parameters"
        create_table_artifact(rows, key=f"ranks-{stage.key}", description=told)


def _scores(root: Path, _: Stage) -> None:
    """Scores of the chain beside its prefixes, the base and the majority class; then every figure."""
    folder = root / "artifacts" / "evaluate"
    content = _read(folder / "metrics.json")
    rows = [
        {"model": name, **{key: _plain(value) for key, value in scores.items() if isinstance(value, (int, float))}}
        for name, scores in compared(content).items()
    ]
    if content:
        create_table_artifact(rows, key="scores", description=f"on n = {content.get('n')} rows of the test file")
        create_markdown_artifact(_summary(rows, content), key="summary", description="what the run came to")
    for figure in sorted((folder / "figures").glob("*.png")):
        data = base64.b64encode(figure.read_bytes()).decode()
        # The server stores links only; a data address is one that needs no file server and outlives the workspace.
        create_image_artifact(f"data:image/png;base64,{data}", key=_key(figure.stem), description=figure.stem)


SHOWN: dict[str, Callable[[Path, Stage], None]] = {"allocate": _ranks, "evaluate": _scores}


def _summary(rows: list[dict[str, Any]], content: dict[str, Any]) -> str:
    """One Markdown table: accuracy and macro-F1 with their intervals where the evaluation gave them."""
    lines = ["| model | accuracy | macro-F1 |", "|---|---|---|"]
    lines += [f"| {row['model']} | {cell(row, 'accuracy')} | {cell(row, 'macro_f1')} |" for row in rows]
    return "\n".join([*lines, "", f"n = {content.get('n')}; in brackets the bootstrap interval."])


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _plain(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
