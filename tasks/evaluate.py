"""Score the chain and its prefixes on the test sample, beside the base and the majority class; draw the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.answers import PREPARED, answers_of, test_sample
from tasks.context import Context, Done
from tasks.places import ARTIFACTS, link_dir
from tasks.stage import run

if TYPE_CHECKING:
    from cola_core.evaluation.answers import Answers
    from cola_core.lineage import Link

RETRIES = 0
OUT, MERGE, EVALUATE_BASE = ARTIFACTS / "evaluate", ARTIFACTS / "merge", ARTIFACTS / "evaluate_base"


def main(context: Context) -> Done:
    """Write metrics.json, predictions.arrow, the plots' tables, figures and report.html."""
    from cola_core.checksums import check_files, seal_folder
    from cola_core.config.report import EvaluateConfig
    from cola_core.evaluation.answers import write_predictions
    from cola_core.evaluation.metrics import summary
    from cola_core.evaluation.report import write_report
    from cola_core.evaluation.scoreboard import scoreboard
    from cola_core.files import new_dir, read_json, write_json
    from cola_core.lineage import read_chain

    config, seed = context.section(EvaluateConfig, "evaluate"), context.value("seed")
    task, rows = test_sample(context)
    chain = read_chain(link_dir(context.value("final")))
    check_files(EVALUATE_BASE)
    found = _prefixes(context, chain, config.prefixes, task, rows)
    classes = task.kind != "generate"
    prefixes = {
        name: summary(a.predicted, a.gold, a.loss, config, seed, a.confidence, classes) for name, a in found.items()
    }
    last = str(len(chain) - 1)
    metrics = {**prefixes[last], **read_json(EVALUATE_BASE / "metrics.json"), "prefixes": prefixes}
    with new_dir(OUT) as folder:
        write_json(folder / "metrics.json", metrics)
        write_predictions(folder / "predictions.arrow", rows, {f"links_{k}": a for k, a in found.items()})
        write_report(folder, metrics, chain, found[last], task.labels)
        seal_folder(folder)
    print(scoreboard(metrics), flush=True)
    return Done(
        _flat(metrics),
        [MERGE, EVALUATE_BASE, PREPARED / "test.arrow"],
        [OUT],
        [OUT / "metrics.json", OUT / "report.html", *sorted((OUT / "figures").iterdir())],
    )


def _prefixes(context: Context, chain: list[Link], all_of_them: bool, task: Any, rows: Any) -> dict[str, Answers]:
    """Answers by prefix length; the last prefix is the whole chain, that is the merged model."""
    lengths = range(1, len(chain)) if all_of_them else [len(chain) - 1]
    return {str(k): answers_of(context, f"links 1..{k}", chain[: k + 1], task, rows) for k in lengths}


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": float(value)}
    return flat


if __name__ == "__main__":
    run(main)
