"""params.yaml of a run: conf/ composes to the committed file, hand edits are never dropped, mistakes are one line."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import REPOSITORY, git

from cola_core.assets.tiny import build_tiny
from cola_core.config.params import check_params
from cola_core.config.reading import load_yaml
from cola_core.errors import UserError
from cola_core.models import module_shapes
from cola_core.targets import select_targets
from flows.compose import _composed, _value, choices, compose, edits

NOTHING: dict[str, str | None] = {"method": None, "task": None, "model": None, "chain": None}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    (tmp_path / "params.yaml").write_bytes(git(REPOSITORY, "show", "HEAD:params.yaml"))
    return tmp_path


def _read(text: str) -> dict[str, Any]:
    return dict(load_yaml(text))


def test_the_committed_params_are_the_composed_defaults(root: Path) -> None:
    committed = (root / "params.yaml").read_text()
    assert (
        compose(root, {**NOTHING, "method": "cola_gora", "task": "r8", "model": "smollm2_135m", "chain": "m2"})
        == committed
    )
    assert edits(root, _read(committed)) == []


def test_without_choices_the_file_stands_as_it_is(root: Path) -> None:
    text = (root / "params.yaml").read_text() + "# a note of the user's\n"
    (root / "params.yaml").write_text(text)
    assert compose(root, NOTHING) == text
    changed = compose(root, NOTHING, ["link.learning_rate=1e-4", "seed=7"])
    assert _read(changed)["link"]["learning_rate"] == 1e-4 and _read(changed)["seed"] == 7
    assert (root / "params.yaml").read_text() == text


@pytest.mark.parametrize("method", choices(REPOSITORY, "method"))
def test_every_method_composes_with_every_chain_or_says_why_not(method: str) -> None:
    composed = 0
    for chain in [None, "m1", "m3", "first_link_only/m3"]:  # the others differ in how often a link is named
        params = _read(_composed(REPOSITORY, {"method": method, **({"chain": chain} if chain else {})}, []))
        try:
            check_params(params)
        except UserError as error:
            assert "only 'cola' ties knots" in str(error) or "another link's profile" in str(error), (chain, error)
            continue
        composed += 1
        assert params["recipe"] == method
        assert sum(link["link"]["steps"] for link in params["chain"].values()) == params["schedule"]["horizon"]
    assert composed


# A model of every family, with its tiny sibling and what that one calls attention's query and value.
FAMILIES = {
    "smollm2_135m": ("llama", "causal", {"q_proj", "v_proj"}),
    "tiny_opt": ("opt", "causal", {"q_proj", "v_proj"}),
    "tiny_gpt2": ("gpt2", "causal", {"c_attn"}),
    "tiny_t5": ("t5", "seq2seq", {"q", "v"}),
    "minilm_l6": ("bert", "encoder", {"query", "value"}),
}


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The adaptable modules of every model of FAMILIES."""
    found = {}
    for model, (family, kind, _) in FAMILIES.items():
        build_tiny(family, folder := tmp_path_factory.mktemp(family))
        found[model] = list(module_shapes(folder, kind))
    return found


@pytest.mark.parametrize("model", FAMILIES)
def test_query_and_value_are_found_in_every_family(model: str, modules: dict[str, list[str]]) -> None:
    _, kind, endings = FAMILIES[model]
    for targets in ("query_value", ["query_value"]):
        found = select_targets(modules[model], targets)
        assert {name.rsplit(".", 1)[-1] for name in found} == endings
    assert len(found) == 2 * len(endings) * (3 if kind == "seq2seq" else 1)  # a T5 block has up to two attentions
    assert select_targets(modules[model], sorted(endings)) == found
    with pytest.raises(UserError, match=r"^params\.yaml: targets: 'query_valu' ends no .*did you mean 'query_value'"):
        select_targets(modules[model], "query_valu")


def test_a_model_without_query_and_value_is_told() -> None:
    with pytest.raises(UserError, match=r"^params\.yaml: targets: 'query_value' ends no .*; allowed: all, dense"):
        select_targets(["layers.0.dense"], "query_value")


@pytest.mark.parametrize("task", choices(REPOSITORY, "task"))
def test_every_task_composes_with_every_model_or_says_why_not(task: str, modules: dict[str, list[str]]) -> None:
    """What a task says does not depend on recipe and chain, so these pairs and the ones above cover every four."""
    fits = 0
    for model in FAMILIES:
        params = _read(_composed(REPOSITORY, {"task": task, "model": model}, []))
        try:
            check_params(params)
        except UserError as error:
            assert str(error).startswith("params.yaml: ") and "\n" not in str(error), (model, error)
            continue
        fits += 1
        assert params["task"] == task
        assert select_targets(modules[model], params["targets"])
    assert fits or task == "custom"


def test_what_a_custom_task_leaves_open_is_asked_for(root: Path) -> None:
    with pytest.raises(UserError, match=r"left to you; add -S "):
        compose(root, {**NOTHING, "task": "custom"})


