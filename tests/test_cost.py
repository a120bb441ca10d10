"""What `cola plan` says a stage costs, against the same work counted while it runs."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.paper import PAGE, SETTINGS, placed
from cola_core import gap
from cola_core.arithmetic.flops import ROUNDS, forward
from cola_core.arithmetic.shape import Work
from cola_core.config.params import Params, check_params
from cola_core.config.reading import read_yaml
from cola_core.errors import UserError
from cola_core.evaluation.answers import answer
from cola_core.knot import KNOT_ROWS, open_chain
from cola_core.links import run_link
from cola_core.probe import probe
from cola_core.rows import Row
from cola_core.sealed import write_sealed
from cola_core.split_files import write_rows
from flows.cost import cost, reference_ranks
from flows.plan import _uncounted
from flows.sizes import Sizes, sizes
from tests.lab import CANDIDATES, FP32, LINK, PROFILE, base_of, job_of, root_of, task_of

REPOSITORY = Path(__file__).parent.parent
PROMPT, COUNTS = 9, {"train": 16, "validation": 8, "test": 12, "probe": 5}


def rows(split: str) -> list[Row]:
    """Of one length, so that means are exact and nothing is padded."""
    return [Row(f"{split}:{i}", list(range(40, 40 + PROMPT)), CANDIDATES[0], 0, "a") for i in range(COUNTS[split])]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project after `prepare`, as far as its sizes are read."""
    (tmp_path / "artifacts/fetch").mkdir(parents=True)
    (tmp_path / "artifacts/fetch/model").symlink_to(base_of("llama"))
    prepared = tmp_path / "artifacts/prepare"
    prepared.mkdir()
    write_sealed(prepared / "task.json", "task", asdict(task_of("llama")))
    for split in COUNTS:
        write_rows(prepared / f"{split}.arrow", rows(split))
    return tmp_path


def setting(**sections: Any) -> Params:
    raw = read_yaml(REPOSITORY / "params.yaml")
    raw |= {"machine": FP32.model_dump(), "link": {k: v for k, v in LINK.model_dump().items() if k != "steps"}}
    raw |= {"profile": PROFILE.model_dump() | {"sketch": 32}, "schedule": raw["schedule"] | {"horizon": 12}}
    for item in raw["chain"].values():
        item["link"] = {"steps": 6}
    return check_params(raw | sections)


def known(root: Path) -> Sizes:
    found = sizes(root)
    assert found is not None
    return found


def counted(work: Any) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("policy", ["always", "if_better"])
def test_a_link_is_its_steps_validations_and_knot(root: Path, tmp_path: Path, policy: str) -> None:
    params, size = setting(), known(root)
    raw = params.model_dump(by_alias=True)
    params = check_params({**raw, "link": {**raw["link"], "keep_link": policy}})
    ranks = reference_ranks("1", params, size)
    data = {"train": rows("train"), "validation": rows("validation")}
    job = job_of("llama", root_of("llama", tmp_path), FP32, ranks=ranks, keep_link=policy, **data)
    said = cost("link", "1", params, size)
    assert said is not None and said.flops is not None
    more = sum(length - 1 for length in map(len, CANDIDATES))
    check = Work(KNOT_ROWS, PROMPT + more, KNOT_ROWS * (1 + more))  # scored before and after the knot: not in the plan
    assert counted(lambda: run_link(job)) == said.flops + forward(size.shape, check, ranks) + forward(size.shape, check)
    assert said.trainable == sum(rank * sum(size.shape.modules[name]) for name, rank in ranks.items())


def test_a_probe_and_an_evaluation(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap, "ROUNDS", ROUNDS)
    monkeypatch.setattr(gap, "PRECISION", dict.fromkeys(gap.PRECISION, -1.0))
    params, size = setting(), known(root)
    objective = open_chain(base_of("llama"), root_of("llama", tmp_path), task_of("llama"), FP32)
    evaluated = cost("evaluate_base", None, params, size)
    assert evaluated is not None
    assert counted(lambda: answer(objective, rows("test"), 4, lambda ids: "")) == evaluated.flops
    modules = {name: objective.model.get_submodule(name) for name in size.shape.modules}
    for way in ("one_batch", "accumulate", "sampled"):
        config = PROFILE.model_copy(update={"sketch": 32, "probe": way, "micro_batch": 2})
        profiled = cost("profile", "1", setting(profile=config.model_dump()), size)
        assert profiled is not None
        found = counted(lambda config=config: probe(objective, rows("probe"), modules, {}, config, (0, 1)))
        assert found == profiled.flops


def test_generation_reads_the_prompt_once_more(root: Path, tmp_path: Path) -> None:
    """An upper bound: attention counts the whole square, decoding with a cache only its last rows."""
    task = replace(task_of("llama"), kind="generate", candidates=[])
    write_sealed(root / "artifacts/prepare/task.json", "task", asdict(task))
    objective = open_chain(base_of("llama"), root_of("llama", tmp_path), task, FP32)
    said = cost("evaluate_base", None, setting(), known(root))
    assert said is not None and said.flops is not None
    found = counted(lambda: answer(objective, rows("test"), 4, lambda ids: ""))
    assert found < said.flops < 1.02 * found


