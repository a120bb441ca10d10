"""Every mistake in params.yaml is one line that names its key; nothing that cannot compose is started."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from cola_core.config.params import check_params
from cola_core.config.reading import load_yaml, read_yaml
from cola_core.errors import UserError, suggest

PARAMS = yaml.safe_load((Path(__file__).parent.parent / "params.yaml").read_text())


ALORA = {"kind": "alora", "first": 39, "every": 1, "rounds": 1, "ranks": 1}
BEAM = {"kind": "beam_lora", "every": 20, "share": 0.9, "schedule": "rising"}
ADALORA = {"kind": "adalora", "rank": 7, "first": 1, "last": 1, "every": 1, "smoothing": 0.8, "orthogonal": 0.1}


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
        ("chain.2.link.update", "adam", "chain.2.link.update: 'adam' is not a value; did you mean 'adamw'?"),
        ("link.update", ..., "link.update: missing"),
        ("link.update", 3, "link.update: needs a name, or a name with its numbers"),
        ("link.update", "lora_plus", "link.update.ratio: missing"),
        ("link.update", {"kind": "lora_plus", "rato": 2.0}, "link.update.rato: unknown key; did you mean 'ratio'?"),
        ("chain.2.link.update", {"kind": "lora_plus", "ratio": 0.0}, "chain.2.link.update.ratio: Input should be grea"),
        ("link.gamma", 0.1, "link.gamma: stands under link.initialiser.gamma since version 0.3"),
        ("link.steps", "many", "link.steps: Input should be a valid integer"),
        ("chain.1.link.steps", 0, "chain.1.link.steps: Input should be greater than or equal to 1"),
        ("profile.probe", "two", "profile.probe: 'two' is not a value"),
        ("evaluate.rows", 0, "evaluate.rows: needs a whole number of at least 1, or all (got 0)"),
        ("evaluate.rows", -1, "evaluate.rows: needs a whole number of at least 1, or all (got -1)"),
        ("evaluate.rows", True, "evaluate.rows: needs a whole number of at least 1, or all (got True)"),
        ("evaluate.rows", "many", "evaluate.rows: needs a whole number of at least 1, or all (got 'many')"),
        ("link.betas", [0.9, 1.0], "link.betas.1: Input should be less than 1 (got 1.0)"),
        ("link.betas", [-0.1, 0.9], "link.betas.0: Input should be greater than or equal to 0 (got -0.1)"),
        ("targets", [], "targets: needs all, query_value, or at least one ending"),
        ("targets", [""], "targets: needs all, query_value, or at least one ending"),
        ("targets", 3, "targets: needs all, query_value, or at least one ending"),
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
        ("schedule.kind", "none", "chain.1: schedule.kind 'none' with more than one link"),
        ("profile.probe", "none", "chain.1: allocate.allocator 'gora' with profile.probe 'none'"),
        ("profile.sketch", 8, "chain.1: profile.sketch 8 below allocate.r_max 32: "),
        ("allocate.rank", 2, "chain.1: allocate.rank outside [r_min, r_max]"),
        ("profile.adaptive", True, "chain.1: profile.adaptive with profile.probe 'one_batch'"),
        ("chain.2.profile_from", "1", "chain.2: link.initialiser 'gora' with another link's profile"),
        (
            "fetch.model.kind",
            "encoder",
            "chain.1: prepare.kind 'choice' with fetch.model.kind 'encoder': classify needs an encoder",
        ),
        ("link.bias", "lora", "chain.1: link.bias 'lora' with merge.flat_adapter"),
        ("link.pruning", ALORA | {"first": 40}, "chain.1: link.pruning.first 40 with link.steps 40: no round"),
    ],
)
def test_one_clear_line(key: str, value: Any, line: str) -> None:
    raw = changed(key, value)
    if line == "horizon":
        check_params(raw)  # every link sets its own steps
        return
    with pytest.raises(UserError) as caught:
        check_params(raw)
    assert str(caught.value).startswith(f"params.yaml: {line}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [1, 10**6, "all"])
def test_rows_of_the_evaluation_may_be_a_number_or_all(rows: int | str) -> None:
    assert check_params(changed("evaluate.rows", rows)).evaluate.rows == rows


def test_a_mistake_in_a_section_is_told_under_the_key_that_holds_it() -> None:
    raw = changed("link.update", "adam")
    raw["chain"]["1"]["link"]["update"] = {"kind": "lora_plus", "ratio": 16.0}  # link 1 never reads the shared value
    with pytest.raises(UserError, match=r"^params\.yaml: link\.update: 'adam'"):
        check_params(raw)
    raw = changed("link.steps", ...)
    raw["chain"]["1"]["link"]["steps"] = 0
    with pytest.raises(UserError, match=r"^params\.yaml: chain\.1\.link\.steps: "):
        check_params(raw)


def test_trained_biases_need_a_wide_base() -> None:
    raw = changed("machine.dtype", "bf16")
    check_params(raw)
    raw["link"]["bias"] = "lora"
    raw["merge"] |= {"flat_adapter": False, "portable_adapter": False}
    with pytest.raises(UserError, match=r"chain\.1: link\.bias 'lora' with machine\.dtype 'bf16'"):
        check_params(raw)


def test_rounds_that_fit_are_taken() -> None:
    raw = changed("link.pruning", ALORA)
    check_params(raw)
    raw["link"] |= {"pruning": BEAM, "parametrisation": {"kind": "softmax_gated", "temperature": 1.0}}
    raw["link"]["initialiser"] = "kaiming"
    check_params(raw)
    raw["link"]["pruning"] = BEAM | {"every": 21}
    with pytest.raises(UserError, match=r"link\.pruning\.every 21 with link\.steps 40: no rank would ever be pruned"):
        check_params(raw)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("keep", "best", "link.keep 'best' with link.update 'adalora': a step before the budget is final"),
        ("patience", 3, "link.patience with link.update 'adalora': a step before the budget is final"),
        ("update", ADALORA | {"rank": 8}, "link.update.rank 8 with allocate.rank 8: no gate would ever be closed"),
        ("update", ADALORA | {"first": 39}, "link.update: first and last are 40 steps together: fewer than link.steps"),
    ],
)
def test_a_budget_that_would_not_be_kept_is_refused(key: str, value: Any, line: str) -> None:
    gates = {"parametrisation": {"kind": "gated", "start": "zero"}, "initialiser": "gaussian"}
    raw = changed("link", {**PARAMS["link"], **gates, "update": ADALORA, "keep": "last"})
    raw["allocate"]["allocator"] = "uniform"
    check_params(raw)
    raw["link"][key] = value
    with pytest.raises(UserError) as caught:
        check_params(raw)
    assert str(caught.value).startswith(f"params.yaml: chain.1: {line}")


def test_a_uniform_rank_needs_as_many_sketch_rows() -> None:
    raw = changed("allocate", {**PARAMS["allocate"], "allocator": "uniform", "rank": 64})
    with pytest.raises(
        UserError, match=r"chain\.1: profile\.sketch 32 below allocate\.rank 64: .*; raise profile\.sketch"
    ):
        check_params(raw)
    raw["profile"]["sketch"] = 64
    check_params(raw)
    raw["allocate"]["rank"], raw["profile"]["sketch"] = 8, 8  # r_max 32 says nothing to a uniform rank
    check_params(raw)
    raw["chain"]["2"]["allocate"] = {"rank": 16}
    with pytest.raises(UserError, match=r"chain\.2: profile\.sketch 8 below allocate\.rank 16"):
        check_params(raw)
    raw["chain"]["2"]["profile"] = {"sketch": 16}
    check_params(raw)


SCALARS = [
    ("1e-4", 1e-4), ("5e-05", 5e-5), ("1E6", 1e6), ("-1.5e3", -1.5e3), ("1.", 1.0), (".5", 0.5), ("1.0e-08", 1e-8),
    (".inf", float("inf")), ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("true", True), ("FALSE", False),
    ("1:30", "1:30"), ("010", 10), ("0o10", 8), ("0x1e5", 0x1E5), ("-7", -7), ("1_000", 1000), ("e5", "e5"),
    ("1e", "1e"), ("null", None), ("~", None), ("1.0.0", "1.0.0"), ("[1e-4]", [1e-4]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS, ids=[text for text, _ in SCALARS])
def test_scalars_are_read_as_dvc_reads_them(text: str, value: Any) -> None:
    found, other = load_yaml(f"k: {text}")["k"], YAML(typ="safe", pure=True).load(f"k: {text}")["k"]
    assert (found, type(found)) == (value, type(value)) == (other, type(other))


def test_a_hand_written_exponent_is_a_number(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "params.yaml").read_text()
    assert "learning_rate: 0.0005\n" in text
    (tmp_path / "params.yaml").write_text(text.replace("learning_rate: 0.0005\n", "learning_rate: 1e-4\n"))
    assert check_params(read_yaml(tmp_path / "params.yaml")).link["learning_rate"] == 1e-4


WORDS = st.sampled_from(
    ["no", "yes", "on", "y", "1e-4", "1:30", "010", "0o7", "=", "<<", "2024-01-01", "1_0", "null", "~"]
)
TEXTS = st.text(st.characters(exclude_characters="\x85\u2028\u2029", codec="utf-8"), max_size=6)  # PyYAML's line breaks
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), TEXTS, WORDS)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.one_of(WORDS, TEXTS), LEAVES, max_size=3))
def test_what_dvc_writes_is_read_back(value: dict[str, Any]) -> None:
    made = io.StringIO()
    YAML().dump(value, made)
    assert load_yaml(made.getvalue()) == value


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


@pytest.mark.parametrize(
    ("key", "value"), [("importance", "nuclear_g"), ("activation_checkpointing", True), ("adaptive", True)]
)
def test_what_a_sampled_probe_cannot_do_is_refused(key: str, value: Any) -> None:
    raw = changed("profile.probe", "sampled")
    check_params(copy.deepcopy(raw))
    raw["profile"][key] = value
    with pytest.raises(UserError, match=f"profile.{key}.* with profile.probe 'sampled'"):
        check_params(raw)
