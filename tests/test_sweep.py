"""Which cells a study needs next: learning rates chosen on validation, grids that grow, seeds that stay apart."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_core.errors import UserError
from cola_core.study.design import Cell, Design
from cola_core.study.results import Result
from cola_core.study.sweep import choose, counted, current, curves, wanted
from tests.studies import design, result

GRID = [1e-4, 1e-3, 1e-2]


def run(made: Design, loss: dict[float, float] | None = None, best: float = 1e-3) -> list[Result]:
    """Do what is wanted until nothing is; the loss is a parabola around `best` unless told."""
    found: list[Result] = []
    while cells := list(wanted(made, found)):
        for cell in cells:
            value = (loss or {}).get(cell.learning_rate, 1 + math.log10(cell.learning_rate / best) ** 2)
            found.append(result(cell, 0.8, loss=value))
        assert len(found) < 500, "it has no end"
    return found


@given(st.floats(-6.5, 0.5))
@settings(max_examples=30)
def test_a_grid_grows_until_the_best_stands_inside_or_it_may_not(exponent: float) -> None:
    made, best = design(), 10**exponent
    found = run(made, best=best)
    for group, curve in curves(made, found).items():
        chosen = choose(made.sweep, made.rates(group.recipe), curve)
        assert curve[chosen.rate] == min(curve.values())
        inside = min(curve) < chosen.rate < max(curve)
        assert inside != chosen.edge
        assert inside or len(curve) == len(GRID) + made.sweep.extend
        assert len(curve) <= len(GRID) + made.sweep.extend
        steps = [b / a for a, b in zip(sorted(curve), sorted(curve)[1:], strict=False)]
        assert steps == pytest.approx([10.0] * len(steps), rel=1e-2), "it goes on by its own factor"


def test_test_cells_come_after_the_sweep_with_fresh_seeds_at_the_chosen_rate_alone() -> None:
    made = design()
    first = list(wanted(made, []))
    assert {cell.phase for cell in first} == {"sweep"}
    assert {cell.seed for cell in first} == {100}
    found = run(made, best=1e-3)
    tests = [r.cell for r in found if r.cell.phase == "test"]
    assert {cell.learning_rate for cell in tests} == {1e-3}
    assert len(tests) == len(list(made.groups())) * 5
    assert len({*tests}) == len(tests)


def test_groups_that_have_swept_go_on_while_others_still_sweep_and_seeds_come_one_by_one() -> None:
    made = design()
    group = next(made.groups())
    found = [result(Cell("sweep", group, rate, 100), 0, loss=abs(rate - 1e-3)) for rate in GRID]
    cells = list(wanted(made, found))
    tests = [cell for cell in cells if cell.phase == "test"]
    assert {cell.group for cell in tests} == {group}
    assert [cell.seed for cell in tests] == [0, 1, 2, 3, 4]
    assert cells.index(tests[0]) == len(cells) - len(tests), "sweeps first"
    whole = [cell for cell in run(made) if cell.cell.phase == "test"]
    assert [r.cell.seed for r in whole] == sorted(r.cell.seed for r in whole), (
        "a study that is stopped has whole blocks"
    )


def test_a_rate_counts_once_all_seeds_of_the_sweep_have_tried_it_and_their_mean_decides() -> None:
    made = design(sweep={"learning_rates": GRID, "seeds": [100, 101], "extend": 0})
    group = next(made.groups())
    losses = {1e-4: (1.0, 1.0), 1e-3: (0.1, 2.9), 1e-2: (0.9, 0.9)}
    found = [
        result(Cell("sweep", group, rate, seed), 0, loss=loss)
        for rate, pair in losses.items()
        for seed, loss in zip((100, 101), pair, strict=True)
    ]
    assert curves(made, found[:-1])[group].keys() == {1e-4, 1e-3}
    assert choose(made.sweep, GRID, curves(made, found)[group]).rate == 1e-2


def test_a_rate_at_which_training_failed_is_the_worst_and_the_grid_goes_on_below() -> None:
    made = design()
    found = run(made, loss={1e-3: math.inf, 1e-2: math.inf}, best=1e-5)
    for group, curve in curves(made, found).items():
        assert choose(made.sweep, made.rates(group.recipe), curve).rate == pytest.approx(1e-5)


def test_a_result_that_failed_counts_as_infinite() -> None:
    made = design()
    cell = Cell("sweep", next(made.groups()), 1e-3, 100)
    assert math.isinf(replace(result(cell, 0), content={"failed": "diverged"}).validation_loss)


def test_another_seed_or_recipe_asks_for_its_own_cells_alone() -> None:
    made = design()
    found = run(made)
    more = list(wanted(design(seeds=[0, 1, 2, 3, 4, 7]), found))
    assert {(cell.phase, cell.seed) for cell in more} == {("test", 7)}
    recipes = {**made.model_dump()["recipes"], "new": {"set": []}}
    assert {cell.group.recipe for cell in wanted(design(recipes=recipes), found)} == {"new"}


def test_what_was_scored_is_not_scored_again_where_the_same_rate_is_chosen_by_more_seeds_or_rates() -> None:
    made = design()
    found = run(made, best=1e-3)
    for sweep in ({"learning_rates": GRID, "seeds": [100, 101]}, {"learning_rates": [1e-5, *GRID], "seeds": [100]}):
        wider = design(sweep=sweep)
        known = current(wider, found)
        assert {cell.phase for cell in wanted(wider, known)} == {"sweep"}
        for cell in list(wanted(wider, known)):
            known.append(result(cell, 0.8, loss=1 + math.log10(cell.learning_rate / 1e-3) ** 2))
        assert not list(wanted(wider, known))
        assert counted(wider, known) == known


def test_optuna_proposes_the_same_rates_again_and_ends() -> None:
    pytest.importorskip("optuna")
    made = design(sweep={"learning_rates": [1e-5, 1e-1], "seeds": [100], "by": "optuna", "trials": 6})
    found = run(made, best=1e-3)
    for group, curve in curves(made, found).items():
        assert len(curve) == 6
        assert all(1e-5 <= rate <= 1e-1 for rate in curve)
        assert curve[choose(made.sweep, made.rates(group.recipe), curve).rate] == min(curve.values())
    assert not list(wanted(made, found))


def test_without_optuna_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    made = design(sweep={"learning_rates": [1e-5, 1e-1], "seeds": [100], "by": "optuna"})
    with pytest.raises(UserError, match="pip install optuna"):
        list(wanted(made, []))


def test_a_recipe_may_run_on_some_tasks_alone() -> None:
    recipes = {**design().model_dump()["recipes"], "part": {"set": [], "tasks": ["two"]}}
    made = design(recipes=recipes)
    assert {group.task for group in made.groups() if group.recipe == "part"} == {"two"}
    with pytest.raises(UserError, match=r"recipes\.part\.tasks: 'tow'; did you mean 'two'"):
        design(recipes={**recipes, "part": {"set": [], "tasks": ["tow"]}})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seeds": [100]}, "seeds: 100 is a seed of the sweep; test scores need fresh ones"),
        ({"tests": {"baseline": "lorra"}}, "tests.baseline: 'lorra'; did you mean 'lora'"),
        ({"budgett": 1}, "budgett: unknown key; did you mean 'budget'"),
        ({"tasks": {"one": {"set": [], "headline": False}}}, "tasks: none counts in the mean"),
    ],
)
def test_mistakes_of_a_study_are_one_line(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        design(**changes)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_results_of_other_seeds_rates_or_recipes_do_not_count() -> None:
    made = design()
    found = run(made, best=1e-3)
    group = next(made.groups())
    strange = [
        result(Cell("test", group, 1e-2, 0), 0.1),  # at a rate that is not the chosen one any more
        result(Cell("test", group, 1e-3, 77), 0.1),
        result(Cell("sweep", group, 1e-3, 77), 0.0, loss=0.0),
        result(Cell("test", replace(group, recipe="gone"), 1e-3, 0), 0.1),
    ]
    assert counted(made, [*strange, *found]) == found
