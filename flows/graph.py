"""The DAG as DVC resolves it from dvc.yaml: the only list of stages there is; flows ask for it, none repeats it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cola_core.config.base import read_yaml
from cola_core.config.params import check_chain
from cola_core.errors import RetryError, UserError

if TYPE_CHECKING:
    from dvc.repo import Repo

__all__ = ["Fate", "Stage", "plain_outs", "plan", "stages"]

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
    raw = read_yaml(root / "params.yaml")
    if "chain" in raw:
        check_chain(raw)
    with _opened(root) as repo:
        found = [Stage(stage.addressing, _after(repo, stage)) for stage in _ordered(repo)]
    _check_links(found, list(raw.get("chain", {})))
    return found


def plan(root: Path) -> dict[str, Fate]:
    """What `dvc repro` would do with each stage of the project at `root`, in topological order.

    run: start its command, as far as can be known (a stage after one that runs may yet be found in the run cache);
    restore: bring its outs back from the cache; keep: nothing changed.

    Raises:
        UserError: dvc.yaml or params.yaml cannot be read.
        RetryError: another process works on the same files.
    """
    fates: dict[str, Fate] = {}
    with _opened(root) as repo, repo.lock:
        for stage in _ordered(repo):
            upstream_runs = any(fates[name] == "run" for name in _after(repo, stage))
            fates[stage.addressing] = "run" if upstream_runs else _fate(repo, stage)
    return fates


def plain_outs(root: Path) -> list[Path]:
    """Outs that DVC does not keep in its cache, so that only a copy can carry them; relative to `root`."""
    with _opened(root) as repo:
        outs = [out for stage in _ordered(repo) for out in stage.outs if not out.use_cache]
        return [Path(out.fs_path).relative_to(repo.root_dir) for out in outs]


def _fate(repo: Repo, stage: Any) -> Fate:
    from dvc.stage.cache import RunCacheNotFoundError

    if not stage.changed():
        return "keep"
    if not stage.changed(allow_missing=True) and stage.outs_cached():
        return "restore"
    try:
        repo.stage_cache.restore(stage, dry=True)
    except (RunCacheNotFoundError, FileNotFoundError):
        return "run"
    return "restore"


def _ordered(repo: Repo) -> list[Any]:
    import networkx

    return list(networkx.dfs_postorder_nodes(repo.index.graph))


def _after(repo: Repo, stage: Any) -> tuple[str, ...]:
    return tuple(before.addressing for before in repo.index.graph.successors(stage))


def _check_links(found: list[Stage], wanted: list[str]) -> None:
    """DVC drops what it cannot template without a word; a stage that exists for one link must exist for all."""
    keyed: dict[str, list[str]] = {}
    for stage in found:
        if stage.key is not None:
            keyed.setdefault(stage.task, []).append(stage.key)
    for task, keys in keyed.items():
        if sorted(keys) != sorted(wanted):
            raise UserError(f"dvc.yaml: {task}: resolves to links {', '.join(keys)}; the chain has {', '.join(wanted)}")


@contextmanager
def _opened(root: Path) -> Iterator[Repo]:
    """The DVC project, with its errors told in one line and its own chatter off."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    log = logging.getLogger("dvc")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with Repo(str(root)) as repo:
            yield repo
    except LockError as error:
        raise RetryError(f"{root}: another process works here: {_line(error)}") from None
    except DvcException as error:
        raise UserError(f"{root.name}/dvc.yaml: {_line(error)}") from None
    finally:
        log.setLevel(level)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
