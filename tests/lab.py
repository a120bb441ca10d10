"""What the law tests share: tiny real models of every family, random rows, and chains trained on them."""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola_core.adapters import detach
from cola_core.assets.base import base_folder
from cola_core.axes.initialisers import Start
from cola_core.chain import write_link
from cola_core.config.recipe import LinkConfig, MachineConfig, ProfileConfig, ScheduleConfig
from cola_core.job import LinkJob
from cola_core.knot import open_chain
from cola_core.lineage import Link, read_chain
from cola_core.links import run_link
from cola_core.models import adaptable, head_parameters, weight_shape
from cola_core.root import write_root
from cola_core.rows import Row, Task
from cola_core.start import first_layers, first_pairs

KINDS = {"llama": "causal", "opt": "causal", "gpt2": "causal", "t5": "seq2seq", "bert": "encoder"}
FAMILIES = list(KINDS)
CANDIDATES = [[11, 12, 13], [21], [31, 32]]
FP64 = MachineConfig(device="cpu", threads=1, dtype="fp64")
FP32 = MachineConfig(device="cpu", threads=1, dtype="fp32")
LINK = LinkConfig(
    initialiser="kaiming", parametrisation="plain", scale="lora", update="adamw", pruning="none", quantise="none",
    alpha=16.0, dropout=0.0, base_dropout=0.0, bias="none", steps=6, batch=4, micro_batch=4, micro_tokens=None,
    learning_rate=5e-3, head_learning_rate=1e-3, betas=[0.9, 0.999], epsilon=1e-8, weight_decay=0.01, clip=1.0,
    warmup=0.2, decay="linear", floor=0.0, keep="last", keep_link="always", validate_every=3, patience=None,
    checkpoint_every=2, activation_checkpointing=False,
)  # fmt: skip
PROFILE = ProfileConfig(
    probe="one_batch", importance="mean_abs_wg", directions=["sketch"], sketch=8, micro_batch=1, row_share=0.25,
    adaptive=False, tolerance=0.1, gap_radius=1.0, activation_checkpointing=False,
)  # fmt: skip


CACHE = tempfile.TemporaryDirectory(prefix="cola-test-cache-")


@functools.cache
def base_of(family: str) -> Path:
    """The tiny base of a family, made once per test process in a cache of its own."""
    os.environ["COLA_CACHE"] = CACHE.name
    try:
        return base_folder(f"tiny:{family}", None, KINDS[family])
    finally:
        del os.environ["COLA_CACHE"]


def task_of(family: str, loss: str = "answer") -> Task:
    """Three labels; language models score candidates of three, one and two tokens."""
    classify = KINDS[family] == "encoder"
    return Task(
        kind="classify" if classify else "choice",
        loss=loss,
        score="sum",
        labels=["a", "b", "c"],
        candidates=[] if classify else CANDIDATES,
        pad=1,
        end=None,
        start=0 if KINDS[family] == "seq2seq" else None,
        max_new_tokens=4,
        extract=None,
    )


def rows_of(family: str, count: int, seed: int = 0) -> list[Row]:
    """Random prompts of 4 to 12 tokens with random labels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, n: int = 1) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    rows = []
    for index in range(count):
        label = draw(0, 3)[0]
        answer = [] if KINDS[family] == "encoder" else CANDIDATES[label]
        rows.append(Row(f"train:{index + 1}", draw(40, 200, draw(4, 13)[0]), answer, label, "abc"[label]))
    return rows


def root_of(family: str, folder: Path) -> list[Link]:
    """Link 0 under `folder`; an encoder gets a random head."""
    head: dict[str, Tensor] = {}
    if KINDS[family] == "encoder":
        model = _bare(family)
        generator = torch.Generator().manual_seed(5)
        head = {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in head_parameters(model).items()}
    write_root(folder / "links/0/adapter", base_of(family), 3, head)
    return read_chain(folder / "links/0/adapter")


def _bare(family: str) -> Any:
    from cola_core.models import load_base

    return load_base(base_of(family), FP32, 3)


def job_of(family: str, chain: list[Link], machine: MachineConfig = FP64, **changes: Any) -> LinkJob:
    """A link of a few steps; `changes` go to the fields of LinkConfig, or of LinkJob where it has them."""
    mine = {name: value for name, value in changes.items() if name in LinkJob.__dataclass_fields__}
    config = LinkConfig(**{**LINK.model_dump(), **{k: v for k, v in changes.items() if k not in mine}})
    shapes = {name: weight_shape(m) for name, m in adaptable(_bare(family)).items()}
    # Different ranks on purpose: a rank or a scale that is read from the wrong module shows.
    ranks = {name: 1 + index % 4 for index, name in enumerate(shapes)}
    job = LinkJob(
        base=base_of(family),
        chain=chain,
        task=task_of(family),
        machine=machine,
        schedule=ScheduleConfig(kind="cola", learning_rate="restart", horizon=config.steps * len(chain)),
        config=config,
        seed=7,
        ranks=ranks,
        directions={},
        train=rows_of(family, 16),
        validation=rows_of(family, 6, seed=1),
    )
    return replace(job, **mine)


def grow(job: LinkJob, folder: Path) -> list[Link]:
    """Train one more link and return the longer chain, read back from its files."""
    adapter, record, _ = run_link(job)
    path = folder / f"links/{len(job.chain)}/adapter"
    write_link(path, adapter, record, {"losses.csv": "step,loss,learning_rate,tokens,validation\n"})
    return read_chain(path)


def chain_of(family: str, folder: Path, links: int, machine: MachineConfig = FP64, **changes: Any) -> list[Link]:
    """A chain of `links` trained links under `folder`."""
    chain = root_of(family, folder)
    for _ in range(links):
        chain = grow(job_of(family, chain, machine, **changes), folder)
    return chain


def initial_pairs(model: Any, job: LinkJob) -> dict[str, Any]:
    """What a link starts from, module -> Pair; the model is as it was."""
    first_layers(model, job, first_pairs(model, job))
    return detach(model)


def start_of(
    weight: Tensor, rank: int, scale: float, directions: dict[str, Tensor] | None = None, seed: int = 0, link: int = 1
) -> Start:
    """What an initialiser is given for a module `m` of these weights."""
    return Start(weight, rank, scale, directions or {}, [], seed, link, "m")


def die_after(step: int, how: type[BaseException], seen: list[int] | None = None) -> Any:
    """A report for `run_link` that raises after a step; `seen` takes the steps that were reported."""

    def report(event: dict[str, Any]) -> None:
        if seen is not None:
            seen.append(event["step"])
        if event["step"] == step:
            raise how

    return report


def logits_of(model: Any, family: str, rows: list[Row]) -> list[Tensor]:
    """Every logit of every row, one row at a time: no batching, no masks, none of the project's own scoring."""
    found = []
    with torch.no_grad():
        for row in rows:
            inputs = {"input_ids": torch.tensor([row.prompt + row.answer])}
            if KINDS[family] == "seq2seq":
                inputs["decoder_input_ids"] = torch.tensor([[0, *row.answer]])
            found.append(model(**inputs).logits[0].double())
    return found


def model_of(family: str, chain: list[Link], machine: MachineConfig = FP64) -> Any:
    """Base + chain, merged."""
    return open_chain(base_of(family), chain, task_of(family), machine).model