def test_memory_grows_with_what_is_held(root: Path) -> None:
    size = known(root)

    def memory(task: str, key: str | None, **sections: Any) -> float:
        found = cost(task, key, setting(**sections), size)
        assert found is not None
        return found.memory

    gpu = {"device": "cuda", "threads": 1}
    narrow, wide = ({**gpu, "dtype": dtype} for dtype in ("bf16", "fp32"))
    assert size.weights * 2 < memory("link", "1", machine=narrow) < memory("link", "1", machine=wide)
    assert memory("merge", None) >= size.weights * 4
    assert memory("evaluate_base", None, machine={**narrow, "device": "cpu"}) >= size.weights * 4  # the fp32 master
    profile = PROFILE.model_dump() | {"sketch": 32, "micro_batch": COUNTS["probe"]}
    one, accumulated = (memory("profile", "1", profile=profile | {"probe": way}) for way in ("one_batch", "accumulate"))
    assert accumulated == one + 4 * size.shape.linear  # the sums
    few, many = (
        memory("profile", "1", profile=profile | {"probe": "sampled", "row_share": share}) for share in (0.25, 0.75)
    )
    assert one < few and many - few == pytest.approx(4 * size.shape.linear / 2, rel=0.1)


def test_memory_follows_micro_tokens_and_micro_batch(root: Path) -> None:
    size, link = known(root), setting().link
    longest = PROMPT + len(CANDIDATES[0]) - 1  # the last token is not read

    def memory(**changes: Any) -> float:
        found = cost("link", "1", setting(link=link | changes), size)
        assert found is not None
        return found.memory

    assert memory(micro_tokens=None) == memory(micro_tokens=4 * longest) > memory(micro_tokens=4 * longest - 1)
    assert memory(micro_tokens=2 * longest) == memory(micro_batch=2)
    assert memory(micro_tokens=1) == memory(micro_batch=1)


def test_rows_are_packed_where_training_packs_them(root: Path) -> None:
    """Attention's results end to end: 32 numbers a token and block more, in two blocks."""
    size = known(root)
    padded = replace(size, family="another")
    packed, plain = (cost("link", "1", setting(), one) for one in (size, padded))
    assert packed is not None and plain is not None
    tokens = 4 * (PROMPT + len(CANDIDATES[0]) - 1)
    assert packed.memory == plain.memory + tokens * 2 * 32 * 4


def test_what_is_not_prepared_is_not_known(root: Path) -> None:
    for file in (root / "artifacts/prepare").iterdir():
        file.unlink()
    size, params = known(root), setting()
    assert size.splits == {}
    for task in ("profile", "link", "evaluate"):
        found = cost(task, "1", params, size)
        assert found is not None and found.flops is None and found.memory >= size.weights * 4
    assert cost("fetch", None, params, size) is None


def test_half_of_the_files_is_none_and_a_torn_one_is_named(root: Path) -> None:
    torn = root / "artifacts/prepare/probe.arrow"
    torn.write_bytes(torn.read_bytes()[:40])
    with pytest.raises(UserError, match=r"probe\.arrow: not a prepared split"):
        sizes(root)
    torn.unlink()
    assert known(root).splits == {}
    model = root / "artifacts/fetch/model"
    model.unlink()  # a link to what all tests share
    shutil.copytree(base_of("llama"), model)
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"safetensors: not a whole safetensors file"):
        sizes(root)


def test_the_page_has_the_tables_that_the_formulas_give() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert placed(page) == page, "run `python -m benchmarks.paper`"
    seven = SETTINGS[0]
    assert seven.weights == 6_738_415_616  # Llama-2-7B's own count
    assert SETTINGS[1].weights == 70_553_706_496  # Llama-3-70B's


def test_what_trains_in_a_form_is_counted_as_a_link_counts_it(root: Path, tmp_path: Path) -> None:
    forms = ["plain", "frozen_a", {"kind": "softmax_gated", "temperature": 0.1}, {"kind": "nola", "bases": 5}]
    for number, form in enumerate(forms):
        params = setting(link={**LINK.model_dump(), "parametrisation": form})
        said, ranks = cost("link", "1", params, known(root)), reference_ranks("1", params, known(root))
        job = job_of(
            "llama", root_of("llama", tmp_path / str(number)), FP32, parametrisation=form, steps=1, ranks=ranks
        )
        assert said is not None and said.trainable == run_link(job)[1]["trainable_parameters"]


def test_values_whose_own_work_is_left_out_are_named() -> None:
    assert list(_uncounted(setting())) == []
    link = {**LINK.model_dump(), "update": {"kind": "lora_pro", "mode": "full"}, "quantise": "nf4"}
    (told,) = _uncounted(setting(link=link))
    assert told.startswith("lora_pro, nf4: counted as LoRA with AdamW")
