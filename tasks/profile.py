"""Probe the gradient of the chain so far: importance, sketch and Frank-Wolfe gap of every module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.context import Context, Done
from tasks.places import ARTIFACTS, link_dir
from tasks.stage import run

RETRIES = 0
BASE, SISTERS, PREPARED = ARTIFACTS / "fetch/model", ARTIFACTS / "fetch/sisters", ARTIFACTS / "prepare"


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
    if config.probe != "none" or "activations" in config.directions:
        directions = _passes(context, config, found)
    if "sisters" in config.directions:
        for name, common in _sisters(context, config, names).items():
            directions.setdefault(name, {}).update(common)
    with new_dir(link_dir(context.key, "profile")) as folder:
        write_sealed(folder / "profile.json", "profile", found)
        if directions:
            from cola_core.tensors import save_tensors

            flat = {f"{name}/{what}": tensor for name, kept in directions.items() for what, tensor in kept.items()}
            save_tensors(folder / "directions.safetensors", flat)
        seal_folder(folder)
    out = link_dir(context.key, "profile")
    return Done(_metrics(found), [_parent(context)], [out], [out / "profile.json"])


def _passes(context: Context, config: Any, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run the probe, and the inputs' pass if asked, on the chain so far; fills `found` and returns the directions."""
    from cola_core.chain import moved
    from cola_core.config.recipe import MachineConfig
    from cola_core.directions import activation_directions
    from cola_core.knot import open_chain
    from cola_core.lineage import read_chain
    from cola_core.probe import probe
    from cola_core.rows import Task
    from cola_core.split_files import read_rows

    chain, machine = read_chain(_parent(context)), context.section(MachineConfig, "machine")
    objective = open_chain(BASE, chain, Task.read(PREPARED / "task.json"), machine)
    modules = {name: objective.model.get_submodule(name) for name in found["modules"]}
    rows = read_rows(PREPARED / "probe.arrow")
    kinds = ", ".join([config.probe, *config.directions])
    print(f"profile: {len(rows)} examples, {len(modules)} modules, {kinds}", flush=True)
    found |= {"examples": len(rows), "tokens": 0}
    directions: dict[str, dict[str, Any]] = {}
    if config.probe != "none":
        result = probe(objective, rows, modules, moved(chain), config, (context.value("seed"), len(chain)))
        directions = result.directions
        found |= {"loss": result.loss, "examples": result.examples, "tokens": result.tokens}
        for name, numbers in result.modules.items():
            found["modules"][name] |= numbers
    if "activations" in config.directions:
        kept, tokens = activation_directions(objective, rows, modules, config.sketch, config.micro_batch)
        found["tokens"] += tokens
        for name, axes in kept.items():
            directions.setdefault(name, {}).update(axes)
            found["modules"][name]["variance"] = axes["variance"].tolist()
    return directions


def _sisters(context: Context, config: Any, names: list[str]) -> dict[str, dict[str, Any]]:
    """What the fetched sisters' changes of the root base have in common."""
    from cola_core.checksums import check_files
    from cola_core.config.recipe import MachineConfig
    from cola_core.directions import sister_directions
    from cola_core.models import as_matrix, load_base
    from cola_core.rows import Task

    check_files(SISTERS)
    machine, labels = context.section(MachineConfig, "machine"), len(Task.read(PREPARED / "task.json").labels)

    def weights(folder: Path) -> dict[str, Any]:
        model = load_base(folder, machine, labels)
        return {name: as_matrix(model.get_submodule(name)) for name in names}

    folders = sorted(path for path in SISTERS.iterdir() if path.is_dir())
    return sister_directions(weights(BASE), map(weights, folders), config.sketch)


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    passed: dict[str, float] = {name: float(found[name]) for name in ("loss", "examples", "tokens") if name in found}
    if found["probe"] == "none":
        return passed
    modules = found["modules"].values()
    totals = {"gap_valid_share": sum(m["gap_valid"] for m in modules) / len(modules)}
    if all(m["gap"] is not None for m in modules):  # none of a module whose weight a link has replaced
        totals["frank_wolfe_gap"] = sum(m["gap"] for m in modules)
    return {**passed, **totals}


def _parent(context: Context) -> Any:
    return link_dir(context.raw["chain"][context.key]["prev"])


if __name__ == "__main__":
    run(main)
