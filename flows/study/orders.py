"""What a cell's process is told to do: parameters composed from conf/, and the stages that dvc.yaml makes of them."""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cola_core.assets.cache import cache_root
from cola_core.config.params import Params, check_params, knot_of
from cola_core.config.reading import load_yaml
from cola_core.errors import UserError
from cola_core.files import new_file, scratch, tree_hash
from cola_core.study.design import PROBE_ROW, Cell, Design, Group
from cola_core.study.results import Result
from flows.compose import compose, defaults
from flows.project import project
from flows.snapshot import snapshot, unpacked
from tasks.cell import StageOrder
from tasks.places import home

__all__ = ["Orders", "Planned", "experiment_of", "planning", "record_id"]

CODE = ("cola_core", "tasks", "conf", "dvc.yaml")  # hand edits of params.yaml enter no study
LAST = {"sweep": "link@{final}", "test": "evaluate"}  # a sweep never sees the test rows
CHEAP = ["merge.checkpoint=false", "merge.flat_adapter=false", "merge.portable_adapter=false"]


@dataclass(frozen=True)
class Planned:
    """A cell of `study` ready to run: its parameters, the overrides that compose it, and its stages in order."""

    study: str
    cell: Cell
    overrides: list[str]
    raw: Mapping[str, Any]
    stages: list[StageOrder]

    @property
    def params(self) -> str:
        """Its params.yaml."""
        return yaml.safe_dump(self.raw, sort_keys=False)

    @cached_property
    def key(self) -> str:
        """A hash of the parameters that the stages depend on: no other edit, such as of the gate's, changes a cell."""
        used = {dotted: value for stage in self.stages for dotted, value in stage.values(self.raw).items()}
        return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()

    @property
    def command(self) -> str:
        """What runs the cell again under DVC: as far as the sweep goes, or to the registry."""
        words = [word for override in self.overrides for word in ("-S", override)]
        return shlex.join(
            ["dvc", "exp", "run", *words, *([self.stages[-1].name] if self.cell.phase == "sweep" else [])]
        )

    def order(self, folder: Path) -> dict[str, Any]:
        """The line for a cell's process."""
        record = {
            "id": record_id(self.study, self.key),
            "name": self.cell.name,
            "experiment": experiment_of(self.study),
            "used": {"phase": self.cell.phase, "command": self.command},
        }
        return {"folder": str(folder), "stages": [asdict(stage) for stage in self.stages], "record": record}


