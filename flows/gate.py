"""`cola promote` and `cola rollback`: the gate in its store, told in lines."""

from __future__ import annotations

from collections.abc import Iterator

from cola_core.config.params import Params
from flows.child import quiet
from tasks.gate import Judgement

__all__ = ["judge_challenger", "lines", "return_champion"]


def judge_challenger(params: Params, name: str, version: str | None = None) -> Judgement:
    """Judge the challenger of `name`, or a version, by the section `promote` of `params`.

    Raises:
        UserError: there is nothing to judge, or it must not be.
        RetryError: MLflow is out of reach.
    """
    quiet()
    from tasks.gate import promote
    from tasks.store import locked, open_store

    with locked("gate"), open_store() as store:
        return promote(store, name, params.promote, version)


def return_champion(name: str, reason: str) -> str:
    """Make the champion before this one champion again; returns the line that tells it.

    Raises:
        UserError: there is none.
        RetryError: MLflow is out of reach.
    """
    quiet()
    from tasks.gate import rollback
    from tasks.store import locked, open_store

    with locked("gate"), open_store() as store:
        now, before = rollback(store, name, reason)
    return f"{name}: version {now} is champion again, in place of {before}: {reason}"


def lines(judged: Judgement) -> Iterator[str]:
    """What a judgement says, for a terminal or a flow's log."""
    decision = judged.decision
    yield f"{judged.name} version {judged.version}: {decision.verdict}: {decision.reason}"
    for rival, gain in decision.gains.items():
        yield (
            f"  accuracy against the {rival}: {100 * gain['difference']:+.2f} points "
            f"[{100 * gain['low']:.2f}, {100 * gain['high']:.2f}], sign test p {gain['p']:.2g}"
        )
    for what, guard in decision.guards.items():
        yield f"  {what}: worse by {guard['worse']:+.4f}, at least {guard['low']:+.4f}; allowed {guard['allowed']:g}"
    yield f"  use {judged.use} of this test set; each end of an interval errs with probability {decision.level:.2g}"
