"""The command line: quick help without heavy imports, one-line errors, exit codes 2 and 75."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from miniature import REPOSITORY, git, make, ran, variables
from safetensors.torch import save_file

from cola_core.assets.tiny import build_tiny
from cola_core.errors import RetryError, UserError
from cola_core.sealed import write_sealed
from flows.cli import main
from flows.sizes import sizes
from tasks.sync import NEEDED

HEAVY = {"torch", "transformers", "prefect", "mlflow", "dvc", "datasets", "hydra", "pandas", "pyarrow", "numpy"}
COMMANDS = ("plan", "run", "serve", "ui", "inspect", "export", "chain", "sync", "clean", "adopt")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cli"))


def cola(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *words]
    return subprocess.run(
        command, cwd=root, env=variables(root, PYTHONDONTWRITEBYTECODE="1"), capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "words", [["--help"], *([command, "--help"] for command in COMMANDS), ["chain", "verify", "--help"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        "import sys; from flows.cli import main\n"
        f"code = main({words!r})\n"
        "print('MODULES', *{name.split('.')[0] for name in sys.modules}); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split("MODULES")[1].split())


def test_help_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "flows.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(f" {command} " in done.stdout for command in COMMANDS)


MISTAKES = [
    (["rum"], "Did you mean 'run'"),
    (["run", "--metod", "cola"], "--method"),
    (["chain", "verfy"], "Did you mean 'verify'"),
]


@pytest.mark.parametrize(("words", "told"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistyped_words_are_told_what_was_meant(project: Path, words: list[str], told: str) -> None:
    done = cola(project, *words)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


REFUSED = [
    (["run", "--method", "gorra"], "did you mean 'gora'"),
    (["run", "-S", "link.step=3"], "did you mean 'steps'"),
    (["run", "-S", "chain.1.link.steps=3"], "schedule.horizon"),
    (["run", "-S", "link.steps=20"], "schedule.horizon"),
    (["run", "-S", "fetch.model.asset=pypi:a==1/b"], "override 'fetch.model.asset=pypi:a==1/b': "),
    (["adopt", "nothing"], "no such workspace"),
    (["export", "somewhere"], "dvc repro merge"),
    (["inspect", "nowhere.csv"], "no such file"),
    (["inspect", "params.yaml", "--task", "custm"], "did you mean 'custom'"),
    (["inspect", "params.yaml", "--task", "custom"], "prepare.answers: left to you"),
    (["inspect", "params.yaml", "--task", "custom", "-S", "prepare.answers={no: a, yes: b}"], "cannot read '.yaml'"),
    (["chain", "verify"], "no chain here"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[" ".join(r[0]) for r in REFUSED])
def test_mistakes_are_one_line_and_write_nothing(project: Path, words: list[str], told: str) -> None:
    done = cola(project, *words)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, ""), done.stderr
    assert told in done.stderr
    assert git(project, "status", "--porcelain", "--ignored") == b"" and ran(project) == []


def test_a_chain_with_a_bare_number_is_refused_by_every_entry(project: Path) -> None:
    params = project / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("\n  '2':", "\n  2:"))
    try:
        for words in (["plan"], ["run"], ["chain", "verify"]):
            done = cola(project, *words)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), (words, done.stderr)
            assert "chain.2: the key must be quoted" in done.stderr
    finally:
        params.write_text(text)


def test_outside_a_checkout_is_one_line(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "GIT_CEILING_DIRECTORIES": str(tmp_path.parent),
    }
    command = [sys.executable, "-m", "flows.cli", "plan"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "git" in done.stderr


def test_what_may_succeed_later_ends_with_75(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flows.workspace.adopt", _fail(RetryError("the disk\nis away")))
    assert main(["adopt", "it"]) == 75
    assert capsys.readouterr().err == "the disk is away\n"
    monkeypatch.setattr("flows.workspace.adopt", _fail(UserError("no [bold] such thing")))
    assert main(["adopt", "it"]) == 2
    assert capsys.readouterr().err == "no [bold] such thing\n"


def test_clean_removes_nothing_whose_files_mlflow_does_not_have_yet(tmp_path: Path) -> None:
    root = make(tmp_path)
    workspace = root / ".cola" / "workspaces" / "done"
    workspace.mkdir(parents=True)
    workspace.with_name("done.lock").write_text("finished")
    record = root / ".cola" / "records" / "fetch-1.json"
    record.parent.mkdir()
    told = {"id": "1", "started": "2026-01-01T00:00:00+00:00", "experiment": "e"}
    record.write_text(json.dumps({key: [] for key in NEEDED} | told))
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    command = [sys.executable, "-m", "flows.cli", "clean"]
    done = subprocess.run(command, cwd=root, env=variables(root, **away), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (75, 1) and "127.0.0.1:9" in done.stderr
    assert workspace.is_dir()
    record.unlink()
    assert cola(root, "clean").returncode == 0 and not workspace.exists()


def test_what_the_disk_refuses_is_one_line(project: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "run"]
    mine = variables(project, COLA_CACHE="/proc/nope", PREFECT_HOME="/proc/nope", PREFECT_API_URL="")
    done = subprocess.run(command, cwd=project, env=mine, capture_output=True, text=True, check=False)
    assert done.returncode in (2, 75) and "Traceback" not in done.stderr and "/proc/nope" in done.stderr, done.stderr


def _fail(error: Exception):  # type: ignore[no-untyped-def]
    def fail(*_: object) -> None:
        raise error

    return fail


def test_plan_says_what_runs_and_what_is_not_known(project: Path) -> None:
    done = cola(project, "plan")
    assert done.returncode == 0, done.stderr
    for stage in ("fetch", "allocate@1", "allocate@2", "evaluate", "register"):
        assert stage in done.stdout
    assert done.stdout.count("runs") >= 5 and "known after" in done.stdout


ANSWERS = 'prepare.answers={no: " bad", yes: " good"}'


def test_a_file_is_inspected_before_anything_is_fetched(project: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("text,label\na fine film,yes\na dull one,no\na long one,no\n")
    done = cola(project, "inspect", str(file), "--task", "custom", "-S", ANSWERS, "--rows", "1")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == str(file)
    assert lines[:2] == ["  mine: 3 rows", "    labels: no 2 (66.7 %), yes 1 (33.3 %)"]
    assert lines[2:6] == ["", "mine:1 (label or reference: 'yes')", "a fine film", "Label:\u27e6 good\u27e7"]
    assert len(lines) == 7 and "`dvc repro fetch`" in lines[6]


def test_tokens_are_counted_by_the_chosen_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    (tmp_path / "params.yaml").write_bytes(git(REPOSITORY, "show", "HEAD:params.yaml"))
    (tmp_path / "mine.csv").write_text("text,label\na fine film,yes\na dull one,no\n")
    build_tiny("llama", tmp_path / "artifacts/fetch/model")
    write_sealed(tmp_path / "artifacts/fetch/model/cola.json", "base", {"kind": "causal", "asset": "tiny:llama"})
    monkeypatch.chdir(tmp_path)
    words = ["inspect", "mine.csv", "--task", "custom", "-S", ANSWERS]
    assert main([*words, "--model", "tiny"]) == 0
    assert "0 truncated, longest 24 tokens" in capsys.readouterr().out
    assert main([*words, "--model", "tiny_t5"]) == 0
    assert "holds tiny:llama, not tiny:t5" in (told := capsys.readouterr().out) and "truncated" not in told
    assert main([*words, "--model", "tiny_bert", "-S", "prepare.max_tokens=9"]) == 0
    assert "Label:\n" in capsys.readouterr().out  # a head has no answer to supervise


def test_the_files_of_a_sharded_model_are_counted_together(tmp_path: Path) -> None:
    model = tmp_path / "artifacts/fetch/model"
    model.mkdir(parents=True)
    write_sealed(model / "cola.json", "base", {"kind": "causal", "modules": {"layers.0.q": [4, 3]}})
    for number, rows in ((1, 5), (2, 7)):
        save_file({f"w{number}": torch.zeros(rows, 2)}, model / f"model-0000{number}-of-00002.safetensors")
    found = sizes(tmp_path)
    assert found is not None and found.weights == 24 and not found.shape.complete
