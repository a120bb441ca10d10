"""The report of a study, written from whatever results there are."""

from __future__ import annotations

from pathlib import Path

from cola_core.errors import RetryError, UserError
from cola_core.study.design import Cell, Design
from cola_core.study.report.blocks import write_html, write_markdown
from cola_core.study.report.findings import Findings
from cola_core.study.report.page import report
from cola_core.study.results import Result, read_results
from cola_core.study.sweep import counted
from flows.study.orders import Orders, experiment_of, record_id
from flows.ui import HOST, MLFLOW
from tasks.store import open_store

__all__ = ["write_report"]

SAID = "findings.md"  # a person's conclusions, taken into the report as they stand


def write_report(orders: Orders, root: Path) -> Path:
    """Write index.html, README.md and figures/ beside the results; returns the page.

    Results of other parameters than the study has now are left out.

    Raises:
        UserError: no result yet, or a result file that is damaged.
    """
    design = orders.design
    folder = root / design.out
    results = counted(design, filter(orders.makes, read_results(folder)))
    if not results:
        raise UserError(f"{folder}: no results yet; run the study first")
    said = (folder / SAID).read_text(encoding="utf-8") if (folder / SAID).is_file() else ""
    blocks = list(report(Findings(design, results, _links(design, results)), said))
    write_html(folder / "index.html", design.title, blocks)
    write_markdown(folder / "README.md", blocks)
    return folder / "index.html"


def _links(design: Design, results: list[Result]) -> dict[Cell, str]:
    """The MLflow run of every cell that this checkout's store has; a report needs no store."""
    names = {record_id(design.name, result.content["key"]): result.cell for result in results}
    try:
        with open_store() as store:
            experiment = store.client.get_experiment_by_name(experiment_of(design.name))
            runs = store.client.search_runs([experiment.experiment_id], max_results=50_000) if experiment else []
            shared = store.uri.startswith("http") and "@" not in store.uri  # no password goes into a page
            address = store.uri if shared else f"http://{HOST}:{MLFLOW}"  # where `cola ui` shows it
            found = {run.data.tags.get("cola.record", ""): run.info for run in runs}
    except (UserError, RetryError):
        return {}
    return {
        cell: f"{address}/#/experiments/{found[name].experiment_id}/runs/{found[name].run_id}"
        for name, cell in names.items()
        if name in found
    }
