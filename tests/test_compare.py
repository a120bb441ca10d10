"""What a study's numbers are said to show: against scipy and statsmodels, and against effects that were put in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from cola_core.study.compare import Comparison, Estimate, compare, detectable, estimate, over_rows, scores
from cola_core.study.design import Cell, Group
from cola_core.study.results import Result
from cola_core.study.sweep import curves
from cola_core.study.traits import agreement, spending, usable
from tests.studies import design, result, results

TWO = {"one": {"set": []}, "two": {"set": []}}


def test_the_primary_test_is_scipys_paired_t_over_blocks_with_holms_correction() -> None:
    made = design(tasks=TWO)
    found = results(made, {"gora": 0.006})
    by = scores(made, found, "accuracy")
    base = by["lora"]
    told = compare(made.tests, by, ["gora", "wide"])
    p = []
    for each in told:
        mine = by[each.recipe]
        reference = stats.ttest_rel([mine[b] for b in sorted(base)], [base[b] for b in sorted(base)])
        interval = reference.confidence_interval(0.95)
        assert each.p == pytest.approx(reference.pvalue)
        assert (each.difference.low, each.difference.high) == pytest.approx((interval.low, interval.high))
        assert each.difference.n == 10
        p.append(reference.pvalue)
    assert [each.holm for each in told] == pytest.approx(list(multipletests(p, method="holm")[1]))


def test_an_effect_that_was_put_in_is_found_and_none_is_not() -> None:
    made = design(tasks=TWO)
    better, same = compare(made.tests, scores(made, results(made, {"gora": 0.02}), "accuracy"), ["gora", "wide"])
    assert better.verdict(made.tests) == "better"
    assert same.verdict(made.tests) == "no difference beyond 1 point"
    worse, _ = compare(made.tests, scores(made, results(made, {"gora": -0.02}), "accuracy"), ["gora", "wide"])
    assert worse.verdict(made.tests) == "worse"
    loud, _ = compare(made.tests, scores(made, results(made, {}, noise=0.05), "accuracy"), ["gora", "wide"])
    assert loud.verdict(made.tests) == "cannot tell"


def test_of_a_loss_less_is_better_and_no_absence_is_told() -> None:
    made = design(tasks=TWO)
    (gora,) = compare(made.tests, scores(made, results(made, {"gora": 0.02}), "accuracy"), ["gora"])
    assert gora.verdict(made.tests, rising=False) == "worse"
    (same,) = compare(made.tests, scores(made, results(made, {}), "accuracy"), ["gora"])
    assert same.verdict(made.tests, rising=False) == "cannot tell"


def test_tasks_outside_the_headline_do_not_count_nor_do_cells_of_the_sweep() -> None:
    made = design()
    by = scores(made, results(made, {}), "accuracy")
    assert {task for _, task, _ in by["lora"]} == {"one"}
    assert {task for _, task, _ in scores(made, results(made, {}), "accuracy", headline=False)["lora"]} == {
        "one",
        "two",
    }
    assert len(by["lora"]) == 5


def test_blocks_that_one_recipe_lacks_are_left_out_of_the_pair() -> None:
    made = design()
    found = [r for r in results(made, {}) if not (r.cell.group.recipe == "gora" and r.cell.seed == 4)]
    (gora,) = compare(made.tests, scores(made, found, "accuracy"), ["gora"])
    assert gora.difference.n == 4


@given(st.integers(5, 40), st.integers(1, 10))
def test_the_detectable_difference_is_found_with_the_power_that_is_stated(blocks: int, compared: int) -> None:
    tests = design().tests
    size = detectable(blocks, compared, tests)
    level, freedom = tests.level / compared, blocks - 1
    edge, shift = stats.t.isf(level / 2, freedom), size * np.sqrt(blocks)
    power = stats.nct.sf(edge, freedom, shift) + stats.nct.cdf(-edge, freedom, shift)
    assert power == pytest.approx(tests.power, abs=0.02), "statsmodels stops its search early"


def test_a_cell_whose_training_failed_counts_as_the_base_model() -> None:
    made = design()
    found = results(made, {"gora": 0.05})
    lost = [r for r in found if r.cell.phase == "test" and r.cell.group.recipe == "gora" and r.cell.seed < 4]
    broken = [Result(r.cell, {"failed": "diverged"}) if r in lost else r for r in found]
    by = scores(made, broken, "accuracy")
    assert sorted(by["gora"].values())[:4] == [0.4] * 4, "what survives is not all there is"
    (gora,) = compare(made.tests, by, ["gora"])
    assert gora.difference.mean < 0


def test_blocks_that_all_differ_alike_tell_nothing_to_a_t_test() -> None:
    made = design(seeds=[0, 1])
    alike = {"lora": {("m", "t", 0): 0.5, ("m", "t", 1): 0.6}, "gora": {("m", "t", 0): 0.75, ("m", "t", 1): 0.85}}
    (gora,) = compare(made.tests, {name: dict(scores) for name, scores in alike.items()}, ["gora"])
    assert gora.verdict(made.tests) == "cannot tell"


def test_absence_is_told_of_all_recipes_at_once_or_not() -> None:
    made = design(tasks=TWO)
    found = scores(made, results(made, {}, noise=0.007), "accuracy")
    alone, (one, two) = compare(made.tests, found, ["gora"])[0], compare(made.tests, found, ["gora", "wide"])
    assert alone.wide == alone.difference == one.difference
    assert one.wide.low < one.difference.low and one.wide.high > one.difference.high
    assert two.wide.n == 10
    alike = Estimate(0.005, 0.005, 0.005, 2)
    assert Comparison("gora", alike, alike, 0.0, 1.0, 1.0).verdict(made.tests) == "cannot tell"
    inside, beyond = Estimate(0.0, -0.009, 0.009, 10), Estimate(0.0, -0.011, 0.011, 10)
    for wide, told in ((inside, "no difference beyond 1 point"), (beyond, "cannot tell")):
        assert Comparison("gora", inside, wide, 0.01, 0.5, 1.0).verdict(made.tests) == told


def test_model_against_model_is_scipys_paired_bootstrap_over_rows() -> None:
    rng = np.random.default_rng(1)
    cells = [Cell("test", Group("tiny", "one", recipe), 1e-3, 0) for recipe in ("lora", "gora")]
    right = rng.random(300) < 0.7
    bits = [right, right | (rng.random(300) < 0.2)]  # who knew a row still knows it
    old, new = (
        Result(cell, {"predictions": {"correct": "".join(str(int(b)) for b in right)}})
        for cell, right in zip(cells, bits, strict=True)
    )
    told = over_rows([new], [old], 0.05)
    plain = bits[1].astype(float) - bits[0]
    assert told.mean == pytest.approx(plain.mean())
    spread = plain.std() / np.sqrt(300)
    assert (told.low, told.high) == pytest.approx(
        (plain.mean() - 1.96 * spread, plain.mean() + 1.96 * spread), abs=0.004
    )
    same = over_rows([new, new], [old, old], 0.05)
    assert same == told, "the same models twice are no more rows"


def test_one_value_has_no_interval_and_equal_ones_none_either() -> None:
    assert estimate([0.5], 0.05).low == 0.5
    assert estimate([0.5, 0.5], 0.05).high == 0.5


def test_what_is_not_spent_alike_is_marked() -> None:
    made = design()
    spent = spending(made, results(made, {}))
    assert spent["lora"].unequal == ()
    assert spent["wide"].unequal == ("2.00 x parameters",)
    assert spent["gora"].unequal == ("1.15 x tokens",), "its probe's tokens at one and a half"
    assert spent["lora"].cpu_seconds == 5.0, "what all recipes share is nobody's cost"


def test_a_part_of_a_cells_time_counts_for_nothing() -> None:
    made = design()
    cells = results(made, {})
    first = next(r for r in cells if r.cell.phase == "test" and r.cell.group.recipe == "lora")
    first.content["spent"]["link@1"] |= {"cpu": 1.0, "interrupted": 1.0}
    assert spending(made, cells)["lora"].cpu_seconds == 5.0


def test_usable_rates_are_those_near_the_best() -> None:
    made = design()
    group = next(made.groups())
    flat = [
        result(Cell("sweep", group, rate, 100), 0, loss=loss)
        for rate, loss in ((1e-4, 0.61), (1e-3, 0.60), (1e-2, 0.61), (1e-1, 0.9))
    ]
    told = usable(made, group, curves(made, flat)[group])
    assert told is not None
    assert (told.rate, told.decades, told.edge) == (1e-3, pytest.approx(2.0), False)
    assert told.default == pytest.approx(0.0)
    assert told.open, "1e-4 is usable, and nothing below it was tried"
    inside = usable(made, group, {1e-5: 0.9, **curves(made, flat)[group]})
    assert inside is not None and not inside.open
    assert usable(made, group, {1e-4: 0.5}) is None, "the sweep has not ended"


def test_allocations_that_agree_correlate_and_equal_ranks_tell_nothing() -> None:
    made = design()
    found = results(made, {})
    agreed = agreement(found, "gora")
    assert agreed["links"] == pytest.approx(1.0), "the same ranks in both links"
    assert -0.9 < agreed["seeds"] < 0.9
    assert agreement(found, "lora") == {}
    assert Group("tiny", "one", "gora") in {r.cell.group for r in found}
