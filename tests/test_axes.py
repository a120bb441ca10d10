"""Allocators, learning-rate schedules and updates against closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from cola_core.axes.allocators import ALLOCATORS, Allocation, Question, allocate
from cola_core.axes.bases import BASES, QUANTISERS
from cola_core.axes.initialisers import INITIALISERS
from cola_core.axes.parametrisations import PARAMETRISATIONS, SCALES
from cola_core.axes.schedules import SCHEDULES, learning_rate_factor
from cola_core.axes.updates import UPDATES, build_optimizer
from cola_core.config import recipe
from cola_core.config.recipe import AllocateConfig, LinkConfig, ScheduleConfig
from cola_core.errors import UserError
from cola_core.rows import OVERHEAD, group_by_length, order
from tests.lab import LINK

METHODS = Path(__file__).parent.parent / "conf/method"
UNIFORM = AllocateConfig(allocator="uniform", rank=8, r_min=4, r_max=32, features="sqrt")
GORA = AllocateConfig(**{**UNIFORM.model_dump(), "allocator": "gora"})
SHAPES = st.dictionaries(
    st.sampled_from("abcdefgh"), st.tuples(st.integers(40, 3000), st.integers(40, 3000)), min_size=1
)


def allocated(shapes: dict[str, tuple[int, int]], importance: dict[str, float], config: AllocateConfig) -> Allocation:
    found = {name: {"importance": value} for name, value in importance.items()}
    return allocate(Question(shapes, found, config, 0, 1))


def kinds(section: Any, field: str) -> set[str]:
    """The names that a tagged field may have."""
    annotation = section.model_fields[field].annotation
    values = get_args(annotation) or [annotation]
    return {kind for value in values for kind in get_args(value.model_fields["kind"].annotation)}


def test_every_axis_offers_exactly_the_values_that_the_configuration_names() -> None:
    assert set(ALLOCATORS) == kinds(AllocateConfig, "allocator")
    assert set(INITIALISERS) == kinds(LinkConfig, "initialiser")
    assert set(PARAMETRISATIONS) == kinds(LinkConfig, "parametrisation")
    assert set(UPDATES) == kinds(LinkConfig, "update")
    assert set(SCALES) == set(get_args(recipe.Scale))
    assert set(SCHEDULES) == set(get_args(recipe.Schedule))
    assert set(BASES) == set(get_args(recipe.BaseStore))
    assert {"none", *QUANTISERS} == set(get_args(recipe.Quantisation))


@given(SHAPES)
def test_equal_importance_gives_gora_ranks_in_proportion_to_the_papers_formula(
    shapes: dict[str, tuple[int, int]],
) -> None:
    result = allocated(shapes, dict.fromkeys(shapes, 0.5), GORA)
    budget = sum(8 * math.sqrt(a + b) for a, b in shapes.values())
    for name, (a, b) in shapes.items():
        wanted = round(budget / len(shapes) / math.sqrt(a + b))
        assert result.ranks[name] == min(max(wanted, 4), 32)
        assert (name in result.clamped) == (result.ranks[name] != wanted)
    assert result.spent == sum(result.ranks[n] * sum(s) for n, s in shapes.items())
    assert result.budget == sum(8 * sum(s) for s in shapes.values())
    assert sum(result.advantage.values()) == pytest.approx(1)


@given(SHAPES, st.integers(0, 10**6))
def test_gora_spends_no_more_than_asked_where_nothing_is_clamped(shapes: dict[str, tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    importance = {name: float(torch.rand(1, generator=generator)) for name in shapes}
    free = GORA.model_copy(update={"r_min": 1, "r_max": 10**6})
    result = allocated(shapes, importance, free)
    budget = sum(8 * math.sqrt(sum(s)) for s in shapes.values())
    spent = sum(r * math.sqrt(sum(shapes[n])) for n, r in result.ranks.items() if n not in result.clamped)
    assert spent <= budget + sum(0.5 * math.sqrt(sum(s)) for s in shapes.values())


def test_linear_features_are_the_released_codes_floor() -> None:
    shapes = {"a": (100, 100), "b": (300, 100)}
    result = allocated(shapes, {"a": 0.7, "b": 0.3}, GORA.model_copy(update={"features": "linear"}))
    assert result.ranks == {"a": round(4800 * 0.7) // 200, "b": 4}
    assert result.clamped == {"b": "r_min"}


@given(SHAPES)
def test_uniform_ranks_stay_within_the_matrix(shapes: dict[str, tuple[int, int]]) -> None:
    small = {**shapes, "thin": (3, 500)}
    result = allocated(small, {}, UNIFORM)
    assert result.ranks == {**dict.fromkeys(shapes, 8), "thin": 3}


def test_a_few_blocks_are_drawn_anew_for_every_link() -> None:
    blocks = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1", "decoder.block.2"]
    shapes = {f"{block}.layer.{k}.map": (20, 20) for block in blocks for k in range(2)} | {f"{blocks[0]}.thin": (1, 9)}
    config = AllocateConfig(**{**UNIFORM.model_dump(), "allocator": {"kind": "layer_subset", "blocks": 2}, "rank": 2})
    drawn = []
    for link in range(1, 30):
        result = allocate(Question(shapes, {}, config, 3, link))
        chosen = {block for block in blocks if any(result.ranks[n] for n in shapes if n.startswith(block + "."))}
        assert len(chosen) == 2
        assert all(
            r == min(2, *shapes[n]) * n.startswith(tuple(f"{b}." for b in chosen)) for n, r in result.ranks.items()
        )
        drawn.append(frozenset(chosen))
    assert len(set(drawn)) > 5 and {block for pair in drawn for block in pair} == set(blocks)
    many = AllocateConfig(**{**config.model_dump(), "allocator": {"kind": "layer_subset", "blocks": 6}})
    with pytest.raises(UserError, match=r"allocator\.blocks: the targets have 5; allowed: 1 to that"):
        allocate(Question(shapes, {}, many, 0, 1))


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=6), min_size=1, max_size=4), st.integers(1, 3))
def test_eva_gives_ranks_to_the_axes_of_most_variance(own: list[list[float]], rank: int) -> None:
    shapes = {str(k): (30, 30) for k in range(len(own))}
    found = {str(k): {"variance": sorted(shares, reverse=True)} for k, shares in enumerate(own)}
    config = AllocateConfig(allocator="eva", rank=rank, r_min=1, r_max=3, features="sqrt")
    result = allocate(Question(shapes, found, config, 0, 1))
    assert sum(result.ranks.values()) == rank * len(own) and max(result.ranks.values()) <= 3
    taken = [s for name, r in result.ranks.items() for s in found[name]["variance"][:r]]
    left = [s for name, r in result.ranks.items() for s in found[name]["variance"][r:3]]
    assert not left or min(taken) >= max(left)


def test_a_jagged_learning_rate_is_one_decay_warmed_up_again() -> None:
    """ReLoRA: the factor of the whole chain's cosine, times a warm-up in every link."""
    link = LinkConfig(**{**LINK.model_dump(), "steps": 10, "warmup": 0.2, "decay": "cosine", "floor": 0.1})
    jagged = ScheduleConfig(kind="cola", learning_rate="jagged", horizon=20)
    for offset in (0, 10):
        for step in range(10):
            decayed = 0.1 + 0.9 * (1 + math.cos(math.pi * (offset + step) / 20)) / 2
            warm = 0.5 if step == 0 else 1.0
            assert learning_rate_factor(step, offset, jagged, link) == pytest.approx(warm * decayed)


