"""Score the base model and the majority class on the test sample."""

from __future__ import annotations

from tasks.answers import PREPARED, answers_of, test_sample
from tasks.context import Context, Done
from tasks.places import ARTIFACTS, link_dir
from tasks.stage import run

RETRIES = 0
OUT = ARTIFACTS / "evaluate_base"


def main(context: Context) -> Done:
    """Write metrics.json and predictions.arrow; the same for every recipe."""
    from cola_core.checksums import seal_folder
    from cola_core.config.report import EvaluateConfig
    from cola_core.evaluation.answers import write_predictions
    from cola_core.evaluation.metrics import majority, summary
    from cola_core.files import new_dir, write_json
    from cola_core.lineage import read_chain
    from cola_core.split_files import read_rows

    config, seed = context.section(EvaluateConfig, "evaluate"), context.value("seed")
    task, rows = test_sample(context)
    found = answers_of(context, "base", read_chain(link_dir("0")), task, rows)
    classes = task.kind != "generate"
    scores = summary(found.predicted, found.gold, found.loss, config, seed, found.confidence, classes)
    metrics = {"base": scores}
    if classes:
        train = [row.reference for row in read_rows(PREPARED / "train.arrow")]
        metrics["majority"] = majority(train, found.gold, config, seed)
    with new_dir(OUT) as folder:
        write_json(folder / "metrics.json", metrics)
        write_predictions(folder / "predictions.arrow", rows, {"base": found})
        seal_folder(folder)
    flat = {f"{name}_{key}": value for name, numbers in metrics.items() for key, value in numbers.items()}
    return Done(flat, [link_dir("0"), PREPARED / "test.arrow"], [OUT], [OUT / "metrics.json"])


if __name__ == "__main__":
    run(main)
