"""Tie every knot and write what the chain can be handed on as."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.context import Context, Done
from tasks.places import ARTIFACTS, link_dir
from tasks.resume import forget_finished
from tasks.stage import run

if TYPE_CHECKING:
    from cola_core.config.recipe import MachineConfig
    from cola_core.lineage import Link

RETRIES = 0
BASE, TASK = ARTIFACTS / "fetch/model", ARTIFACTS / "prepare/task.json"


def main(context: Context) -> Done:
    """Write chain.json and, where asked, the merged checkpoint, the flat and the portable adapter."""
    from cola_core.checksums import seal_folder
    from cola_core.config.recipe import MachineConfig
    from cola_core.config.report import MergeConfig
    from cola_core.export import chain_manifest, flat_adapter, portable_adapter, write_flat
    from cola_core.files import new_dir
    from cola_core.lineage import no_adapter, read_chain
    from cola_core.sealed import write_sealed

    config, machine = context.section(MergeConfig, "merge"), context.section(MachineConfig, "machine")
    last = link_dir(context.value("final"))
    forget_finished()
    chain = read_chain(last)
    with new_dir(ARTIFACTS / "merge") as folder:
        errors = _merge(chain, machine, folder / "checkpoint" if config.checkpoint else None)
        manifest = chain_manifest(chain, errors)
        reason, wanted = no_adapter(manifest["links"]), config.flat_adapter or config.portable_adapter
        if wanted and not reason:
            flat = flat_adapter(chain)
            if config.flat_adapter:
                write_flat(folder / "flat_adapter", flat)
            if config.portable_adapter:
                write_flat(folder / "portable_adapter", portable_adapter(flat))
        write_sealed(folder / "chain.json", "chain", manifest)
        seal_folder(folder)
    if wanted and reason:
        print(f"merge: no adapter is written: {reason}", flush=True)
    kept = sum(link.kept for link in chain[1:])
    print(f"merge: {kept} of {len(chain) - 1} links, chain {manifest['hash'][:12]}", flush=True)
    worst = max((error for modules in errors.values() for error in modules.values()), default=0.0)
    return Done({"merge_error_max": worst}, [BASE, last], [ARTIFACTS / "merge"], [ARTIFACTS / "merge/chain.json"])


def _merge(chain: list[Link], machine: MachineConfig, checkpoint: Path | None) -> dict[int, dict[str, float]]:
    """Merge in the master dtype, cast once, and save what `from_pretrained` loads; returns the errors per link."""
    from cola_core.assets.saving import drop_noise
    from cola_core.chain import tie
    from cola_core.models import load_base, save_merged
    from cola_core.rows import Task

    labels = Task.read(TASK).labels
    model = load_base(BASE, machine, len(labels))
    errors = dict(tie(model, chain))
    if checkpoint:
        save_merged(model, machine, BASE, labels, checkpoint)
        _copy_tokenizer(checkpoint)
        drop_noise(checkpoint)
    return errors


def _copy_tokenizer(checkpoint: Path) -> None:
    """Everything of the base that is neither weights nor what save_pretrained has just written."""
    for file in sorted(BASE.iterdir()):
        taken = file.suffix == ".safetensors" or file.name == "cola.json" or (checkpoint / file.name).exists()
        if file.is_file() and not taken:
            shutil.copyfile(file, checkpoint / file.name)


if __name__ == "__main__":
    run(main)
