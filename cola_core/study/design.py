"""A study's file: recipes x tasks x models x learning rates x seeds, and what is to be told from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product, starmap
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cola_core.config.base import Strict, parse
from cola_core.config.reading import read_yaml
from cola_core.errors import suggest

__all__ = ["PROBE_ROW", "Cell", "Design", "Group", "Panel", "read_design"]

PROBE_ROW = 1.5  # training rows that a probe's row costs: a backward pass with weight gradients beside one without
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
Overrides = list[str]
Panel = tuple[str, str]  # model, task


@dataclass(frozen=True, order=True)
class Group:
    """What one learning rate is chosen for."""

    model: str
    task: str
    recipe: str

    @property
    def panel(self) -> Panel:
        """Where its recipe stands beside others."""
        return self.model, self.task


@dataclass(frozen=True, order=True)
class Cell:
    """One training run; phase: sweep = a learning rate is tried, test = its chain is scored on the test rows."""

    phase: Literal["sweep", "test"]
    group: Group
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """What it is called in lists and as a file."""
        group = self.group
        return f"{self.phase}-{group.model}-{group.task}-{group.recipe}-lr{self.learning_rate!r}-seed{self.seed}"


def _rising(rates: list[float]) -> list[float]:
    if sorted(set(rates)) != rates:
        raise ValueError("in rising order, each once")
    return rates


Rates = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1), AfterValidator(_rising)]


class Arm(Strict):
    """One model; set: Hydra overrides, as after `dvc exp run -S`; note: what the report says of it."""

    set: Overrides
    note: str = ""


class TaskArm(Arm):
    """One task; headline: whether it counts in the mean over tasks."""

    headline: bool = True


class RecipeArm(Arm):
    """One recipe.

    control: whether it stands beside the comparison instead of in it; learning_rates: where the study's own are out of
    its range; tasks: where it runs, null = on all.
    """

    control: bool = False
    learning_rates: Rates | None = None
    tasks: list[str] | None = None


class Sweep(Strict):
    """How every recipe's learning rate is chosen on each task and model: the lowest validation loss, mean over seeds.

    learning_rates: in rising order; while the best stands at an end, the grid goes on there by its own last factor, at
    most `extend` times in all; default: the rate that stands for "not tuned" in the report.
    by: grid; optuna = `trials` rates by Optuna's TPE between the two ends of the grid.
    """

    learning_rates: Rates
    seeds: list[int] = Field(min_length=1)
    extend: int = Field(default=4, ge=0)
    default: float | None = None
    by: Literal["grid", "optuna"] = "grid"
    trials: int = Field(default=8, ge=2)


class Budget(Strict):
    """What every row of a table has spent alike.

    steps: optimizer steps of one whole chain; charge: whether a probe's passes are paid for with steps, at one and a
    half training rows for each of its rows (a backward pass that has weight gradients beside one that has none).
    """

    steps: int = Field(ge=1)
    charge: bool = True


class Tests(Strict):
    """What is asked of the numbers, fixed before there are any.

    baseline: the recipe that every other is compared with; level: of the whole family of tests; power: with which the
    smallest detectable difference is told; margin: a difference in accuracy that would not matter.
    """

    baseline: str
    level: float = Field(default=0.05, gt=0, lt=1)
    power: float = Field(default=0.8, gt=0, lt=1)
    margin: float = Field(default=0.01, gt=0, lt=1)


class Design(Strict):
    """The whole file.

    out: folder of records and report, relative to the checkout; set: overrides of every cell; seeds: fresh ones, scored
    on the test rows, none = a look at validation data alone; expected: what is, what would refute it, written before
    the first cell; families: name -> {count: recipe}, drawn along that count, which `across` names.
    """

    name: Name
    title: str
    question: str
    expected: str
    out: str
    set: Overrides
    models: dict[Name, Arm] = Field(min_length=1)
    tasks: dict[Name, TaskArm] = Field(min_length=1)
    recipes: dict[Name, RecipeArm] = Field(min_length=1)
    sweep: Sweep
    seeds: list[int]
    budget: Budget
    tests: Tests
    families: dict[str, dict[int, str]] = Field(default={})
    across: str = "links"

    @model_validator(mode="after")
    def _fits(self) -> Design:
        if both := sorted({*self.seeds} & {*self.sweep.seeds}):
            raise ValueError(f"seeds: {both[0]} is a seed of the sweep; test scores need fresh ones")
        for name, arm in self.recipes.items():
            for task in arm.tasks or ():
                if task not in self.tasks:
                    raise ValueError(f"recipes.{name}.tasks: {task!r}{suggest(task, self.tasks)}")
        for family in self.families.values():
            for recipe in family.values():
                if recipe not in self.recipes:
                    raise ValueError(f"families: {recipe!r}{suggest(recipe, self.recipes)}")
        if not any(task.headline for task in self.tasks.values()):
            raise ValueError("tasks: none counts in the mean; let one have headline: true")
        if self.tests.baseline not in self.recipes:
            raise ValueError(f"tests.baseline: {self.tests.baseline!r}{suggest(self.tests.baseline, self.recipes)}")
        return self

    def groups(self) -> Iterator[Group]:
        """Every combination that has a learning rate of its own."""
        for group in starmap(Group, product(self.models, self.tasks, self.recipes)):
            if group.task in (self.recipes[group.recipe].tasks or self.tasks):
                yield group

    def rates(self, recipe: str) -> list[float]:
        """The sweep's first learning rates of a recipe."""
        return self.recipes[recipe].learning_rates or self.sweep.learning_rates

    def overrides(self, group: Group) -> Overrides:
        """What composes the parameters of a group's cells, learning rate and seed apart."""
        arms = self.models[group.model], self.tasks[group.task], self.recipes[group.recipe]
        return [*self.set, *(override for arm in arms for override in arm.set)]


def read_design(path: Path) -> Design:
    """Read a study's file.

    Raises:
        UserError: it is missing, or the first thing wrong in it, with its dotted key.
    """
    return parse(Design, read_yaml(path), "", file=str(path))
