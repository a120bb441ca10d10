"""`make methods`: every recipe on MiniLM and SST-2, stage by stage as DVC runs them: does it learn, what does it take.

A smoke test with numbers, no ranking: one seed, some hundred steps, and one learning rate for all that learn at it.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer

from benchmarks.setting import ROOT
from cola_core.config.compositions import REFUSALS, Refusal
from cola_core.config.reading import load_yaml, read_yaml
from cola_core.files import new_file, read_json
from flows.child import quiet
from flows.compose import choices, compose

DATA, PAGE = ROOT.parent / "shared" / "data" / "sst2", ROOT / "docs/methods.md"
STEPS, RATE = 120, 2e-3
RATES = {"lora_ga": 2e-4, "lora_plus": 2e-4, "lora_rite": 5e-4}  # larger steps: little or nothing is learned at RATE
HEADINGS = (
    "recipe",
    "links",
    "steps",
    "trainable",
    "rate",
    "probe tokens",
    "ms/step",
    "peak GB",
    "validation loss",
    "accuracy",
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def every(only: list[str] | None = None) -> None:
    """Run each recipe in a process of its own, and put its row into the table of docs/methods.md."""
    rows = told(PAGE, "methods") if only else {}
    for recipe in only or choices(ROOT, "method"):
        command = [sys.executable, "-m", "benchmarks.methods", "one", recipe]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{recipe}: {done.stderr.strip().splitlines()[-1]}")
        rows[f"`{recipe}`"] = _cells(json.loads(done.stdout.splitlines()[-1]))
        print(*rows[f"`{recipe}`"], sep="  ", flush=True)
    put_into(PAGE, "methods", [HEADINGS, *(rows[name] for name in sorted(rows))])


@app.command()
def refusals() -> None:
    """Put what does not compose into docs/methods.md."""
    put_into(PAGE, "refusals", [("one value", "with", "reason"), *map(refusal_cells, REFUSALS)])


def refusal_cells(refusal: Refusal) -> tuple[str, str, str]:
    """A refusal as three cells of the table."""
    names = (", ".join(f"`{name}`" for name in sorted(values)) for values in (refusal.values, refusal.others))
    one, two = (f"`{key}` {told}" for key, told in zip((refusal.key, refusal.other), names, strict=True))
    return one, two, refusal.reason


@app.command()
def one(recipe: str) -> None:
    """Run one recipe here and print what it took as JSON."""
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        subprocess.run(["git", "init", "-q"], check=True)
        Path("params.yaml").write_text(compose(ROOT, {"method": recipe, **PICKS}, list(overrides(recipe))))
        print(json.dumps(measured(recipe)))


PICKS = {"task": "sst2", "model": "minilm_l6", "chain": None}


def overrides(recipe: str) -> Iterator[str]:
    """The files beside the checkout, a short horizon, and what a recipe's rounds need to have their turn in it."""
    for name, file in (("train", "train.tsv"), ("test", "test.tsv")):
        yield f"fetch.data.{name}.asset=path:{DATA / file}"
        yield f"fetch.data.{name}.sha256=null"
    steps = STEPS // ROUND if "fedavg" in str(_link(recipe).get("update")) else STEPS
    yield from (f"schedule.horizon={steps}", "targets=all", "evaluate.prefixes=false", "prepare.validation=200")
    yield f"link.validate_every={max(1, steps // 6)}"
    yield f"link.learning_rate={_rate(recipe)}"
    yield from ROUNDS.get(recipe, ())


def _link(recipe: str) -> dict[str, Any]:
    """What the recipe says of its links."""
    said: dict[str, Any] = read_yaml(ROOT / f"conf/method/{recipe}.yaml").get("link", {})
    return said


def _rate(recipe: str) -> float:
    """The recipe's own learning rate, else the one it learns at here."""
    return float(_link(recipe).get("learning_rate", RATES.get(recipe, RATE)))


ROUND = 12  # batches of a round of ffa_lora_federated: as many are read as by other recipes
# Rounds inside a link, as often as in the recipes' own short links.
ROUNDS = {
    "beam_lora": ("link.pruning.every=20",),
    "alora": ("link.pruning.first=30", "link.pruning.every=30"),
}


def measured(recipe: str) -> dict[str, Any]:
    """Run every stage in this process; the times are those between the steps that the links report."""
    from cola_core import links

    stamps: list[float] = []
    honest: Callable[..., Any] = links.run_link

    def watched(job: Any, report: Callable[[dict[str, Any]], None]) -> Any:
        def both(event: dict[str, Any]) -> None:
            report(event)
            stamps.append(time.perf_counter())

        stamps.append(-1.0)
        return honest(job, both)

    links.run_link = watched  # type: ignore[assignment]
    keys = list(load_yaml(Path("params.yaml").read_text())["chain"])
    for stage in ("fetch", "prepare", "head", "evaluate_base"):
        run(stage)
    for key in keys:
        for stage in ("profile", "allocate", "link"):
            run(stage, key)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for stage in ("merge", "evaluate"):
        run(stage)
    return {"recipe": recipe, "links": len(keys), "peak": memory, "step": _typical(stamps), **_results(keys)}


def run(stage: str, key: str | None = None) -> None:
    """One stage's main, as `python -m tasks.<stage>` calls it."""
    from importlib import import_module

    from tasks.context import open_context

    import_module(f"tasks.{stage}").main(open_context(stage, key))


def _typical(stamps: list[float]) -> float:
    """Median milliseconds between two steps of one link; validations fall among the longest."""
    gaps = [b - a for a, b in pairwise(stamps) if min(a, b) > 0]
    return 1e3 * statistics.median(gaps)


def _results(keys: list[str]) -> dict[str, Any]:
    records = [read_json(Path(f"artifacts/links/{key}/adapter/link.json")) for key in keys]
    scores = read_json(Path("artifacts/evaluate/metrics.json"))
    return {
        "steps": sum(record["steps"] for record in records),
        "trainable": max(record["trainable_parameters"] for record in records),
        "probe": sum(record["probe_tokens"] for record in records),
        "loss": records[-1]["validation_loss"],
        "scores": scores,
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    accuracy = row["scores"]["accuracy"]
    low, high = row["scores"]["accuracy_low"], row["scores"]["accuracy_high"]
    cells = [f"`{row['recipe']}`", row["links"], row["steps"], f"{row['trainable']:,}"]
    cells += [
        f"{_rate(row['recipe']):.0e}".replace("e-0", "e-"),
        f"{row['probe']:,}",
        f"{row['step']:.0f}",
        f"{row['peak']:.2f}",
        f"{row['loss']:.3f}",
        f"{accuracy:.3f} [{low:.3f}, {high:.3f}]",
    ]
    return list(map(str, cells))


def told(page: Path, name: str) -> dict[str, list[str]]:
    """First cell -> cells of every row that stands between two markers of `page`."""
    begin, end = _markers(name)
    lines = page.read_text(encoding="utf-8").split(begin)[1].split(end)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row for row in rows[2:]}


def put_into(page: Path, name: str, rows: Sequence[Sequence[str]]) -> None:
    """Replace the table between two markers of `page`; the first row holds its headings."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    begin, end = _markers(name)
    before, rest = page.read_text(encoding="utf-8").split(begin)
    with new_file(page) as temporary:
        text = "\n".join([before + begin, "", *lines, "", end + rest.split(end)[1]])
        temporary.write_text(text, encoding="utf-8")


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


if __name__ == "__main__":
    app()
