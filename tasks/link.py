"""Train one LoRA on the chain so far, and prove that its knot can be tied."""

from __future__ import annotations

import csv
import importlib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.context import Context, Done
from tasks.places import ARTIFACTS, link_dir
from tasks.progress import progress
from tasks.resume import resume_folder
from tasks.stage import run

if TYPE_CHECKING:
    from cola_core.job import LinkJob

RETRIES = 2  # only exit code 75 is tried again
BASE, PREPARED = ARTIFACTS / "fetch/model", ARTIFACTS / "prepare"
LIVE_AFTER = 10.0  # seconds; the curve of a shorter link comes with its record
CURVES = ("loss", "learning_rate", "validation")


def main(context: Context) -> Done:
    """Write the link's adapter folder: PEFT's two files, losses.csv and link.json."""
    assert context.key, "link runs for one link"
    out, inputs = link_dir(context.key), _inputs(context)
    job = _job(context, inputs)
    with resume_folder(context, list(inputs.values())) as folder, _reporter(context) as report:
        from cola_core.chain import write_link
        from cola_core.links import run_link

        adapter, record, result = run_link(job(folder / "state.safetensors"), report)
        write_link(out, adapter, record, {"losses.csv": _csv(result.losses)})
    if not record["kept"]:
        print(
            f"{context.stage}: dropped: the validation loss is {record['validation_loss']:.4f} with it, "
            f"{record['validation_before']:.4f} without",
            flush=True,
        )
    for number, client in enumerate(record.get("clients", []), start=1):
        if "epsilon" in client:
            told = f"epsilon {client['epsilon']:.3g} at delta {client['delta']:g}"
            print(f"{context.stage}: client {number}, {client['rows']} rows: {told}", flush=True)
    names = ("kept", "steps", "kept_step", "validation_loss", "tokens", "probe_tokens", "trainable_parameters")
    knot = {f"knot_{name}": record["knot"][name] for name in ("score_change", "merge_error_max")}
    metrics = {**{name: float(record[name]) for name in names}, **knot}
    error = {f"start_error_{name}": value for name, value in record["start_error"].items()}
    series = {name: [[e["step"], e[name]] for e in result.losses if e[name] is not None] for name in CURVES}
    return Done({**metrics, **error}, list(inputs.values()), [out], [out / "losses.csv", out / "link.json"], series)


def _inputs(context: Context) -> dict[str, Path]:
    item = context.raw["chain"][context.key]
    return {
        "base": BASE,
        "parent": link_dir(item["prev"]),
        "profile": link_dir(item["profile_from"], "profile"),
        "ranks": ARTIFACTS / "links" / str(context.key) / "ranks.json",
        "task": PREPARED / "task.json",
        "train": PREPARED / "train.arrow",
        "validation": PREPARED / "validation.arrow",
    }


def _job(context: Context, inputs: dict[str, Path]) -> Callable[[Path], LinkJob]:
    """Read everything that decides the link; what is left open is where its resume state is kept."""
    from functools import partial

    from cola_core.config.recipe import LinkConfig, MachineConfig, ScheduleConfig
    from cola_core.job import LinkJob
    from cola_core.lineage import read_chain
    from cola_core.rows import Task
    from cola_core.sealed import read_sealed
    from cola_core.split_files import read_rows

    config = context.section(LinkConfig, "link")
    return partial(
        LinkJob,
        inputs["base"],
        read_chain(inputs["parent"]),
        Task.read(inputs["task"]),
        context.section(MachineConfig, "machine"),
        context.section(ScheduleConfig, "schedule"),
        config,
        context.value("seed"),
        read_sealed(inputs["ranks"], "ranks").get("ranks", {}),
        _directions(inputs["profile"]),
        read_rows(inputs["train"]),
        read_rows(inputs["validation"]),
        probe_tokens=_probe_tokens(context, inputs["profile"]),
    )


def _probe_tokens(context: Context, profile: Path) -> int:
    """What this link's own probe has cost; one that an earlier link took was charged there (law 9)."""
    from cola_core.sealed import read_sealed

    own = context.raw["chain"][context.key]["profile_from"] == context.key
    return int(read_sealed(profile / "profile.json", "profile").get("tokens", 0)) if own else 0


def _directions(profile: Path) -> dict[str, dict[str, Any]]:
    """module -> what the profile kept of it, by name."""
    from cola_core.checksums import check_files
    from cola_core.tensors import load_tensors

    check_files(profile)
    file = profile / "directions.safetensors"
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in load_tensors(file).items() if file.exists() else ():
        module, _, what = name.rpartition("/")
        found.setdefault(module, {})[what] = tensor
    return found


@contextmanager
def _reporter(context: Context) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show every step, and send it to MLflow from a thread.

    The live logger is imported by name: it can only watch, so it is no dependency of the stage in dvc.yaml.
    """
    live = importlib.import_module("tasks.live").Live(context, LIVE_AFTER if context.watched else math.inf)
    with live, progress(context.stage) as tick:

        def report(event: dict[str, Any]) -> None:
            validation = event["validation"]
            text = f"loss {event['loss']:.4f}" + (f"  validation {validation:.4f}" if validation is not None else "")
            tick(event["step"], event["steps"], event["tokens"], text)
            live.step(event["step"], {name: event[name] for name in CURVES if event[name] is not None})

        yield report


def _csv(losses: list[dict[str, Any]]) -> str:
    """One line per step; validation is empty where none was taken."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", "loss", "learning_rate", "tokens", "validation"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(losses)
    return text.getvalue()


if __name__ == "__main__":
    run(main)
