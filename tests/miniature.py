"""A quick DVC project with this repository's conf/, params.yaml and stage runner, for tests of flows/."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

DVC = """
stages:
  fetch:
    cmd: python -m tasks.fetch
    deps: [tasks/fetch.py]
    params: [seed]
    outs: [artifacts/fetch]
  allocate:
    foreach: ${chain}
    do:
      cmd: python -m tasks.allocate ${key}
      deps: [artifacts/fetch, tasks/allocate.py]
      params: [link, "chain.${key}.link"]
      outs: ["artifacts/links/${key}/ranks.json"]
  evaluate:
    cmd: python -m tasks.evaluate
    deps: ["artifacts/links/${final}/ranks.json", tasks/evaluate.py]
    params: [evaluate]
    outs: [artifacts/evaluate]
  register:
    cmd: python -m tasks.register
    deps: [artifacts/evaluate, tasks/register.py]
    outs:
      - artifacts/register:
          cache: false
"""

# `weather` is a folder outside the project: every stage notes there that it ran, and fails while it is told to.
TASK = '''"""Stand in for {name}: write its outs, unless the weather says otherwise."""

import json
import os
import time
from pathlib import Path

from cola_core.errors import RetryError, UserError
from tasks.context import Context, Done
from tasks.stage import run

RETRIES = {retries}
WEATHER = Path(os.environ["MINIATURE_WEATHER"])
PIXEL = bytes.fromhex("{pixel}")


def main(context: Context) -> Done:
    with (WEATHER / "ran").open("a") as file:
        file.write(context.stage + "\\n")
    print(f"{{context.stage}} at work", flush=True)
    plan = WEATHER / "{name}.fails"
    codes = plan.read_text().split() if plan.exists() else []
    if codes:
        plan.write_text(" ".join(codes[1:]))
        if codes[0] == "sleep":
            time.sleep(60)
            (WEATHER / "woke").touch()
        while codes[0] == "hold" and not (WEATHER / "go").exists():
            time.sleep(0.05)
        if codes[0] != "hold":
            raise {{"75": RetryError, "2": UserError, "1": ZeroDivisionError}}[codes[0]]("no such luck: the " + "net")
    {body}
    return Done()


if __name__ == "__main__":
    run(main)
'''

PIXEL = (
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc000000301010018dd8db0"
    "0000000049454e44ae426082"
)

BODIES = {
    "fetch": """
    Path("artifacts/fetch").mkdir(parents=True)
    Path("artifacts/fetch/data").write_text(f"data {context.value('seed')}")
""",
    "allocate": """
    path = Path("artifacts/links") / context.key / "ranks.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = context.raw["chain"][context.key]["link"]["steps"]
    path.write_text(json.dumps({"ranks": {"q": 4, "v": steps}, "importance": {"q": 0.5, "v": 1.5},
                                "budget": 800, "spent": 790}))
""",
    "evaluate": """
    folder = Path("artifacts/evaluate/figures")
    folder.mkdir(parents=True)
    scores = {"n": 10, "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95,
              "macro_f1": 0.7, "macro_f1_low": 0.6, "macro_f1_high": 0.8}
    (folder.parent / "metrics.json").write_text(json.dumps(
        {**scores, "base": scores, "majority": scores, "prefixes": {"1": scores, "2": scores}}))
    (folder / "losses.png").write_bytes(PIXEL)
""",
    "register": """
    Path("artifacts/register").mkdir(parents=True)
    Path("artifacts/register/README.md").write_text("registered")
""",
}


def make(folder: Path) -> Path:
    """A committed miniature in `folder`/project, its weather in `folder`/weather; returns the project."""
    root = folder / "project"
    (folder / "weather").mkdir(parents=True)
    for name in ("conf", "cola_core", "tasks"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    (root / "params.yaml").write_bytes(git(REPOSITORY, "show", "HEAD:params.yaml"))
    (root / "dvc.yaml").write_text(DVC)
    (root / ".gitignore").write_text((REPOSITORY / ".gitignore").read_text() + "/secret*\n")
    for name, body in BODIES.items():
        text = TASK.format(name=name, body=body.strip(), retries=2 if name == "fetch" else 0, pixel=PIXEL)
        (root / "tasks" / f"{name}.py").write_text(text)
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "config", "user.email", "test@localhost")
    git(root, "config", "user.name", "test")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "A miniature")
    return root


def git(root: Path, *arguments: str) -> bytes:
    """What a git command prints."""
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True).stdout


def weather(root: Path) -> Path:
    """The folder outside the project that its stages look at."""
    return root.parent / "weather"


def ran(root: Path) -> list[str]:
    """The stages that really ran so far, in order."""
    note = weather(root) / "ran"
    return note.read_text().split() if note.exists() else []


def variables(root: Path, **more: str) -> dict[str, str]:
    """The environment in which children of a test run."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "MINIATURE_WEATHER": str(weather(root)), "PYTHONPATH": path, **more}