def test_hand_edits_are_refused_and_told_as_arguments_that_bring_them_back(root: Path) -> None:
    params = _read((root / "params.yaml").read_text())
    params["link"]["learning_rate"] = 1e-5
    params["prepare"]["prompt"] = "It's {{ Text }}\n'so' \\"
    params["prepare"]["answers"]["money-fx"] = " cash, or = money"
    params["link"]["patience"] = 3
    params["chain"]["2"]["allocate"] = {"rank": 4, "features": "linear"}
    del params["prepare"]["answers"]["ship"]
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    with pytest.raises(UserError, match="would drop") as refused:
        compose(root, {**NOTHING, "chain": "m2"})
    words = _in_bash(str(refused.value).split("add: ")[1])
    assert words[::2] == ["-S"] * (len(words) // 2)
    (root / "params.yaml").write_bytes(git(REPOSITORY, "show", "HEAD:params.yaml"))
    assert _read(compose(root, {**NOTHING, "chain": "m2"}, words[1::2])) == params


def _in_bash(line: str) -> list[str]:
    """The words that a user's shell makes of a line told to him."""
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], check=True, capture_output=True)
    return done.stdout.decode().split("\0")[:-1]


def test_what_another_composition_changed_is_no_hand_edit(root: Path) -> None:
    (root / "params.yaml").write_text(compose(root, {**NOTHING, "method": "gora"}))
    assert edits(root, _read((root / "params.yaml").read_text())) == []
    assert _read(compose(root, {**NOTHING, "method": "lora"}))["recipe"] == "lora"


def test_a_group_among_the_overrides_composes(root: Path) -> None:
    assert _read(compose(root, NOTHING, ["machine=cpu_bf16"]))["machine"]["dtype"] == "bf16"
    assert _read(compose(root, NOTHING, ["method=lora", "seed=3"]))["seed"] == 3


MISTAKES = [
    ({"method": "lor"}, [], "did you mean 'lora'"),
    ({"chain": "m9"}, [], "conf/chain has no 'm9'"),
    ({}, ["link.learning_rat=1"], "did you mean 'learning_rate'"),
    ({"method": "lora"}, ["link.learning_rat=1"], "did you mean 'learning_rate'"),
    ({}, ["+link.new=1"], "unknown key"),
    ({}, ["link.steps"], "expected key=value, such as link.learning_rate=1e-4"),
    (
        {},
        ["link.steps=20"],
        "override link.steps: changes nothing, since every link of the chain sets its own; set sch",
    ),
    ({"method": "cola"}, ["link.steps=20"], "schedule.horizon"),
    ({}, ["++link.steps=20", "seed=3"], "-S chain=m2 -S schedule.horizon=..."),
    ({"method": "gora_init_only"}, ["allocate.rank=64"], "profile.sketch 32 below allocate.rank 64"),
    ({}, ["link.alpha=[1"], "override"),
    ({}, ["link.alpha=x"], "link.alpha"),
    ({}, ["~link.alpha"], "link.alpha: missing"),
    ({}, ["final='3'"], "the chain's last link is '2'"),
    ({"method": "cola"}, ["~chain.2"], "last link"),
]


@pytest.mark.parametrize(("picks", "overrides", "told"), MISTAKES, ids=[str(m[:2]) for m in MISTAKES])
def test_mistakes_are_one_line(root: Path, picks: dict[str, str], overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        compose(root, {**NOTHING, **picks}, overrides)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("picks", [NOTHING, {**NOTHING, "method": "gora"}], ids=["laid over", "composed"])
def test_exponents_and_truth_words_survive(root: Path, picks: dict[str, str | None]) -> None:
    """Hydra and DVC write YAML 1.2, where 5e-05 is a number and `no` a text."""
    answers = 'prepare.answers={no: " bad", yes: " good", on: " off"}'
    params = _read(compose(root, picks, ["link.learning_rate=5e-5", "link.epsilon=1e-6", f"+{answers}"]))
    assert (params["link"]["learning_rate"], params["link"]["epsilon"]) == (5e-5, 1e-6)
    assert {"no": " bad", "yes": " good", "on": " off"}.items() <= params["prepare"]["answers"].items()


def test_the_steps_of_links_that_have_none_of_their_own_may_be_set(root: Path) -> None:
    text = (root / "params.yaml").read_text().replace("    link:\n      steps: 40\n", "    link: {}\n")
    (root / "params.yaml").write_text(text)
    params = _read(compose(root, NOTHING, ["link.steps=20", "schedule.horizon=40"]))
    assert params["link"]["steps"] == 20


LEAF = st.one_of(
    st.integers(-9, 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.sampled_from(["true", "null", "INF", "1e5", "a b", "it's", "\\'", "a\\", "a,b", "[x]", "=", '"q"']),
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(LEAF, st.lists(LEAF, max_size=3)))
def test_values_survive_hydras_grammar(value: Any) -> None:
    found = OverridesParser.create().parse_override(f"+k={_value(value)}").value()
    for one, other in itertools.zip_longest(*(x if isinstance(x, list) else [x] for x in (found, value))):
        assert (str(one) if isinstance(other, str) else one) == other
