"""The same readers under atheris, which keeps every change that reaches new lines and breaks it further.

python -m tests.chaos.coverage_fuzz --kind json --runs 20000      what fails is kept, to be replayed by tests.chaos.fuzz
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.fuzz import HANG, judged
from tests.chaos.readers import KINDS

__all__ = ["main"]

READERS = (
    "cola_core.adapter_files",
    "cola_core.config",
    "cola_core.data",
    "json",
    "yaml",
    "csv",
    "jinja2",
    "flows.compose",
)


def main(arguments: list[str] | None = None) -> int:
    """Fuzz one kind until a file fails or `--runs` are done; atheris ends the process itself."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.coverage_fuzz", description=__doc__)
    parser.add_argument("--kind", choices=sorted(KINDS), required=True)
    parser.add_argument("--runs", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=Path(tempfile.gettempdir()) / "cola-fuzz")
    asked = parser.parse_args(arguments)
    try:
        import atheris  # for Linux alone
    except ModuleNotFoundError:
        print("atheris is not installed: pip install -e .[chaos]", file=sys.stderr)
        return 2
    _instrument(atheris)
    asked.save.mkdir(parents=True, exist_ok=True)
    kind = KINDS[asked.kind]

    def one(data: bytes) -> None:
        verdict, line = judged(kind, data)
        if verdict == "failed":
            print(f"{line}\n  python -m tests.chaos.fuzz --kind {asked.kind} --replay {asked.save}/{asked.kind}-...")
            raise AssertionError(line)

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(kind.seeds()):
            (Path(corpus) / str(number)).write_bytes(seed)
        options = [
            f"-runs={asked.runs}",
            f"-seed={asked.seed + 1}",
            f"-timeout={HANG:g}",
            "-max_len=20000",
            "-rss_limit_mb=6000",
        ]
        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={asked.save}/{asked.kind}-", corpus], one)
        atheris.Fuzz()
    return 0