def test_rora_is_rslora() -> None:
    """RoRA, arXiv 2501.04315, has nothing of its own: s = alpha / sqrt(r), which keeps s B A of one size as r grows."""
    recipes = [yaml.safe_load((METHODS / f"{name}.yaml").read_text()) for name in ("rora", "rslora")]
    assert recipes[0] | {"recipe": ""} == recipes[1] | {"recipe": ""}
    assert all(SCALES["rslora"](16.0, r) == 16 / math.sqrt(r) and SCALES["lora"](16.0, r) == 16 / r for r in (1, 4, 9))


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_restart_and_global_learning_rates(decay: str) -> None:
    link = LINK.model_copy(update={"steps": 10, "warmup": 0.2, "decay": decay, "floor": 0.1})
    restart = ScheduleConfig(kind="cola", learning_rate="restart", horizon=20)
    whole = restart.model_copy(update={"learning_rate": "global"})
    one, two = ([learning_rate_factor(s, offset, restart, link) for s in range(10)] for offset in (0, 10))
    assert one == two, "every link warms up and decays again"
    assert one[:2] == [0.5, 1.0]
    factors = [learning_rate_factor(s, offset, whole, link) for offset in (0, 10) for s in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True), "a knot changes nothing"
    done = (19 - 4) / 16
    end = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[decay]
    assert factors[-1] == pytest.approx(0.1 + 0.9 * end)


