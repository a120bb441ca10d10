"""The lock, the pins that keep the stack alive or its assets what they are, and the choices of conf/."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cola_core.config.params import check_params
from flows.compose import choices, compose

ROOT = Path(__file__).parent.parent


def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return content


def lock() -> dict[str, Version]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    requirements = [Requirement(line) for line in lines]
    for requirement in requirements:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), f"{requirement} is not pinned exactly"
    return {canonicalize_name(r.name): Version(str(r.specifier)[2:]) for r in requirements}


def test_the_lock_covers_every_dependency_within_its_range() -> None:
    pinned = lock()
    for line in [*project()["dependencies"], *project()["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in requirements.lock"
        assert pinned[name] in requirement.specifier, f"{name}: {pinned[name]} is outside {requirement.specifier}"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("sqlalchemy", ">=2.0,<2.1"),
        ("fastapi", "<0.151"),
        ("prefect", "==3.8.8"),
        ("mlflow", "==3.17.2"),
        ("torch", "==2.13.0"),
        ("transformers", "==5.23.0"),
        ("datasets", "==5.2.0"),
        ("dvc", "==3.67.1"),
        ("peft", "==0.21.2"),
    ],
)
def test_the_pins_that_matter_hold(name: str, allowed: str) -> None:
    version = lock()[name]
    assert version in Requirement(f"{name}{allowed}").specifier
    assert version.local is None, f"{name}: a build tag such as +cpu would tie the lock to one index"


def test_peft_is_a_peer_of_the_tests_only() -> None:
    assert not [line for line in project()["dependencies"] if Requirement(line).name == "peft"]


def test_no_file_of_the_environment_names_an_index_or_a_folder() -> None:
    for name in ("requirements.lock", "pyproject.toml"):
        assert not re.search(r"(?m)^\s*(-e|--|file:)|@ file|/opt/|/tmp/", (ROOT / name).read_text()), name


@pytest.mark.parametrize("model", choices(ROOT, "model"))
def test_every_model_composes_with_the_default_task(model: str) -> None:
    params = yaml.safe_load(compose(ROOT, {"model": model, "task": "r8"}))
    encoder = params["fetch"]["model"]["kind"] == "encoder"
    assert params["prepare"]["kind"] == ("classify" if encoder else "choice")
    check_params(params)


# The hub could not be reached when these were written, so neither a hash nor a commit of them is known. Fetching one
# prints what to write; SuperGLUE's parquet files lie on a branch that the hub itself makes.
UNPINNED = {
    "hub:HuggingFaceTB/SmolLM2-360M@main",
    *(
        f"hub:datasets/aps/super_glue@refs/convert/parquet/{name}/{part}/0000.parquet"
        for name in ("cb", "multirc", "wic", "wsc.fixed")
        for part in ("train", "validation")
    ),
}


def assets(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "asset" in node:
            yield node
        for inner in node.values():
            yield from assets(inner)


def test_every_asset_of_conf_is_pinned() -> None:
    files = [ROOT / "params.yaml", *(ROOT / "conf").rglob("*.yaml")]
    found = [one for file in files for one in assets(yaml.safe_load(file.read_text()))]
    assert {one["asset"].split(":")[0] for one in found} == {"pypi", "hub", "tiny", "???"}
    loose = set()
    for one in found:
        scheme, name = one["asset"].split(":")[0], one["asset"]
        hashed = one["sha256"] is not None and re.fullmatch("[0-9a-f]{64}", one["sha256"])
        by_commit = scheme == "hub" and re.search("@[0-9a-f]{40}(/|$)", name)
        if scheme in ("pypi", "hub", "path") and not hashed and not by_commit:
            loose.add(name)
    assert loose == UNPINNED
