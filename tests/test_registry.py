"""A chain becomes one model version, and that version predicts in a process that has nothing but the store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cola_core.adapter_files import Adapter
from cola_core.adapters import Pair
from cola_core.assets.base import base_folder, find_base
from cola_core.chain import head_of, write_link
from cola_core.checksums import seal_folder
from cola_core.config.reading import read_yaml
from cola_core.config.recipe import LinkConfig, MachineConfig, ScheduleConfig
from cola_core.errors import UserError
from cola_core.evaluation.answers import Answers, write_predictions
from cola_core.files import read_json, write_json
from cola_core.lineage import read_chain
from cola_core.models import adaptable, load_base, weight_shape
from cola_core.root import write_root
from cola_core.rows import Row
from cola_core.sealed import read_sealed, write_sealed
from tasks import merge, prepare, register
from tasks.card import card
from tasks.context import Context, Done
from tasks.places import ARTIFACTS, link_dir, main_checkout
from tasks.records import record
from tasks.release import pack, read_release
from tasks.store import open_store
from tasks.sync import sync

REPOSITORY = Path(__file__).parents[1]
TEXTS = ["awful", "zebra", "a film of 1999", "Quite nice!", "no", "YES", "0123456789", "the end", "x", "q w", "so", "?"]
LABELS = {"good": " good", "poor": " poor"}  # of one length: the random model sums log-probabilities of bytes
ACCURACY = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9}
SCORES = {**ACCURACY, "macro_f1": 0.75, "macro_f1_low": 0.6, "macro_f1_high": 0.85}


def settings(family: str, kind: str) -> dict[str, Any]:
    """params.yaml of the repository with a tiny model and a task of two labels."""
    raw = read_yaml(REPOSITORY / "params.yaml")
    raw["fetch"]["model"] = {"kind": kind, "asset": f"tiny:{family}", "sha256": None}
    raw["fetch"]["data"] = {"train": {"asset": "path:train.jsonl", "sha256": None}, "test": None}
    raw["machine"] = {"device": "cpu", "threads": 1, "dtype": "fp32"}
    task = {"prompt": "{{ text }}\nIt was", "label": "{{ label }}", "answers": LABELS, "max_tokens": 64}
    raw["prepare"] |= {**task, "kind": "classify" if kind == "encoder" else "choice", "loss": "answer"}
    raw["prepare"] |= {"train": None, "validation": 4, "probe": 4, "test": 8}
    raw["merge"]["portable_adapter"] = kind != "encoder"
    raw |= {"recipe": "cola_gora", "task": "moods"}
    raw["register"] = {"name": "cola-moods", "merged": False}
    return raw


def hand_made_link(context: Context, number: int, kind: str, labels: int, seed: int = 0) -> None:
    """A link with random pairs, large enough to change answers."""
    chain = read_chain(link_dir(str(number - 1)))
    machine = context.section(MachineConfig, "machine")
    model = load_base(ARTIFACTS / "fetch/model", machine, labels)
    generator = torch.Generator().manual_seed(number + 100 * seed)
    pairs = {}
    for name, module in adaptable(model).items():
        out, width = weight_shape(module)
        pairs[name] = Pair(torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator), 0.05)
    base = chain[0].record["base"]
    adapter = Adapter(pairs, base["asset"], kind, dict.fromkeys(pairs, 1.0), False, head=head_of(chain))
    told: dict[str, Any] = {
        "kept": True,
        "validation_before": None,
        "steps": 4,
        "kept_step": 4,
        "tokens": 100,
        "probe_tokens": 20,
        "validation_loss": 0.5,
    }
    told |= {"trainable_parameters": 1234, "machine_section": machine.model_dump()}
    told["link_section"] = context.section(LinkConfig, "link", str(number)).model_dump()
    told["schedule_section"] = context.section(ScheduleConfig, "schedule").model_dump()
    parent = {"link": chain[-1].number, "hash": chain[-1].hash}
    link = {"link": number, "parent": parent, "base": base, "seed": 0, **told}
    write_link(link_dir(str(number)), adapter, link, {})


def make_artifacts(family: str, kind: str) -> Context:
    """All artifacts that `register` reads, in the current folder."""
    raw = settings(family, kind)
    Path("params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    context = Context("register", None, raw)
    shutil.copytree(base_folder(raw["fetch"]["model"]["asset"], None, kind), ARTIFACTS / "fetch/model")
    rows = [{"text": f"film number {i}", "label": ["good", "poor"][i % 2]} for i in range(32)]
    (ARTIFACTS / "fetch/data").mkdir()
    (ARTIFACTS / "fetch/data/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seal_folder(ARTIFACTS / "fetch/data")
    prepare.main(context)
    from cola_core.models import head_parameters

    model = load_base(ARTIFACTS / "fetch/model", context.section(MachineConfig, "machine"), 2)
    head = {name: p.detach().clone() for name, p in head_parameters(model).items()}
    write_root(link_dir("0"), ARTIFACTS / "fetch/model", 2, head)
    for number in (1, 2):
        hand_made_link(context, number, kind, 2)
    merge.main(context)
    metrics = {"n": 8, **SCORES, "base": {**SCORES, "accuracy": 0.5}, "majority": {**SCORES, "accuracy": 0.4}}
    write_json(ARTIFACTS / "evaluate/metrics.json", {**metrics, "prefixes": {"1": SCORES}})
    answered(raw["final"], [True] * 7 + [False])
    return context


def answered(final: str, correct: list[bool], base: int = 4, prefix: str = "test") -> None:
    """What the evaluation stages leave of answers: the chain's, and a base that is right on the first rows."""
    gold = ["good", "poor"] * (len(correct) // 2)
    rows = [Row(f"{prefix}:{i}", [5], [6], 0, label) for i, label in enumerate(gold)]
    for stage, name, right in (
        ("evaluate", f"links_{final}", correct),
        ("evaluate_base", "base", [i < base for i in range(len(correct))]),
    ):
        said = [g if r else {"good": "poor", "poor": "good"}[g] for g, r in zip(gold, right, strict=True)]
        found = Answers(said, gold, right, [0.5] * len(gold), [0.8] * len(gold))
        write_predictions(ARTIFACTS / stage / "predictions.arrow", rows, {name: found})
        seal_folder(ARTIFACTS / stage)


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a checkout of `folder`, with a cache of its own, and go there."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    monkeypatch.setenv("COLA_CACHE", str(folder / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)
    main_checkout.cache_clear()


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with everything up to `register` done once."""
    folder = tmp_path_factory.mktemp("registered")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        context = make_artifacts("llama", "causal")
        record(Context("evaluate", None, context.raw), Done(outputs=[ARTIFACTS / "evaluate"]), time.time())
        started = time.time()
        record(context, register.main(context), started)
        sync()
    main_checkout.cache_clear()
    return folder


@pytest.fixture
def checkout(registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that checkout for one test; its store starts with the session's."""
    shutil.copytree(registered, tmp_path, dirs_exist_ok=True)
    enter(tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    yield tmp_path
    main_checkout.cache_clear()


def context_of(checkout: Path) -> Context:
    return Context("register", None, read_yaml(checkout / "params.yaml"))


def versions(name: str = "cola-moods") -> list[Any]:
    with open_store() as store:
        return list(store.client.search_model_versions(f"name = '{name}'"))


PREDICT = """
import json, socket, sys
def refuse(*_, **__): raise OSError("no network here")
socket.socket.connect = refuse
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/cola-moods@challenger")
rows = [{"text": text} for text in json.loads(sys.argv[1])]
raw = model.predict(pandas.DataFrame(rows))["prediction"].tolist()
texts = model.predict(pandas.DataFrame([{"prompt": row["text"] + "\\nIt was"} for row in rows]))["prediction"].tolist()
assert not any(m.split(".")[0] in ("peft", "tasks") for m in sys.modules)
print(json.dumps([raw, texts]))
"""


def predict_elsewhere(checkout: Path, tmp: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Load `models:/...` in a clean process with another folder, no project on its path and no network."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    kept |= {"MLFLOW_TRACKING_URI": f"sqlite:///{checkout}/mlflow.db", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    kept |= {"MLFLOW_DISABLE_TELEMETRY": "true", "COLA_CACHE": str(checkout / "cache"), **environment}
    command = [sys.executable, "-P", "-c", PREDICT, json.dumps(TEXTS)]
    return subprocess.run(command, cwd=tmp, env=kept, capture_output=True, text=True, check=False, timeout=120)


def expected(checkout: Path, model_folder: str = "merge/checkpoint") -> list[str]:
    """What a folder's model answers, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkout / ARTIFACTS / model_folder)
    tokenizer = AutoTokenizer.from_pretrained(checkout / ARTIFACTS / "fetch/model")
    answers = []
    for text in TEXTS:
        prompt = tokenizer(f"{text}\nIt was")["input_ids"]
        sums = {}
        for label, answer in LABELS.items():
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            sums[label] = sum(float(logs[len(prompt) - 1 + j, token]) for j, token in enumerate(ids))
        answers.append(max(sums, key=lambda label: sums[label]))
    return answers


def test_a_clean_process_without_network_predicts(registered: Path, tmp_path: Path) -> None:
    done = predict_elsewhere(registered, tmp_path)
    assert done.returncode == 0, done.stderr
    raw, texts = json.loads(done.stdout.splitlines()[-1])
    wanted = expected(registered)
    assert raw == texts == wanted
    assert wanted != expected(registered, "fetch/model"), "links that change no answer would prove nothing"


def test_a_base_that_is_not_in_the_cache_is_fetched_or_named_in_one_line(
    registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cola_core.predict import Predictor

    served = shutil.copytree(next((registered / "mlartifacts").rglob("serve.json")).parent, tmp_path / "served")
    monkeypatch.setenv("COLA_CACHE", str(tmp_path / "empty"))
    assert len(Predictor.load(served).predict([{"text": "made again from tiny:llama"}])) == 1
    serve = read_json(served / "serve.json")
    unknown = {**serve["base"], "hash": "0" * 64}
    write_sealed(served / "serve.json", "serve", {**serve, "base": unknown})
    with pytest.raises(UserError, match=r"tiny:llama \(000000000000\) is not in the cache, and what is fetched"):
        Predictor.load(served)
    write_sealed(served / "serve.json", "serve", {**serve, "base": {**unknown, "asset": "path:nowhere"}})
    with pytest.raises(UserError, match=r"is not in the cache and cannot be fetched: path:nowhere: no such file"):
        Predictor.load(served)


def test_the_version_knows_what_it_is(registered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{registered}/mlflow.db")
    monkeypatch.chdir(registered)
    (version,) = versions()
    chain = read_json(ARTIFACTS / "merge/chain.json")
    assert version.tags["cola.chain"] == chain["hash"]
    assert (version.tags["cola.recipe"], version.tags["cola.n"]) == ("cola_gora", "8")
    assert version.description.startswith("# cola-moods")
    with open_store() as store:
        assert store.client.get_model_version_by_alias("cola-moods", "challenger").version == version.version
        model = store.client.get_logged_model(version.source.rpartition("/")[2])
        logged = {metric.key: metric.value for metric in model.metrics or []}
        assert logged == {"n": 8.0, "accuracy": 0.8, "macro_f1": 0.75}
        assert model.name == "cola_gora-m2-seed0", "told from other models where they stand side by side"
        assert (model.params or {})["recipe"] == "cola_gora"
        assert store.client.get_run(str(model.source_run_id)).info.run_name == "evaluate"
    stored = list((registered / "mlartifacts").rglob("*.safetensors"))
    assert {path.parent.name for path in stored} == {"adapter"}, "only adapters are stored, never the base"
    told = read_json(ARTIFACTS / "register/registration.json")
    wanted = {"name": "cola-moods", "version": "1", "chain": chain["hash"], "alias": "challenger"}
    assert wanted.items() <= told.items()


def test_the_same_chain_never_makes_a_second_version(checkout: Path) -> None:
    register.main(context_of(checkout))
    sync()
    assert len(versions()) == 1


def register_a_shorter_chain(checkout: Path) -> None:
    shutil.rmtree(link_dir("2"))
    context = context_of(checkout)
    context.raw |= {"final": "1", "chain": {"1": context.raw["chain"]["1"]}}
    merge.main(context)
    register.main(context)


def test_another_chain_makes_the_next_version_and_takes_the_alias(checkout: Path) -> None:
    register_a_shorter_chain(checkout)
    assert len(versions()) == 2
    with open_store() as store:
        assert int(store.client.get_model_version_by_alias("cola-moods", "challenger").version) == 2


STEPS = ["log_model_artifacts", "log_model_artifact", "create_model_version", "finalize_logged_model"]


@pytest.mark.parametrize("step", STEPS)
def test_killed_while_registering_the_next_call_makes_one_version(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    (version,) = versions()
    with open_store() as store:
        store.client.delete_registered_model("cola-moods")
        store.client.delete_logged_model(version.source.rpartition("/")[2])
    context = context_of(checkout)
    with monkeypatch.context() as patch:
        patch.setattr(f"mlflow.MlflowClient.{step}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            register.main(context)
    register.main(context)
    assert len(versions()) == 1
    with open_store() as store:
        experiment = store.experiment("cola-moods")
        models = store.client.search_logged_models([experiment])
    assert [model.status for model in models] == ["READY"]


def test_sync_makes_a_version_again_that_was_lost_with_its_store(checkout: Path) -> None:
    from cola_core.predict import Predictor

    (checkout / "mlflow.db").unlink()
    shutil.rmtree(checkout / "mlartifacts", ignore_errors=True)
    assert sync() == 2
    assert len(versions()) == 1
    (served,) = [path.parent for path in (checkout / "mlartifacts").rglob("serve.json")]
    assert Predictor.load(served).predict([{"text": text} for text in TEXTS]) == expected(checkout)


def test_a_lost_store_gets_the_versions_of_workspaces_too(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(checkout / ARTIFACTS, checkout / ".cola/workspaces/run" / ARTIFACTS)
    register_a_shorter_chain(checkout)
    before = {version.version: version.tags["cola.chain"] for version in versions()}
    (checkout / "mlflow.db").unlink()
    shutil.rmtree(checkout / "mlartifacts")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")  # is the checkout's, whatever is read for it
    sync()
    assert {version.version: version.tags["cola.chain"] for version in versions()} == before and len(before) == 2
    assert len(list((checkout / "mlartifacts").rglob("MLmodel"))) == 2
    assert [path.parent for path in checkout.rglob("mlflow.db")] == [checkout]
    with open_store() as store:
        assert int(store.client.get_model_version_by_alias("cola-moods", "challenger").version) == 2
        store.client.delete_model_version("cola-moods", "1")
    sync()
    assert len(versions()) == 1, "what a user deleted stays deleted"


def test_a_version_that_lost_its_files_alone_gets_them_back(checkout: Path) -> None:
    (checkout / "mlflow.db").unlink()  # the copied one keeps its artifacts elsewhere
    sync()
    shutil.rmtree(checkout / "mlartifacts")
    sync()
    assert len(versions()) == 1 and len(list((checkout / "mlartifacts").rglob("MLmodel"))) == 1


def test_nothing_damaged_or_trained_anew_is_registered(checkout: Path) -> None:
    weights = checkout / "artifacts/links/1/adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"adapter_model.safetensors: changed since it was written"):
        pack_into(checkout / "packed1")
    weights.write_bytes(whole)
    folder = link_dir("2")
    record = read_sealed(folder / "link.json", "link")
    write_sealed(folder / "link.json", "link", {**record, "tokens": record["tokens"] + 1})
    with pytest.raises(UserError, match=r"chain.json: tells of another chain than the links beside it"):
        pack_into(checkout / "packed2")


def pack_into(folder: Path) -> None:
    found = read_release()
    assert found
    pack(found[0], folder)


def test_damage_in_merged_weights_is_found_before_they_are_served(checkout: Path, tmp_path: Path) -> None:
    from cola_core.predict import Predictor

    found = read_release()
    assert found
    pack(replace(found[0], merged=True), tmp_path / "served")
    assert Predictor.load(tmp_path / "served").predict([{"text": text} for text in TEXTS]) == expected(checkout)
    weights = tmp_path / "served/checkpoint/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model.safetensors: changed since it was written"):
        Predictor.load(tmp_path / "served")


def test_sync_killed_anywhere_while_it_registers_again_makes_one_version(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From a store that has lost everything, each call gets a little further than the one before."""
    (checkout / "mlflow.db").unlink()
    shutil.rmtree(checkout / "mlartifacts", ignore_errors=True)
    command, patience, killed = [sys.executable, "-m", "tasks.sync"], 2.0, 0
    temporary = tmp_path_factory.mktemp("tmp")
    mine = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(temporary)}
    subprocess.run(
        [sys.executable, "-c", "from tasks.sync import open_store as o\nwith o(): pass"], env=mine, check=True
    )
    while True:
        child = subprocess.Popen(command, env=mine, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            told = child.communicate(timeout=patience)[0]
            break
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            patience, killed = 1.2 * patience, killed + 1
    assert child.returncode == 0 and killed >= 3, told
    (version,) = versions()
    assert version.tags["cola.accuracy"] and version.tags["cola.whole"]
    with open_store() as store:
        assert store.client.get_model_version_by_alias("cola-moods", "challenger").version == version.version
        found = store.client.search_runs([store.experiment("cola-moods")])
    assert sorted(run.data.tags["cola.stage"] for run in found) == ["evaluate", "register"]
    assert all(run.info.status == "FINISHED" and "cola.posted" in run.data.tags for run in found)
    assert list(checkout.rglob("serve.json")) and not list(checkout.rglob(".*.cola-tmp"))
    assert not list(temporary.iterdir())


def test_the_same_chain_in_another_form_is_the_next_version(checkout: Path) -> None:
    context = context_of(checkout)
    for merged in (False, True, True):
        context.raw["register"] = {"name": "two-forms", "merged": merged}
        register.main(context)
    assert len(versions("two-forms")) == 2
    stored = sorted(path.parent.name for path in (checkout / "mlartifacts/two-forms").rglob("*.safetensors"))
    assert stored == ["adapter", "adapter", "checkpoint"]


def test_the_version_has_the_scores_of_the_last_evaluation(checkout: Path) -> None:
    metrics = read_json(ARTIFACTS / "evaluate/metrics.json")
    write_json(ARTIFACTS / "evaluate/metrics.json", {**metrics, "accuracy": 0.25})
    seal_folder(ARTIFACTS / "evaluate")
    register.main(context_of(checkout))
    (version,) = versions()
    assert version.tags["cola.accuracy"] == "0.25"


def test_a_merged_checkpoint_has_the_settings_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)
    make_artifacts("bert", "encoder")
    base, merged = (read_json(ARTIFACTS / part / "config.json") for part in ("fetch/model", "merge/checkpoint"))
    assert base["hidden_dropout_prob"] == merged["hidden_dropout_prob"] == 0.1
    assert merged["id2label"] == {"0": "good", "1": "poor"}
    assert "transformers_version" not in merged


def test_merged_weights_are_stored_only_when_asked_for(checkout: Path, tmp_path: Path) -> None:
    context = context_of(checkout)
    context.raw["register"] = {"name": "merged-moods", "merged": True}
    register.main(context)
    assert [p.name for p in (checkout / "mlartifacts/merged-moods").rglob("*.safetensors")] == ["model.safetensors"]
    from cola_core.predict import Predictor

    folder = next((checkout / "mlartifacts/merged-moods").rglob("serve.json")).parent
    rows = [{"text": text} for text in TEXTS]
    assert Predictor.load(folder).predict(rows) == expected(checkout)


@pytest.mark.parametrize(("family", "kind"), [("t5", "seq2seq"), ("bert", "encoder")])
def test_other_kinds_predict_what_their_checkpoint_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    from cola_core.predict import Predictor
    from tasks.release import gather, pack

    enter(tmp_path, monkeypatch)
    context = make_artifacts(family, kind)
    release = gather(context)
    pack(release, tmp_path / "links-form")
    context.raw["register"]["merged"] = True
    pack(gather(context), tmp_path / "merged-form")
    rows = [{"text": text} for text in TEXTS]
    links, merged = (Predictor.load(tmp_path / form).predict(rows) for form in ("links-form", "merged-form"))
    assert links == merged
    assert f"# {release.name}" in card(context)


def test_a_wrong_row_is_told_by_its_number(registered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cola_core.predict import Predictor

    monkeypatch.setenv("COLA_CACHE", str(registered / "cache"))
    folder = next((registered / "mlartifacts").rglob("serve.json")).parent
    predictor = Predictor.load(folder)
    with pytest.raises(UserError, match=r"row 2: prepare.prompt: no column 'text'"):
        predictor.predict([{"text": "fine"}, {"txt": "wrong"}])
    with pytest.raises(UserError, match="row 1: the template and answer alone need"):
        predictor.predict([{"prompt": "long " * 100}])
    assert len(predictor.predict([{"text": "long " * 100}])) == 1


def test_the_cache_is_filled_from_the_checkout(checkout: Path) -> None:
    shutil.rmtree(checkout / "cache")
    digest = read_json(ARTIFACTS / "merge/chain.json")["base"]["hash"]
    assert find_base(digest) is None
    register.main(context_of(checkout))
    assert find_base(digest) is not None