def test_lora_plus_moves_b_ratio_times_as_far() -> None:
    """Adam's first step is lr * sign(g), so the movement is the learning rate."""
    a, b, head = (Parameter(torch.zeros(3)) for _ in range(3))
    config = LinkConfig(**{**LINK.model_dump(), "update": {"kind": "lora_plus", "ratio": 16.0}, "weight_decay": 0.0})
    optimizer = build_optimizer([("a", "A", a), ("b", "B", b), ("h", "head", head)], config)
    for parameter in (a, b, head):
        parameter.grad = torch.ones(3)
    optimizer.step()
    assert (b[0] / a[0]).item() == pytest.approx(16.0, rel=1e-5)
    assert head[0].item() == pytest.approx(-config.head_learning_rate, rel=1e-5)


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 30), st.integers(0, 99))
def test_order_reads_every_row_once_per_epoch(rows: int, batch: int, steps: int, seed: int) -> None:
    plan = order(rows, batch, steps, seed)
    assert [len(step) for step in plan] == [batch] * steps
    stream = [i for step in plan for i in step]
    for start in range(0, len(stream), rows):
        epoch = stream[start : start + rows]
        assert len(set(epoch)) == len(epoch)
    assert plan == order(rows, batch, steps, seed)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=9),
    st.integers(1, 9),
    st.none() | st.integers(300, 1000),
    st.booleans(),
)
def test_groups_cost_least_of_all_cuts(lengths: list[int], size: int, tokens: int | None, padded: bool) -> None:
    ranked = sorted(lengths)

    def cost(groups: list[list[int]]) -> int:
        return sum(computed(group) + OVERHEAD for group in groups)

    def computed(group: list[int]) -> int:
        return len(group) * max(group) if padded else sum(group)

    cuts = []
    for mask in range(2 ** (len(ranked) - 1)):
        groups, last = [], 0
        for end in range(1, len(ranked) + 1):
            if end == len(ranked) or mask >> (end - 1) & 1:
                groups.append(ranked[last:end])
                last = end
        cuts.append(groups)
    largest = [max(map(computed, groups)) for groups in cuts]
    allowed = [
        cost(groups)
        for groups, most in zip(cuts, largest, strict=True)
        if max(map(len, groups)) <= size and (tokens is None or most <= tokens)
    ]
    found = group_by_length(lengths, size, tokens, padded)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    assert cost([[lengths[i] for i in group] for group in found]) == min(allowed)


def test_a_row_longer_than_the_token_budget_is_a_group_of_its_own() -> None:
    assert group_by_length([99, 9, 9], 8, 50) == [[1, 2], [0]]


@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from(["linear", "cosine", "constant"]), st.floats(0, 0.5))
def test_cycles_are_schedules_of_their_own_that_share_the_steps(
    steps: int, cycles: int, decay: str, warm: float
) -> None:
    if cycles > steps:
        return
    config = LinkConfig(**{**LINK.model_dump(), "steps": steps, "decay": decay, "warmup": warm, "cycles": cycles})
    schedule = ScheduleConfig(kind="none", learning_rate="restart", horizon=steps)
    found = [learning_rate_factor(step, 0, schedule, config) for step in range(steps)]
    alone = []
    for cycle in range(cycles):
        share = steps * (cycle + 1) // cycles - steps * cycle // cycles
        one = config.model_copy(update={"steps": share, "cycles": 1})
        alone += [learning_rate_factor(step, 0, schedule, one) for step in range(share)]
    assert found == alone
