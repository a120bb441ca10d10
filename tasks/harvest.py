"""What a study keeps of a cell once its artifacts go: numbers, ranks, curves, hashes and predictions."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cola_core.checksums import check_files
from cola_core.files import read_json, tree_hash
from cola_core.sealed import read_sealed
from tasks.answered import predictions_of
from tasks.context import Context, Done
from tasks.places import ARTIFACTS, link_dir
from tasks.records import record

__all__ = ["harvest", "leave_record"]

TOLD = ("kept", "kept_step", "steps", "tokens", "probe_tokens", "trainable_parameters", "validation_loss")
SECTIONS = ("machine", "targets", "schedule", "profile", "allocate", "link", "prepare", "chain")
DIGITS = 5


def harvest(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a report may ask of the cell in this folder.

    Returns:
        validation_loss of the whole chain; links: per link what it spent, its ranks, its losses, what its probe found,
        and hashes of its adapter and of the chain up to it; and where the cell was scored: metrics, base, majority,
        predictions (in the order of `rows`) and rows (ids and gold labels).
    """
    links = [_link(key, raw["chain"][key]["profile_from"]) for key in sorted(raw["chain"], key=int)]
    scored = _scored(raw["final"]) if (ARTIFACTS / "evaluate").is_dir() else {}
    return {"validation_loss": links[-1]["validation_loss"], "links": links, **scored}


def leave_record(noted: Mapping[str, Any], raw: Mapping[str, Any], found: Mapping[str, Any], started: float) -> None:
    """Leave the record that `cola sync` makes one MLflow run of; left twice, it is the same run.

    Args:
        noted: id, name, experiment and more parameters; found: what `harvest` returned, or why training failed.
    """
    used = {**noted["used"], **{name: raw[name] for name in SECTIONS}}
    named = {**raw, "register": {"name": noted["experiment"]}}
    context = Context(noted["name"], None, named, record_id=noted["id"], used=used)
    if "failed" in found:
        record(context, Done(), started, "FAILED")
        return
    losses = [[step, loss] for step, loss in enumerate((x for link in found["links"] for x in link["losses"]), start=1)]
    numbers = {"validation_loss": found["validation_loss"], **found.get("metrics", {})}
    metrics = {name: float(value) for name, value in numbers.items()}
    record(context, Done(metrics, inputs=[link_dir(raw["final"])], series={"loss": losses}), started)


def _link(key: str, profile_from: str) -> dict[str, Any]:
    folder = link_dir(key)
    record = read_sealed(folder / "link.json", "link")
    ranks = read_sealed(ARTIFACTS / "links" / key / "ranks.json", "ranks")
    profile = read_sealed(link_dir(profile_from, "profile") / "profile.json", "profile")
    with (folder / "losses.csv").open(encoding="utf-8", newline="") as file:
        steps = list(csv.DictReader(file))
    found = {name: record[name] for name in TOLD}
    return found | {
        "ranks": ranks["ranks"],
        "budget": ranks["budget"],
        "spent": ranks["spent"],
        "losses": [_short(step["loss"]) for step in steps],
        "validation": [[int(step["step"]), _short(step["validation"])] for step in steps if step["validation"]],
        "knot_change": record["knot"]["score_change"],
        "probe": _probe(profile),
        "adapter": _adapter(folder),
        "chain": tree_hash(folder / "link.json"),
    }


def _adapter(folder: Path) -> str | None:
    """sha256 of the pair's file; none for a link that was dropped."""
    file = folder / "adapter_model.safetensors"
    return tree_hash(file) if file.is_file() else None


def _probe(profile: Mapping[str, Any]) -> dict[str, float] | None:
    """Loss and Frank-Wolfe gap before the link, where a gradient was taken."""
    if profile["probe"] == "none":
        return None
    modules = profile["modules"].values()
    gaps = [module["gap"] for module in modules if module["gap"] is not None]
    return {"loss": profile["loss"], "gap": sum(gaps), "gap_valid": sum(m["gap_valid"] for m in modules) / len(modules)}


def _scored(final: str) -> dict[str, Any]:
    for stage in ("evaluate", "evaluate_base"):
        check_files(ARTIFACTS / stage)
    metrics = read_json(ARTIFACTS / "evaluate/metrics.json")
    table = predictions_of(ARTIFACTS / "evaluate")
    mine = {name.removeprefix(f"links_{final}_"): column for name, column in table.items()}
    predictions: dict[str, Any] = {
        "correct": "".join(str(int(bit)) for bit in mine["correct"]),
        "predicted": mine["predicted"],
        **{name: [_short(value) for value in mine[name]] for name in ("loss", "confidence") if name in mine},
    }
    top = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    others = {name: metrics[name] for name in ("base", "majority") if name in metrics}
    return {"metrics": top, **others, "predictions": predictions, "rows": {"id": table["id"], "gold": table["gold"]}}


def _short(value: float | str) -> float:
    return round(float(value), DIGITS)
