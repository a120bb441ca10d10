"""Every mistake in params.yaml is one line that names its key; nothing that cannot compose is started."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_core.config.params import check_params
from cola_core.errors import UserError, suggest

PARAMS = yaml.safe_load((Path(__file__).parent.parent / "params.yaml").read_text())


def changed(key: str, value: Any) -> dict[str, Any]:
    """params.yaml with one dotted key set; a value of ... removes it."""
    raw = copy.deepcopy(PARAMS)
    *path, last = key.split(".")
    place = raw
    for part in path:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return raw


def test_the_committed_parameters_are_right() -> None:
    check_params(copy.deepcopy(PARAMS))


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("seeed", 1, "seeed: unknown key; did you mean 'seed'?"),
        ("link.learning_rat", 1.0, "link.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("chain.2.link.stepz", 3, "chain.2.link.stepz: unknown key; did you mean 'steps'?"),
        ("evaluate.row", 3, "evaluate.row: unknown key; did you mean 'rows'?"),
        ("fetch.model.sha", "x", "fetch.model.sha: unknown key; did you mean 'sha256'?"),
        ("link.update", "adam", "link.update: 'adam' is not a value; did you mean 'adamw'?"),
        ("machine.dtype", "int8", "machine.dtype: 'int8' is not a value; allowed: fp32, bf16, fp64"),
        ("link.learning_rate", "fast", "link.learning_rate: Input should be a valid number"),
        ("link.learning_rate", -1.0, "link.learning_rate: Input should be greater than 0"),
        ("link.steps", ..., "horizon"),
        ("merge.checkpoint", ..., "merge.checkpoint: missing"),
        ("register", ..., "register: missing"),
        ("schedule.horizon", 81, "schedule.horizon: is 81, but the links' steps add up to 80"),
        ("final", "1", "final: is '1'; the chain's last link is '2'"),
        ("chain.2.prev", "2", "chain.2.prev: is '2'; link '2' follows '1', anything else is a cycle"),
        ("chain.2.profile_from", "3", "chain.2.profile_from: is '3'; allowed: a quoted link from '1' to '2'"),
        ("chain.1", ..., "chain: links are 2; they must be 1, no gap"),
        ("schedule.kind", "none", "schedule.kind 'none' with more than one link"),
        ("profile.probe", "none", "allocate.allocator 'gora' with profile.probe 'none'"),
        ("profile.sketch", 8, "profile.sketch 8 below allocate.r_max 32"),
        ("allocate.rank", 2, "allocate.rank outside [r_min, r_max]"),
        ("profile.adaptive", True, "profile.adaptive with profile.probe 'one_batch'"),
        ("chain.2.profile_from", "1", "link.initialiser 'gora' with another link's profile"),
        ("fetch.model.kind", "encoder", "classify needs an encoder"),
        ("link.bias", "lora", "link.bias 'lora' with merge.flat_adapter"),
    ],
)
def test_one_clear_line(key: str, value: Any, line: str) -> None:
    raw = changed(key, value)
    if line == "horizon":
        check_params(raw)  # every link sets its own steps
        return
    with pytest.raises(UserError) as caught:
        check_params(raw)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bare_number_as_a_link_is_refused() -> None:
    raw = changed("seed", 0)
    raw["chain"] = {"1": raw["chain"]["1"], 2: raw["chain"]["2"]}
    with pytest.raises(UserError, match=r"chain.2: the key must be quoted \('2'\)"):
        check_params(raw)


def test_reused_ranks_start_later_links_from_random_pairs() -> None:
    raw = changed("chain.2.profile_from", "1")
    raw["chain"]["2"]["link"]["initialiser"] = "kaiming"
    raw["chain"]["2"]["profile"] = {"probe": "none"}
    check_params(raw)


@pytest.mark.parametrize(("word", "end"), [("sst", "did you mean 'sst2'?"), ("qqq", "allowed: sst2, rte")])
def test_suggestions(word: str, end: str) -> None:
    assert suggest(word, ["sst2", "rte"]).endswith(end)
