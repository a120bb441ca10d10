"""A real model with a real task, prepared by the project's own stages' code, for benchmarks to run on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cola_core.adapters import LoRA, Pair, attach
from cola_core.assets.base import base_folder
from cola_core.assets.references import opened
from cola_core.axes.parametrisations import SCALES
from cola_core.config.params import Params, check_params
from cola_core.config.reading import load_yaml
from cola_core.config.recipe import LinkConfig, MachineConfig, ProfileConfig, ScheduleConfig
from cola_core.data.encode import Codec, encode
from cola_core.data.examples import read_examples
from cola_core.data.prepared import write_prepared
from cola_core.data.splits import split
from cola_core.draws import draw_a
from cola_core.health import Course
from cola_core.models import adaptable, load_base, place, weight_shape
from cola_core.rows import Row, Task
from cola_core.scoring import Objective
from cola_core.split_files import read_rows
from cola_core.targets import select_targets
from cola_core.train import Training
from flows.compose import compose

__all__ = ["ROOT", "Ours", "Setting", "setting"]

ROOT = Path(__file__).resolve().parents[1]
CONSTANT = {"warmup": 0.0, "decay": "linear", "clip": 1.0, "weight_decay": 0.0, "validate_every": 10**9}


@dataclass(frozen=True)
class Setting:
    """What a benchmark needs of a recipe: its parameters, the base and the prepared rows."""

    params: Params
    base: Path
    task: Task
    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    probe: Sequence[Row]

    @property
    def kind(self) -> str:
        """causal, seq2seq or encoder."""
        return self.params.fetch.model.kind

    def link(self, **changes: object) -> LinkConfig:
        """The recipe's link with the learning-rate shape that transformers' Trainer has by default."""
        return LinkConfig(**{**self.params.link, **CONSTANT, **changes})

    def profile(self, **changes: object) -> ProfileConfig:
        """The recipe's probe."""
        return ProfileConfig(**{**self.params.profile, **changes})

    def model(self, dtype: str = "fp32") -> PreTrainedModel:
        """A model of its own, frozen, on the CPU, as transformers loads it."""
        machine = MachineConfig(device="cpu", threads=torch.get_num_threads(), dtype=dtype)  # type: ignore[arg-type]
        return place(load_base(self.base, machine, len(self.task.labels)), machine)

    def objective(self, dtype: str = "fp32") -> Objective:
        """Such a model with its task, as this project trains it."""
        return Objective(self.model(dtype), self.kind, self.task)

    def pairs(self, objective: Objective, targets: str | list[str], rank: int) -> dict[str, Pair]:
        """Fresh pairs for all target modules: A from its seed, B zero."""
        modules = adaptable(objective.model)
        scale = SCALES[self.params.link["scale"]](self.params.link["alpha"], rank)
        found = {}
        for name in select_targets(modules, targets):
            out, columns = weight_shape(modules[name])
            found[name] = Pair(draw_a(0, 1, name, rank, columns).float(), torch.zeros(out, rank), scale)
        return found


def setting(folder: Path, task: str, model: str, *overrides: str) -> Setting:
    """Compose conf/ and do what fetch and prepare do, below `folder`.

    Raises:
        UserError, RetryError: as those stages.
    """
    picks = {"task": task, "model": model, "method": "cola_gora", "chain": None}
    params = check_params(load_yaml(compose(ROOT, picks, overrides)))
    base = base_folder(params.fetch.model.asset, params.fetch.model.sha256, params.fetch.model.kind)
    folder.mkdir(parents=True)
    files = []
    for name, asset in (("train", params.fetch.data.train), ("test", params.fetch.data.test)):
        if asset is not None:
            with opened(asset.asset, asset.sha256) as source:
                files.append(Path(shutil.copy(source, folder / f"{name}{source.suffix}")))
    examples = [read_examples(file, params.prepare) for file in files]
    splits = split(examples[0], examples[1] if files[1:] else None, params.prepare, params.seed)
    codec = Codec.load(base)
    encoded = {name: encode(part, params.prepare, codec) for name, part in splits.parts().items()}
    write_prepared(folder, encoded, params.prepare, codec, files, splits.duplicate_counts())
    read = {name: read_rows(folder / f"{name}.arrow") for name in ("train", "validation", "test", "probe")}
    return Setting(params, base, Task.read(folder / "task.json"), **read)


class Ours:
    """This project's training of one link, one step at a time."""

    def __init__(self, where: Setting, config: LinkConfig, pairs: dict[str, Pair], objective: Objective) -> None:
        self.objective = objective
        self.layers: dict[str, LoRA] = attach(objective.model, pairs)
        self.start(where, config, self.layers)

    def start(self, where: Setting, config: LinkConfig, layers: dict[str, LoRA]) -> None:
        """A new optimizer for the attached layers."""
        schedule = ScheduleConfig(kind="cola", learning_rate="restart", horizon=config.steps)
        self.training = Training(self.objective, layers, where.train, where.validation, Course(config, schedule, 0, 1))
        self.steps, self.losses = iter(self.training), list[float]()

    @property
    def rows(self) -> list[list[Row]]:
        """The rows of every step, in the order in which they are read."""
        return [[self.training.train[i] for i in step] for step in self.training.plan]

    def step(self) -> None:
        """One optimizer step; the loss and what it learned are kept for the checks."""
        self.losses.append(next(self.steps)["loss"])

    def loss(self, rows: Sequence[Row]) -> float:
        """Mean training loss of `rows` as the model stands."""
        with torch.no_grad():
            batch = self.objective.training_batch(rows)
            return float(self.objective(batch)) / self.objective.units(batch)

    def check(self, others: Sequence[float], tolerance: float = 2e-3) -> None:
        """What every comparison of training has to satisfy, or it compares nothing.

        The losses are those of the other side as far as both are known, every adapter has moved (so no gradient was
        zero), and the rows of the first step are fitted better than before it.

        Raises:
            AssertionError: it is not so.
        """
        assert others, "nothing to compare with"
        for ours, other in zip(self.losses, others, strict=False):
            assert abs(ours - other) <= tolerance * max(1.0, abs(other)), f"losses differ: {self.losses} and {others}"
        still = [name for name, layer in self.layers.items() if not _moved(layer.B)]
        assert not still, f"no gradient reached {still[0]}"
        assert self.loss(self.rows[0]) < self.losses[0], "the loss does not fall"


def _moved(b: Tensor) -> bool:
    return bool(b.detach().abs().sum() > 0)
