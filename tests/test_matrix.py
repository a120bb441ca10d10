"""Every pair of values on the axes: it trains, merges and reloads in some recipe, or it is refused with a reason.

Recipes are chosen so that each holds many pairs at once, and every pair that is not refused stands in one of them.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.methods import refusal_cells
from cola_core.config.compositions import REFUSALS, refused
from cola_core.config.params import check_params
from cola_core.config.recipe import LinkConfig, MachineConfig
from cola_core.errors import UserError
from cola_core.knot import open_chain, sample_scores
from tests.lab import root_of
from tests.points import job_at, walk
from tests.test_axes import kinds

Choice = dict[str, Any]
Pair = tuple[str, int, str, int]  # two keys of AXES, each with the place of its value
GA = {"kind": "lora_ga", "direction": "ArB2r", "form": "paper", "gamma": 16.0}
AXES: dict[str, list[Any]] = {
    "allocate.allocator": ["uniform", "full", "gora", {"kind": "layer_subset", "blocks": 1}, "eva"],
    "link.initialiser": [
        *("kaiming", "random_b", "gaussian", {"kind": "gora", "gamma": 0.05}, GA, "eva"),
        *({"kind": "cora", "sisters": "chain"}, {"kind": "momentum", "momentum": 0.2}),
        *({"kind": "loftq", "iterations": 2}, "identity"),
    ],
    "link.parametrisation": [
        *("plain", "frozen_a", "frozen_b", "dense", {"kind": "gated", "start": "one"}),
        *({"kind": "softmax_gated", "temperature": 0.05}, {"kind": "nola", "bases": 8}, "res_is"),
        *({"kind": kind, "previous": 1} for kind in ("res_bs", "res_ms", "res_ms_weights")),
    ],
    "link.scale": ["lora", "rslora", "unit"],
    "link.update": [
        *("adamw", "sgd", {"kind": "lora_plus", "ratio": 4.0}, {"kind": "penalised", "l2": 0.01}),
        {"kind": "proximal", "threshold": 0.1, "rule": "soft", "l1": 0.0},
        *({"kind": "lora_pro", "mode": "efficient"}, {"kind": "lora_pro", "mode": "full"}),
        {"kind": "lora_rite", "skip": 1.0, "clip": 1.0, "cutoff": 0.01, "escape": False},
        {"kind": "adalora", "rank": 1, "first": 0, "last": 0, "every": 1, "smoothing": 0.8, "orthogonal": 0.1},
        {"kind": "fedavg", "clients": 2, "local_steps": 2, "concentration": None, "privacy": None},
        *({"kind": "lora_ggpo", "sigma": 0.03, "beta": 0.01}, {"kind": "lora_mgpo", "rho": 0.05, "smoothing": 0.9}),
    ],
    "link.pruning": [
        "none",
        {"kind": "beam_lora", "every": 2, "share": 0.5, "schedule": "rising"},
        {"kind": "alora", "first": 1, "every": 1, "rounds": 1, "ranks": 3},
    ],
    "link.quantise": ["none", "nf4", "nf2", "uniform4", "uniform2"],
    "schedule.kind": ["none", "cola"],
    "schedule.learning_rate": ["restart", "global", "jagged"],
    "machine.dtype": ["fp32", "bf16", "fp64"],
    "profile.probe": ["none", "one_batch", "accumulate", "sampled"],
}
SMALL = {"profile.sketch": 8, "allocate.rank": 2, "allocate.r_min": 1, "allocate.r_max": 4, "link.clip": None}
NEEDS = {"gora": "sketch", "lora_ga": "gradient", "eva": "activations"}


def name_of(value: Any) -> str:
    return value["kind"] if isinstance(value, dict) else value


def names(choice: Choice) -> dict[str, str]:
    """Every key -> the name of its value; keys that are left open have one that nothing refuses."""
    return {key: name_of(choice.get(key, "")) for key in AXES} | {"machine.device": "cpu"}


def completed(choice: Choice) -> Choice:
    """With the numbers of a tiny model, and the directions that the values ask for."""
    wanted = [name_of(choice["link.initialiser"]), name_of(choice["allocate.allocator"]).replace("gora", "")]
    if choice["link.initialiser"] == "gaussian":
        choice = {**choice, "link.parametrisation": {"kind": "gated", "start": "zero"}}
    steps, kept = 4 if name_of(choice["link.pruning"]) == "beam_lora" else 2, "best"
    if name_of(choice["link.update"]) == "adalora":
        kept = "last"
    return {
        **choice,
        **SMALL,
        "link.steps": steps,
        "link.keep": kept,
        "profile.directions": sorted({NEEDS[name] for name in wanted if name in NEEDS}),
    }


def _pair(key: str, index: int, other: str, second: int) -> Pair:
    return (key, index, other, second) if key < other else (other, second, key, index)


def _pairs(chosen: dict[str, int]) -> set[Pair]:
    return {_pair(*one, *two) for one, two in itertools.combinations(chosen.items(), 2)}


EVERY = {
    _pair(key, i, other, j)
    for key, other in itertools.combinations(AXES, 2)
    for i in range(len(AXES[key]))
    for j in range(len(AXES[other]))
}
ALLOWED = {p for p in EVERY if not refused(names({p[0]: AXES[p[0]][p[1]], p[2]: AXES[p[2]][p[3]]}))}


def compose() -> Iterator[Choice]:
    """Recipes that hold all pairs that are allowed: each starts from a pair that none before it held."""
    left, draw = set(ALLOWED), random.Random(0)
    for pair in sorted(ALLOWED):
        if pair in left:
            recipe = next((found for _ in range(200) if (found := _extend(pair, left, draw))), None)
            assert recipe, f"{pair} composes with nothing on the other axes: refuse it"
            left -= _pairs(recipe)
            yield {key: AXES[key][index] for key, index in recipe.items()}


def _extend(pair: Pair, left: set[Pair], draw: random.Random) -> dict[str, int] | None:
    """A value for every axis beside the pair's, each the one that holds most of `left`; None at a dead end."""
    chosen = {pair[0]: pair[1], pair[2]: pair[3]}
    for key in draw.sample([key for key in AXES if key not in chosen], len(AXES) - 2):
        beside = {i: {_pair(key, i, *other) for other in chosen.items()} for i in range(len(AXES[key]))}
        fits = [i for i, pairs in beside.items() if pairs <= ALLOWED]
        if not fits:
            return None
        draw.shuffle(fits)
        chosen[key] = max(fits, key=lambda i: len(beside[i] & left))
    return chosen


