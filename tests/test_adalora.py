"""AdaLoRA beside PEFT's own allocator: the same scores, the same closed gates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn
from torch.nn import Parameter

from cola_core.adapters import LoRA, Pair
from cola_core.axes.parametrisations import PARAMETRISATIONS
from cola_core.axes.updates import build_optimizer
from cola_core.config.recipe import LinkConfig
from cola_core.errors import UserError
from cola_core.links import run_link
from cola_core.optimizers.adalora import budget
from tests.lab import LINK, root_of
from tests.points import job_at

OPTIONS = {"kind": "adalora", "rank": 2, "first": 2, "last": 4, "every": 3, "smoothing": 0.8, "orthogonal": 0.3}
STEPS = 14


class Peers:
    """Two modules of rank 4: our layers, and PEFT's parameters with the same numbers."""

    def __init__(self, **changes: int) -> None:
        torch.manual_seed(3)
        self.config = LinkConfig(
            **{**LINK.model_dump(), "update": {**OPTIONS, **changes}, "steps": STEPS, "learning_rate": 0.05}
        )
        self.layers, self.peft = {}, nn.Module()
        for name, (out, inner) in {"one": (7, 5), "two": (6, 9)}.items():
            layer = LoRA(
                nn.Linear(inner, out, dtype=torch.float64),
                Pair(torch.randn(4, inner).double(), torch.randn(out, 4).double(), 0.5),
            )
            PARAMETRISATIONS["gated"].prepare(layer, SimpleNamespace(start="normal"), len(self.layers))
            self.layers[name] = layer
            module = nn.Module()
            for part, value in (("lora_A", layer.A), ("lora_B", layer.B), ("lora_E", layer.gate[:, None])):
                setattr(module, part, nn.ParameterDict({"default": Parameter(value.detach().clone())}))
            setattr(self.peft, name, module)
        parts = [(f"{n}.{k}", k, p) for n, la in self.layers.items() for k, p in la.named_parameters(recurse=False)]
        self.optimizer: Any = build_optimizer(parts, self.config, self.layers)
        settings = SimpleNamespace(beta1=0.8, beta2=0.8, target_r=2, tinit=2, tfinal=4, total_step=STEPS, deltaT=3)
        self.allocator = RankAllocator(self.peft, settings, "default")

    def loss(self, parts: Any) -> torch.Tensor:
        return sum(
            (torch.sin(3 * b @ torch.diag(g.reshape(-1)) @ a) * (k + 1)).sum() for k, (a, b, g) in enumerate(parts)
        )  # type: ignore[return-value]

    def ours(self) -> Any:
        return [(la.A, la.B, la.gate) for la in self.layers.values()]

    def theirs(self) -> Any:
        return [(m.lora_A["default"], m.lora_B["default"], m.lora_E["default"]) for m in self.peft.children()]


def test_scores_and_closed_gates_are_pefts() -> None:
    both = Peers()
    flat = [p for parts in both.theirs() for p in parts]
    c = both.config
    reference = torch.optim.AdamW(flat, lr=0.05, betas=(0.9, 0.999), eps=c.epsilon, weight_decay=c.weight_decay)
    closed = []
    for step in range(1, STEPS + 1):

        def read(rows: Any) -> tuple[float, int]:
            both.loss(both.ours()).backward()
            return 0.0, 0

        both.optimizer.zero_grad()
        both.optimizer.collect([], read)
        both.optimizer.step()
        reference.zero_grad()
        skew = [torch.linalg.matrix_norm(f @ f.T - torch.eye(4)) for a, b, _ in both.theirs() for f in (a, b.T)]
        (both.loss(both.theirs()) + 0.3 * sum(skew) / len(skew)).backward()
        reference.step()
        both.allocator.update_and_allocate(both.peft, step, force_mask=step == STEPS - 4)  # as AdaLoraModel does
        for (a, b, g), (ta, tb, tg) in zip(both.ours(), both.theirs(), strict=True):
            torch.testing.assert_close(g, tg.reshape(-1), atol=1e-9, rtol=0)
            torch.testing.assert_close(a, ta, atol=1e-9, rtol=0)
            torch.testing.assert_close(b, tb, atol=1e-9, rtol=0)
        for name, layer in both.layers.items():
            e, a, b = (both.allocator._element_score(f"{name}.lora_{part}.default") for part in "EAB")
            vectors = torch.cat([a.mean(1, keepdim=True), b.mean(0).view(-1, 1)], dim=1)
            theirs = both.allocator._combine_ipt(e, vectors)
            torch.testing.assert_close(both.optimizer._score(layer), theirs, atol=1e-12, rtol=1e-9)
        closed.append(sum(int((g == 0).sum()) for _, _, g in both.ours()))
    assert closed[-1] == 4 and closed[0] == 0 and max(closed) == 4 and len(set(closed)) > 2


@pytest.mark.parametrize(("last", "every"), [(0, 3), (1, 5), (4, 100)])
def test_the_last_steps_keep_the_budget_whatever_the_period(last: int, every: int) -> None:
    both = Peers(last=last, every=every)
    closed = []
    for _ in range(STEPS):
        both.optimizer.zero_grad()
        both.loss(both.ours()).backward()
        both.optimizer.step()
        closed.append(sum(int((g == 0).sum()) for _, _, g in both.ours()))
    assert closed[-last - 1 :] == [4] * (last + 1)


def test_the_budget_falls_as_a_cube() -> None:
    options: Any = SimpleNamespace(first=2, last=4)
    told = [budget(step, 8, 4, options, STEPS) for step in range(1, STEPS + 1)]
    assert told[:2] == [8, 8] and told[-4:] == [4] * 4 and told == sorted(told, reverse=True)
    assert told[5] == int(4 * (1 - 4 / 8) ** 3 + 4)


def test_a_link_keeps_as_many_ranks_as_its_budget_and_starts_from_the_model_it_was_given(tmp_path: Path) -> None:
    link = {"initialiser": "gaussian", "parametrisation": {"kind": "gated", "start": "zero"}, "update": OPTIONS,
            "steps": STEPS, "learning_rate": 2e-2}  # fmt: skip
    chain = root_of("llama", tmp_path)
    plain = run_link(job_at("llama", chain))[2].losses[0]["loss"]
    adapter, record, progress = run_link(job_at("llama", chain, link, allocation={"rank": 4}))
    assert progress.losses[0]["loss"] == pytest.approx(plain, abs=1e-6)
    assert progress.losses[-1]["loss"] < 0.9 * plain
    assert sum(pair.rank for pair in adapter.pairs.values()) == 2 * len(record["ranks"]) or len(record["ranks"]) < 14
    assert sum(pair.rank for pair in adapter.pairs.values()) <= 2 * 14


def test_a_budget_that_holds_every_gate_is_refused_when_the_ranks_are_known() -> None:
    with pytest.raises(UserError, match=r"^link\.update\.rank 4: keeps 8 ranks in 2 modules, which start with 8: none"):
        Peers(rank=4)
