"""Give every module its rank from the profile and the budget."""

from __future__ import annotations

from tasks.context import Context, Done
from tasks.places import ARTIFACTS, link_dir
from tasks.stage import run

RETRIES = 0


def main(context: Context) -> Done:
    """Write ranks.json: importance, advantage, rank, clamp hits, budget asked and spent."""
    from cola_core.axes.allocators import Question, allocate
    from cola_core.config.recipe import AllocateConfig
    from cola_core.sealed import read_sealed, write_sealed

    assert context.key, "allocate runs for one link"
    source = link_dir(context.raw["chain"][context.key]["profile_from"], "profile")
    modules = read_sealed(source / "profile.json", "profile")["modules"]
    shapes = {name: (m["shape"][0], m["shape"][1]) for name, m in modules.items()}
    config = context.section(AllocateConfig, "allocate")
    result = allocate(Question(shapes, modules, config, context.value("seed"), int(context.key)))
    path = ARTIFACTS / "links" / context.key / "ranks.json"
    write_sealed(path, "ranks", result.to_json())
    ranks = result.ranks.values()
    print(
        f"allocate: ranks {min(ranks)} to {max(ranks)} over {len(ranks)} modules, {result.spent:,} of "
        f"{result.budget:,} parameters, {len(result.clamped)} clamped",
        flush=True,
    )
    metrics = {
        "budget": float(result.budget),
        "spent": float(result.spent),
        "clamped": float(len(result.clamped)),
        "rank_mean": sum(ranks) / len(ranks),
    }
    return Done(metrics, inputs=[source], outputs=[path], artifacts=[path])


if __name__ == "__main__":
    run(main)
