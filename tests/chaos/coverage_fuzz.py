"""The same readers under atheris, which keeps every change that reaches new lines and breaks it further.

python -m tests.chaos.coverage_fuzz --kind json --runs 20000      what fails is kept, to be replayed by tests.chaos.fuzz
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

__all__ = ["main"]

WATCHED = ["cola_core", "flows.compose", "json", "yaml"]  # where new lines count; before them, nothing is imported


def main(arguments: list[str] | None = None) -> int:
    """Fuzz one kind until a file fails or `--runs` are done; atheris then ends the process itself."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.coverage_fuzz", description=__doc__)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--runs", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", type=Path, default=Path(tempfile.gettempdir()) / "cola-fuzz")
    asked = parser.parse_args(arguments)
    try:
        import atheris
    except ModuleNotFoundError:
        print("atheris is not installed: pip install -e .[chaos] (Linux on x86-64)", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=WATCHED):
        from tests.chaos.fuzz import HANG, judged
        from tests.chaos.readers import KINDS
    kind = KINDS[asked.kind]

    def read(data: bytes) -> None:
        verdict, line = judged(kind, data)
        if verdict == "failed":
            print(f"{line}\n  python -m tests.chaos.fuzz --kind {asked.kind} --replay the file named below")
            raise AssertionError(line)

    kind.read(_kept(asked.save / f"{asked.kind}.good" / kind.name, kind.seeds()[0]))  # slow imports, before any clock
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(kind.seeds()):
            _kept(Path(corpus) / str(number), seed)
        limits = [f"-runs={asked.runs}", f"-seed={asked.seed}", f"-timeout={HANG:g}", "-max_len=20000"]
        atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={asked.save}/{asked.kind}-", corpus], read)
        atheris.Fuzz()
    return 0


def _kept(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


if __name__ == "__main__":
    sys.exit(main())