@dataclass
class Orders:
    """Plans cells of one study with the code and conf/ at `code`; scratch: a folder for DVC to look at."""

    design: Design
    code: Path
    scratch: Path
    composed: dict[Group, dict[str, Any]] = field(default_factory=dict)
    graphs: dict[str, list[StageOrder]] = field(default_factory=dict)

    def plan(self, cell: Cell) -> Planned:
        """A cell's parameters, those of its group with its own learning rate and seed.

        Raises:
            UserError: an unknown choice or key in the study's file, or values that do not compose.
        """
        raw = copy.deepcopy(self.of_group(cell.group))
        raw["link"]["learning_rate"], raw["seed"] = cell.learning_rate, cell.seed
        overrides = [
            *(*CHEAP, *self.design.overrides(cell.group), f"schedule.horizon={raw['schedule']['horizon']}"),
            *(f"link.learning_rate={cell.learning_rate!r}", f"seed={cell.seed}"),
        ]
        return Planned(self.design.name, cell, overrides, raw, self._stages(raw, LAST[cell.phase]))

    def makes(self, result: Result) -> bool:
        """Whether a result has the parameters that its cell has in the study now."""
        return result.cell.group in self.groups and self.plan(result.cell).key == result.content["key"]

    @cached_property
    def groups(self) -> set[Group]:
        """Every group of the study."""
        return set(self.design.groups())

    def of_group(self, group: Group) -> dict[str, Any]:
        """The parameters that a group's cells share; where probes are charged, its chain has fewer steps."""
        if group not in self.composed:
            overrides, steps = [*CHEAP, *self.design.overrides(group)], self.design.budget.steps
            raw = self._compose([*overrides, f"schedule.horizon={steps}"])
            if self.design.budget.charge and (spent := _probe_steps(check_params(raw))):
                raw = self._compose([*overrides, f"schedule.horizon={steps - spent}"])
            _refuse_unpinned(self.design.name, raw)
            self.composed[group] = raw
        return self.composed[group]

    def _compose(self, overrides: list[str]) -> dict[str, Any]:
        """Hydra takes a quarter of a second, so what it made of the same files is kept."""
        name = hashlib.sha256(json.dumps([self.conf, overrides]).encode()).hexdigest()[:32]
        kept = home() / "studies" / "composed" / f"{name}.yaml"
        if not kept.is_file():
            text = self._composed(overrides)
            with new_file(kept) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return load_yaml(kept.read_text(encoding="utf-8"))

    @cached_property
    def conf(self) -> str:
        """A hash of conf/."""
        return tree_hash(self.code / "conf")

    def _composed(self, overrides: list[str]) -> str:
        try:
            return compose(self.code, {}, overrides)
        except UserError as error:
            raise UserError(f"{self.design.name}: {' '.join(overrides)}: {error}") from None

    def _stages(self, raw: dict[str, Any], last: str) -> list[StageOrder]:
        """The stages up to `last`; a graph depends on the chain alone, so DVC is asked once for every chain."""
        shape = json.dumps(
            [raw["final"], {key: [i["prev"], i["profile_from"]] for key, i in raw["chain"].items()}, last]
        )
        if shape not in self.graphs:
            (self.scratch / ".dvc").mkdir(exist_ok=True)
            (self.scratch / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n", "utf-8")
            (self.scratch / "dvc.yaml").write_bytes((self.code / "dvc.yaml").read_bytes())
            (self.scratch / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
            self.graphs[shape] = list(_orders(self.scratch, last.format(final=raw["final"])))
        return self.graphs[shape]


@contextmanager
def planning(design: Design, root: Path) -> Iterator[Orders]:
    """Orders by the checkout's code and conf/ as they stand now, whatever is edited during the block."""
    with unpacked(root, snapshot(root, False), *CODE) as code, scratch(cache_root(), "study") as looks:
        (code / "params.yaml").write_text(defaults(code), encoding="utf-8")
        yield Orders(design, code, looks)


def experiment_of(study: str) -> str:
    """The name of a study's experiment in MLflow."""
    return f"study-{study}"


def record_id(study: str, key: str) -> str:
    """The id of a cell's record: the same cell of the same study is posted to MLflow once."""
    return hashlib.sha256(f"{study} {key}".encode()).hexdigest()[:16]


def _refuse_unpinned(study: str, raw: Mapping[str, Any]) -> None:
    """Results outlive the files that they came from, so a study says which bytes it means."""
    for name, data in raw["fetch"]["data"].items():
        if data and data["asset"].startswith("path:") and not data.get("sha256"):
            raise UserError(f"{study}: fetch.data.{name}.sha256: missing; a study pins its files, {data['asset']} too")


def _probe_steps(params: Params) -> int:
    """Training steps that cost as much as the chain's probes."""
    knots = {key: knot_of(params, key) for key, item in params.chain.items() if item.profile_from == key}
    probes = [knot for knot in knots.values() if knot.profile.probe != "none"]
    return sum(round(PROBE_ROW * params.prepare.probe / knot.link.batch) for knot in probes)


def _orders(folder: Path, last: str) -> Iterator[StageOrder]:
    """Every stage that `last` needs, each after those it needs itself."""
    import networkx

    with project(folder) as repo:
        graph = repo.index.graph
        stages = {stage.name: stage for stage in networkx.dfs_postorder_nodes(graph) if stage.cmd}
        if last not in stages:
            raise UserError(f"dvc.yaml: has no stage {last}")
        needed = networkx.descendants(graph, stages[last]) | {stages[last]}
        for stage in stages.values():
            if stage in needed:
                before = networkx.descendants(graph, stage) | {stage}
                shared = not any(each.name.startswith(("link@", "merge")) for each in before)
                files = [dep for dep in stage.deps if not hasattr(dep, "params")]
                params = [dotted for dep in stage.deps if hasattr(dep, "params") for dotted in dep.params]
                yield StageOrder(
                    *(stage.name, params, [dep.def_path for dep in files], [out.def_path for out in stage.outs], shared)
                )
