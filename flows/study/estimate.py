"""How long a study may take, told before it starts: by arithmetic for every cell, and one timed micro-step a model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from cola_core.config.params import Params, check_params, knot_of
from cola_core.study.design import Cell, Design, Group
from cola_core.study.results import Result
from cola_core.study.sweep import choose, curves
from flows.cost import cost, reference_ranks
from flows.plan import speed_of
from flows.sizes import Sizes, sizes
from flows.study.keep import raise_if_failed
from flows.study.orders import Orders
from flows.study.pool import Pool
from flows.timing import measure

__all__ = ["estimate"]

FIXED = 4.0  # seconds of a cell beside its arithmetic: models are opened and closed, files written


def estimate(design: Design, orders: Orders, results: Sequence[Result], pool: Pool, home: Path) -> float:
    """Seconds of one process that the cells without a result may take, where no grid has to be extended.

    The first cell of every model and task is prepared for it, which the cells then share.

    Args:
        home: a folder for what is prepared.

    Raises:
        UserError, RetryError: what stopped a stage.
    """
    swept, known, total = curves(design, results), {result.cell for result in results}, 0.0
    scouted: dict[tuple[str, str], tuple[Sizes, float]] = {}
    for group in design.groups():
        if group.panel not in scouted:
            scouted[group.panel] = _scout(group, design, orders, pool, home)
        size, speed = scouted[group.panel]
        missing = choose(design.sweep, design.rates(group.recipe), swept[group]).missing
        tested = sum(cell.phase == "test" and cell.group == group for cell in known)
        tests = len(design.seeds) - tested
        total += len(missing) * len(design.sweep.seeds) * _seconds(Cell("sweep", group, 1.0, 0), orders, size, speed)
        total += tests * _seconds(Cell("test", group, 1.0, 0), orders, size, speed)
    return total


def _scout(group: Group, design: Design, orders: Orders, pool: Pool, home: Path) -> tuple[Sizes, float]:
    """Prepare a group's data as its first cell will, and time a micro-step there; sizes and FLOP per second."""
    planned = orders.plan(Cell("sweep", group, design.rates(group.recipe)[0], design.sweep.seeds[0]))
    folder = home / f"scout-{group.model}-{group.task}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(planned.params, encoding="utf-8")
    order = planned.order(folder)
    answer = pool.run({**order, "stages": [stage for stage in order["stages"] if stage["shared"]]})
    raise_if_failed(planned.cell.name, answer)
    size, params = sizes(folder), check_params(orders.of_group(group))
    assert size is not None, "fetched just now"
    timing = next(measure(folder, knot_of(params, "1").link, reference_ranks("1", params, size), [params.machine]))
    shutil.rmtree(folder, ignore_errors=True)
    return size, speed_of(params, size, timing)


def _seconds(cell: Cell, orders: Orders, size: Sizes, speed: float) -> float:
    """A cell by the arithmetic of its stages."""
    params: Params = check_params(orders.of_group(cell.group))
    costs = (
        cost(name, key or None, params, size)
        for name, _, key in (stage.name.partition("@") for stage in orders.plan(cell).stages if not stage.shared)
    )
    return FIXED + sum(found.flops or 0.0 for found in costs if found) / speed
