"""A chain in one process: what a knot costs, and a chain of three links beside one LoRA at equal steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.pairs import Pairs, alternate, timed
from benchmarks.results import Row, compared
from benchmarks.setting import Ours, Setting
from cola_core.adapters import add_pair, attach, detach
from cola_core.models import adaptable
from cola_core.probe import probe

__all__ = ["chain_rows"]

LINKS, RANK = 3, 8


class Chain(Ours):
    """A chain whose links follow one another in memory, as a notebook would write it with this library."""

    def tie(self, where: Setting) -> None:
        """Merge the link, put fresh adapters on the residual, and begin with a new optimizer."""
        learned = detach(self.objective.model)
        for name, pair in learned.items():
            add_pair(self.objective.model.get_submodule(name), pair)
        self.layers = attach(self.objective.model, where.pairs(self.objective, where.params.targets, RANK))
        self.start(where, self.training.course.config, self.layers)

    def profile(self, where: Setting) -> None:
        """The recipe's probe of the merged model, between two links."""
        detach(self.objective.model)
        probe(self.objective, list(where.probe), adaptable(self.objective.model), {}, where.profile(), (0, 1))
        self.layers = attach(self.objective.model, where.pairs(self.objective, where.params.targets, RANK))
        self.start(where, self.training.course.config, self.layers)


def chain_rows(where: Setting, pairs: int) -> Iterator[Row]:
    """The knot in steps, and both totals at links of the default length, from the measured parts.

    Steps of the chain and of the single LoRA are timed in turn, knots and probes between them; two runs of all their
    steps would take the suite's whole time and say the same.
    """
    config = where.link(steps=pairs + 2)
    chain, single = (Chain(where, config, where.pairs(o, where.params.targets, RANK), o) for o in _models(where))
    first = chain.rows[0]
    steps, knots = Pairs(), list[float]()
    probed = timed(lambda: chain.profile(where))
    for link in range(LINKS):
        before = chain.loss(first)
        found = alternate(chain.step, single.step, pairs // LINKS, warm_up=int(link == 0))
        steps.ours, steps.peer = steps.ours + found.ours, steps.peer + found.peer
        assert chain.loss(first) < before, "the link learned nothing"
        knots.append(timed(lambda: chain.tie(where)))
    single.check([])
    step, knot = statistics.median(steps.peer), statistics.median(knots)
    total = LINKS * int(where.params.link["steps"])
    what = "knot in one process (merge, new adapters, new optimizer) / one training step"
    yield compared("knot", what, Pairs(knots, [step] * LINKS), 2.0)
    yield compared("chain-step", "a step of the chain beside a step of the single LoRA", steps, None)
    note = f"{total} steps, {LINKS} links of the default length: step {step:.2f} s, knot {knot:.2f} s"
    extra = (LINKS - 1) * knot
    yield _total("chain-3", "chain of 3 beside one LoRA, equal steps, without probes", steps, total, extra, 1.02, note)
    extra, note = extra + LINKS * probed, f"{note}, probe of {len(where.probe)} rows {probed:.1f} s"
    yield _total("chain-3-probes", "the same with a probe before every link", steps, total, extra, 1.10, note)


def _total(name: str, what: str, steps: Pairs, total: int, extra: float, goal: float, note: str) -> Row:
    """Both totals from the single LoRA's steps (the chain's are the same work: `chain-step`) and what a chain adds."""
    found = Pairs([total * step + extra for step in steps.peer], [total * step for step in steps.peer])
    return compared(name, what, found, goal, note=note)


def _models(where: Setting) -> Iterator:  # type: ignore[type-arg]
    yield from (where.objective(), where.objective())
