"""The DAG as DVC resolves it from dvc.yaml: the only list of stages there is; flows ask for it, none repeats it."""

from __future__ import annotations

from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cola_core.config.params import check_chain
from cola_core.config.reading import read_yaml
from cola_core.errors import UserError
from flows.project import project

if TYPE_CHECKING:
    from dvc.repo import Repo

__all__ = ["Fate", "Stage", "outline", "plan", "stages"]

Fate = Literal["run", "restore", "keep"]


@dataclass(frozen=True)
class Stage:
    """One stage of the resolved graph.

    name: its address in DVC, such as `link@2`; task: the stage without its link, `link`; after: names it waits for.
    """

    name: str
    after: tuple[str, ...]

    @property
    def task(self) -> str:
        """The name shared by dvc.yaml, params.yaml, tasks/ and Prefect."""
        return self.name.partition("@")[0]

    @property
    def key(self) -> str | None:
        """The link's key in the chain, none for a stage outside it."""
        return self.name.partition("@")[2] or None


def stages(root: Path) -> list[Stage]:
    """The stages of the project at `root`, each after those it depends on.

    Raises:
        UserError: dvc.yaml or params.yaml cannot be read, or they do not give the links that `chain` names.
    """
    links = _links(root)
    with project(root) as repo:
        found = _found(repo)
    _check_links(found, links)
    return found


def outline(root: Path) -> tuple[list[Stage], frozenset[str]]:
    """`stages`, and the names of those that `dvc repro` would do anything for or after, from one look at the project.

    Raises:
        UserError: as `stages`.
        RetryError: another process works on the same files.
    """
    links, due = _links(root), set[str]()
    with project(root) as repo, repo.lock:
        found = _found(repo)
        for stage in _ordered(repo):
            if not due.isdisjoint(_after(repo, stage)) or stage.changed():
                due.add(stage.name)
    _check_links(found, links)
    return found, frozenset(due)


def plan(root: Path) -> dict[str, Fate]:
    """What `dvc repro` would do with each stage of the project at `root`, in topological order.

    run: start its command, as far as can be known (a stage after one that runs may yet be found in the run cache);
    restore: bring its outs back from the cache; keep: nothing changed.

    Raises:
        UserError: dvc.yaml or params.yaml cannot be read.
        RetryError: another process works on the same files.
    """
    fates: dict[str, Fate] = {}
    with chdir(root), project(root) as repo, repo.lock:  # the run cache's stages are named from where one stands
        for stage in _ordered(repo):
            upstream_runs = any(fates[name] == "run" for name in _after(repo, stage))
            fates[stage.name] = "run" if upstream_runs else _fate(repo, stage)
    return fates


def _fate(repo: Repo, stage: Any) -> Fate:
    if not stage.changed():
        return "keep"
    unchanged = not stage.changed(allow_missing=True)
    return "restore" if (unchanged and stage.outs_cached()) or _in_run_cache(repo, stage) else "run"


def _in_run_cache(repo: Repo, stage: Any) -> bool:
    """Whether the same command has run with these dependencies before.

    DVC's own dry run looks with the dependencies of dvc.lock, not of now, and so finds the last run after any change.
    """
    if any(not dep.exists for dep in stage.deps):
        return False
    stage.save_deps()
    cached = repo.stage_cache._load(stage)
    return bool(cached) and repo.stage_cache._create_stage(cached, wdir=stage.wdir).outs_cached()


def _ordered(repo: Repo) -> list[Any]:
    """The stages that have a command, each after those it depends on; files under `dvc add` have none."""
    import networkx

    return [stage for stage in networkx.dfs_postorder_nodes(repo.index.graph) if stage.cmd]


def _found(repo: Repo) -> list[Stage]:
    return [Stage(stage.name, _after(repo, stage)) for stage in _ordered(repo)]


def _after(repo: Repo, stage: Any) -> tuple[str, ...]:
    return tuple(before.name for before in repo.index.graph.successors(stage) if before.cmd)


def _links(root: Path) -> list[str]:
    """The chain's links by params.yaml, checked."""
    raw = read_yaml(root / "params.yaml")
    if "chain" in raw:
        check_chain(raw)
    return list(raw.get("chain", {}))


def _check_links(found: list[Stage], wanted: list[str]) -> None:
    """DVC drops what it cannot template without a word; a stage that exists for one link must exist for all."""
    keyed: dict[str, list[str]] = {}
    for stage in found:
        if stage.key is not None:
            keyed.setdefault(stage.task, []).append(stage.key)
    for task, keys in keyed.items():
        if sorted(keys) != sorted(wanted):
            raise UserError(f"dvc.yaml: {task}: resolves to links {', '.join(keys)}; the chain has {', '.join(wanted)}")
