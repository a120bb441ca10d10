"""Probe the gradient of the chain so far: importance, sketch and Frank-Wolfe gap of every module."""

from __future__ import annotations

from typing import Any

from tasks.context import Context, Done
from tasks.places import ARTIFACTS, link_dir
from tasks.stage import run

RETRIES = 0
BASE, PREPARED = ARTIFACTS / "fetch/model", ARTIFACTS / "prepare"


def main(context: Context) -> Done:
    """Write profile.json and directions.safetensors; without a probe only names and shapes of modules, and no torch."""
    from cola_core.checksums import seal_folder
    from cola_core.config.recipe import ProfileConfig
    from cola_core.files import new_dir
    from cola_core.root import base_manifest
    from cola_core.sealed import write_sealed
    from cola_core.targets import select_targets

    assert context.key, "profile runs for one link"
    config = context.section(ProfileConfig, "profile")
    shapes = base_manifest(BASE)["modules"]
    names = select_targets(shapes, context.value("targets"))
    found: dict[str, Any] = {"probe": config.probe, "modules": {name: {"shape": shapes[name]} for name in names}}
    directions: dict[str, dict[str, Any]] = {}
    if config.probe != "none":
        directions = _probe(context, config, found)
    with new_dir(link_dir(context.key, "profile")) as folder:
        write_sealed(folder / "profile.json", "profile", found)
        if directions:
            from cola_core.tensors import save_tensors

            flat = {f"{name}/{what}": tensor for name, kept in directions.items() for what, tensor in kept.items()}
            save_tensors(folder / "directions.safetensors", flat)
        seal_folder(folder)
    out = link_dir(context.key, "profile")
    return Done(_metrics(found), [_parent(context)], [out], [out / "profile.json"])


def _probe(context: Context, config: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Run the probe on the chain so far; fills `found` and returns the directions."""
    from cola_core.chain import moved, tie
    from cola_core.config.recipe import MachineConfig
    from cola_core.lineage import read_chain
    from cola_core.models import load_base, place
    from cola_core.probe import probe
    from cola_core.rows import Task
    from cola_core.scoring import Objective
    from cola_core.split_files import read_rows

    machine = context.section(MachineConfig, "machine")
    chain, task = read_chain(_parent(context)), Task.read(PREPARED / "task.json")
    model = load_base(BASE, machine, len(task.labels))
    dict(tie(model, chain))
    objective = Objective(place(model, machine), chain[0].record["base"]["kind"], task)
    modules = {name: model.get_submodule(name) for name in found["modules"]}
    rows = read_rows(PREPARED / "probe.arrow")
    print(f"profile: {len(rows)} examples, {len(modules)} modules, {config.probe}", flush=True)
    result = probe(objective, rows, modules, moved(chain), config, (context.value("seed"), len(chain)))
    found |= {"loss": result.loss, "examples": result.examples, "tokens": result.tokens}
    for name, numbers in result.modules.items():
        found["modules"][name] |= numbers
    return result.directions


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    if found["probe"] == "none":
        return {}
    modules = found["modules"].values()
    totals = {"gap_valid_share": sum(m["gap_valid"] for m in modules) / len(modules)}
    if all(m["gap"] is not None for m in modules):  # none of a module whose weight a link has replaced
        totals["frank_wolfe_gap"] = sum(m["gap"] for m in modules)
    return {**{name: float(found[name]) for name in ("loss", "examples", "tokens")}, **totals}


def _parent(context: Context) -> Any:
    return link_dir(context.raw["chain"][context.key]["prev"])


if __name__ == "__main__":
    run(main)