RECIPES = list(compose())


def raw(choice: Choice) -> dict[str, Any]:
    """params.yaml with these values, one link where none may follow."""
    params = yaml.safe_load((Path(__file__).parent.parent / "params.yaml").read_text())
    links = 1 if choice["schedule.kind"] == "none" else 2
    params["chain"] = {str(k): {**copy.deepcopy(params["chain"]["1"]), "prev": str(k - 1), "profile_from": str(k)}
                       for k in range(1, links + 1)}  # fmt: skip
    chosen = completed(choice)
    for key, value in {**chosen, "schedule.horizon": chosen["link.steps"] * links}.items():
        section, field = key.split(".")
        params[section][field] = value
    for item in params["chain"].values():
        item["link"] = {}
    return {**params, "final": str(links)}


def test_the_matrix_has_every_value_of_every_axis() -> None:
    for field in ("initialiser", "parametrisation", "update", "pruning"):
        assert {name_of(value) for value in AXES[f"link.{field}"]} == kinds(LinkConfig, field)


def test_every_pair_stands_in_a_recipe_or_is_refused() -> None:
    held = {p for recipe in RECIPES for p in _pairs({k: AXES[k].index(v) for k, v in recipe.items()})}
    assert held == ALLOWED and len(EVERY) - len(ALLOWED) > 50
    for recipe in RECIPES:
        check_params(raw(recipe))


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: f"{r.key}-{r.other}")
def test_what_is_refused_is_told_with_both_names_and_a_reason(refusal: Any) -> None:
    known = {key: {name_of(value) for value in values} for key, values in AXES.items()}
    for one, two in itertools.product(refusal.values, refusal.others):
        line = refused({**names({}), refusal.key: one, refusal.other: two})
        assert line == f"{refusal.key} {one!r} with {refusal.other} {two!r}: {refusal.reason}"
        assert refusal.key not in known or one in known[refusal.key], "a refusal of no value"
        assert refusal.other not in known or two in known[refusal.other], "a refusal of no value"


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_it_trains_merges_and_reloads(number: int, tmp_path: Path) -> None:
    """A few steps a link; the chain read back from its files gives the scores that the knot was tied with (law 3)."""
    choice = RECIPES[number]
    sections: dict[str, dict[str, Any]] = {"link": {}, "profile": {}, "allocate": {}, "schedule": {}, "machine": {}}
    for key, value in completed(choice).items():
        section, field = key.split(".")
        sections[section][field] = value
    machine = MachineConfig(device="cpu", threads=1, dtype=choice["machine.dtype"])
    link = {**sections["link"], "validate_every": 2, "learning_rate": 1e-3}  # LoRA-RITE takes steps of its size
    chain = root_of("llama", tmp_path)
    for _ in range(1 if choice["schedule.kind"] == "none" else 2):
        job = job_at(
            "llama", chain, link, sections["profile"], sections["allocate"], machine, choice["schedule.learning_rate"]
        )
        chain = walk(job, tmp_path)
        scores = sample_scores(open_chain(job.base, chain, job.task, machine), job.validation[:8])
        assert torch.equal(scores, torch.tensor(chain[-1].record["knot"]["scores"], dtype=torch.float64)), choice
        assert chain[-1].record["trainable_parameters"] > 0


def test_the_page_lists_exactly_what_is_refused() -> None:
    page = (Path(__file__).parent.parent / "docs/methods.md").read_text()
    table = page.split("<!-- refusals:begin -->")[1].split("<!-- refusals:end -->")[0].strip().splitlines()[2:]
    assert table == ["| " + " | ".join(refusal_cells(refusal)) + " |" for refusal in REFUSALS]


def test_two_values_that_cannot_compose_never_start() -> None:
    choice = {**RECIPES[0], "link.update": {"kind": "proximal", "threshold": 0.1, "rule": "soft", "l1": 0.0},
              "link.parametrisation": "plain"}  # fmt: skip
    with pytest.raises(UserError, match=r"chain\.1: .* with .*: "):
        check_params(raw(choice))
