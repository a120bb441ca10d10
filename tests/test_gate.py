"""The gate's decisions: against references, under null challengers, and what a champion must not lose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from cola_core.config.report import PromoteConfig
from cola_core.evaluation.gate import Decision, Scored, judge
from cola_core.evaluation.metrics import calibration_error

QUICK = PromoteConfig(resamples=2000, guard_resamples=200)
ONCE = PromoteConfig(uses=1, resamples=2000, guard_resamples=200)
LEAN = PromoteConfig(resamples=1000, guard_resamples=100, loss=1.0, calibration_error=1.0, f1=1.0)
ROWS = 400


def scored(correct: NDArray[np.bool_], loss: float = 0.5, sure: float = 0.8) -> Scored:
    """Answers of two labels, half of the rows each."""
    gold = ["a" if i % 2 else "b" for i in range(len(correct))]
    said = [g if right else {"a": "b", "b": "a"}[g] for g, right in zip(gold, correct, strict=True)]
    return Scored(gold, said, [loss] * len(correct), [sure] * len(correct))


def hits(count: int, rows: int = ROWS) -> NDArray[np.bool_]:
    return np.arange(rows) < count


def test_a_clear_gain_is_promoted_and_a_clear_loss_is_not() -> None:
    champion, base = scored(hits(300)), scored(hits(200))
    better = judge(scored(hits(340)), champion, base, QUICK, 0)
    assert better.verdict == "promote"
    assert better.gains["champion"]["difference"] == pytest.approx(0.1)
    worse = judge(scored(hits(260)), champion, base, QUICK, 0)
    assert worse.verdict == "reject"
    assert "less accurate than the champion: -10.00 points" in worse.reason


def test_the_base_has_to_be_beaten_too() -> None:
    decision = judge(scored(hits(340)), scored(hits(300)), scored(hits(339)), QUICK, 0)
    assert decision.verdict == "abstain"
    assert "than the base" in decision.reason
    first = judge(scored(hits(340)), None, scored(hits(300)), QUICK, 0)
    assert (first.verdict, set(first.gains), first.guards) == ("promote", {"base"}, {})


def test_few_differing_rows_do_not_suffice_though_the_bootstraps_interval_excludes_zero() -> None:
    """Eight rows won and none lost: hardly a resample misses all eight, but chance gives it one time in 256."""
    decision = judge(
        scored(hits(208)), scored(hits(200)), scored(hits(100)), ONCE.model_copy(update={"level": 0.003}), 0
    )
    assert decision.gains["champion"]["low"] > 0
    assert decision.gains["champion"]["p"] == pytest.approx(0.5**8)
    assert decision.verdict == "abstain"


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_the_sign_test_is_mcnemars_exact_one(wins: int, losses: int, seed: int) -> None:
    challenger, champion = np.zeros(ROWS, dtype=bool), np.zeros(ROWS, dtype=bool)
    challenger[:wins], champion[100 : 100 + losses] = True, True
    found = judge(scored(challenger), scored(champion), scored(hits(0)), QUICK, seed).gains["champion"]
    expected = 1.0 if wins + losses == 0 else float(stats.binom.sf(wins - 1, wins + losses, 0.5))
    assert found["p"] == pytest.approx(expected)
    assert found["difference"] == pytest.approx((wins - losses) / ROWS)
    assert found["low"] <= found["difference"] <= found["high"]


@pytest.mark.parametrize(
    ("change", "guard"),
    [({"loss": 0.9}, "loss"), ({"sure": 0.2}, "calibration error")],
)
def test_a_gain_that_costs_something_else_is_refused_unless_it_is_allowed(change: dict[str, float], guard: str) -> None:
    champion, base, challenger = scored(hits(300)), scored(hits(200)), scored(hits(340), **change)
    decision = judge(challenger, champion, base, QUICK, 0)
    assert decision.verdict == "reject"
    assert f"its {guard} is worse" in decision.reason
    free = QUICK.model_copy(update={"loss": 1.0, "calibration_error": 1.0})
    assert judge(challenger, champion, base, free, 0).verdict == "promote"


def test_a_label_that_is_given_up_is_told_by_its_f1() -> None:
    gold = ["rare"] * 20 + ["common"] * 380
    champion = Scored(gold, ["rare"] * 20 + ["common"] * 250 + ["rare"] * 130, [0.5] * 400, [0.7] * 400)
    challenger = Scored(gold, ["common"] * 400, [0.5] * 400, [0.95] * 400)
    decision = judge(challenger, champion, scored(hits(0)), QUICK, 0)
    assert decision.verdict == "reject"
    assert "F1 of rare is worse by 0.2353" in decision.reason  # 2 * 20 / (20 + 150)


def test_guards_are_the_metrics_of_the_evaluation() -> None:
    rng = np.random.default_rng(0)
    one, two = (
        Scored(s.gold, s.predicted, list(rng.random(ROWS)), list(rng.uniform(0.5, 1, ROWS)))
        for s in (scored(hits(340)), scored(hits(300)))
    )
    found = judge(one, two, scored(hits(100)), QUICK.model_copy(update={"guard_resamples": 10_000}), 0).guards
    errors = [calibration_error(list(s.correct > 0), s.confidence) for s in (one, two)]
    assert found["calibration error"]["worse"] == pytest.approx(errors[0] - errors[1])
    lost = np.asarray(one.loss) - np.asarray(two.loss)
    assert found["loss"]["worse"] == pytest.approx(lost.mean())
    quantile = stats.norm.ppf(0.05 / len(found))  # all guards together err one night in twenty
    assert found["loss"]["low"] == pytest.approx(lost.mean() + quantile * lost.std() / ROWS**0.5, abs=0.002)


def test_an_abstention_says_how_many_more_rows_would_tell_and_with_so_many_they_do() -> None:
    place = np.arange(500)
    challenger, champion = place < 380, (place < 345) | (place >= 485)  # 7 % won, 3 % lost
    level = ONCE.model_copy(update={"level": 0.001, "resamples": 1000, "guard_resamples": 100})
    decision = judge(scored(challenger), scored(champion), scored(hits(100, 500)), level, 0)
    assert decision.verdict == "abstain"
    assert decision.more is not None
    assert f"{decision.more:,} more test rows" in decision.reason
    shown = 0
    for trial in range(40):
        rows = 500 + decision.more
        drawn = np.random.default_rng(trial).choice(500, rows)
        again = judge(scored(challenger[drawn]), scored(champion[drawn]), scored(hits(0, rows)), level, trial)
        shown += again.verdict == "promote"
    assert 0.55 < shown / 40 < 0.95, "a power of 0.8, give or take what 40 trials can tell"


def test_one_that_is_not_ahead_is_told_so() -> None:
    decision = judge(scored(hits(300)), scored(hits(300)), scored(hits(100)), QUICK, 0)
    assert decision.verdict == "abstain"
    assert decision.more is None
    assert "it is not ahead" in decision.reason


def nights(seed: int, config: PromoteConfig, count: int = 40) -> bool:
    """Whether any of `count` challengers, none better than the champion, is promoted."""
    rng = np.random.default_rng(seed)
    skill = rng.random(200)  # rows differ in difficulty; every model answers each with the same probability
    champion, base = scored(rng.random(200) < skill), scored(hits(0, 200))
    return any(
        judge(scored(rng.random(200) < skill), champion, base, config, night).verdict == "promote"
        for night in range(count)
    )


def test_forty_nights_of_null_challengers_promote_no_more_often_than_is_stated() -> None:
    """By the union bound, whatever the nights have in common: here the champion's own luck on these rows."""
    false = sum(nights(seed, LEAN) for seed in range(24))
    assert false / 24 <= LEAN.level


def test_without_spending_the_level_over_the_nights_they_would() -> None:
    careless = sum(nights(seed, LEAN.model_copy(update={"uses": 1})) for seed in range(12))
    assert careless >= 5, "forty looks at 5 % each"


def test_decisions_are_plain_data_that_come_back() -> None:
    decision = judge(scored(hits(340)), scored(hits(300)), scored(hits(200)), QUICK, 0)
    assert Decision(**decision.to_json()) == decision
