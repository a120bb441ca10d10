"""A chain in one process: what a knot costs, and a chain of three links beside one LoRA at equal steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.pairs import Pairs, alternate, timed
from benchmarks.results import Row, alone, compared
from benchmarks.setting import Ours, Setting
from cola_core.adapters import Pair, add_pair, attach, detach
from cola_core.models import adaptable
from cola_core.probe import probe

__all__ = ["chain_rows"]

LINKS, RANK = 3, 8


class Chain(Ours):
    """A chain whose links follow one another in memory, as a notebook would write it with this library.

    Its links read on where the last one stopped, so that every step has the rows of the single LoRA's step.
    """

    merged: dict[str, list[Pair]]

    def tie(self, where: Setting) -> None:
        """Merge the link, put fresh adapters on the residual, and begin with a new optimizer."""
        taken = len(self.losses)
        for name, pair in detach(self.objective.model).items():
            add_pair(self.objective.model.get_submodule(name), pair)
            self.merged.setdefault(name, []).append(pair)
        self._fresh(where, taken)

    def profile(self, where: Setting) -> None:
        """The recipe's probe of the merged model, before a link."""
        detach(self.objective.model)
        modules = adaptable(self.objective.model)
        probe(self.objective, list(where.probe), modules, self.merged, where.profile(), (0, 1))
        self._fresh(where, 0)

    def _fresh(self, where: Setting, taken: int) -> None:
        plan = self.training.plan[taken:]
        self.layers = attach(self.objective.model, where.pairs(self.objective, where.params.targets, RANK))
        self.start(where, self.training.course.config, self.layers)
        self.training.plan = plan


def chain_rows(where: Setting, pairs: int) -> Iterator[Row]:
    """The knot in steps, and what knots and probes add to a chain whose links have the default length.

    Steps of the chain and of the single LoRA are timed in turn, knots and probes between them. The totals are computed
    from these parts: two runs of all their steps would take the suite's whole time.
    """
    config = where.link(steps=pairs + 2)
    chain, single = (Chain(where, config, where.pairs(o, where.params.targets, RANK), o) for o in _models(where))
    steps, knots, probes, chain.merged = Pairs(), Pairs(), list[float](), {}
    for link in range(LINKS):
        probes.append(timed(lambda: chain.profile(where)))
        rows = chain.rows[0]
        before = chain.loss(rows)
        found = alternate(chain.step, single.step, pairs // LINKS, warm_up=int(link == 0))
        steps.ours, steps.peer = steps.ours + found.ours, steps.peer + found.peer
        assert chain.loss(rows) < before, "the link learned nothing"
        if link == 0:
            chain.check(single.losses)
        knots.add(timed(lambda: chain.tie(where)), found.peer[-1])
    what = "knot in one process (merge, new adapters, new optimizer) / one training step"
    yield compared("knot", what, knots, 2.0)
    yield compared("chain-step", "a step of the chain beside a step of the single LoRA, same rows", steps, None)
    yield from _totals(where, statistics.median(steps.peer), statistics.median(knots.ours), sum(probes))


def _totals(where: Setting, step: float, knot: float, probes: float) -> Iterator[Row]:
    """1 + what a chain adds / the single LoRA's steps."""
    total = LINKS * int(where.params.link["steps"])
    note = f"computed: {total} steps of {step:.2f} s, {LINKS - 1} knots of {knot:.2f} s"
    extra = (LINKS - 1) * knot
    what = "chain of 3 / one LoRA at equal steps, total time without probes"
    yield alone("chain-3", what, [1 + extra / (total * step)], 1.02, unit="", note=note)
    note += f", {LINKS} probes of {len(where.probe)} rows, together {probes:.1f} s"
    what = "the same with a probe before every link"
    yield alone("chain-3-probes", what, [1 + (extra + probes) / (total * step)], 1.10, unit="", note=note)


def _models(where: Setting) -> Iterator:  # type: ignore[type-arg]
    yield from (where.objective(), where.objective())
