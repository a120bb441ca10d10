"""RAC-LoRA's own example: a quadratic on which chains of LoRA diverge and chains of half a LoRA converge."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cola_core.adapters import Pair, add_pair, attach, detach
from cola_core.axes.initialisers import INITIALISERS
from cola_core.axes.parametrisations import PARAMETRISATIONS
from cola_core.axes.updates import build_optimizer
from cola_core.config.recipe import LinkConfig
from tests.lab import LINK, start_of

CURVATURES = torch.tensor([10.0] + 8 * [1.0], dtype=torch.float64).reshape(3, 3)  # L = 10


def distances(form: str, start: str, links: int, steps: int, rate: float) -> list[float]:
    """||W|| after every link, for f(W) = sum M_ij W_ij^2 / 2 with its minimum at 0, from W = 10: rank 1, s = 1, SGD."""
    net = nn.Sequential(nn.Linear(3, 3, bias=False, dtype=torch.float64)).requires_grad_(False)
    net[0].weight.fill_(10.0)
    config = LinkConfig(**{**LINK.model_dump(), "update": "sgd", "weight_decay": 0.0, "learning_rate": rate})
    found = []
    for link in range(1, links + 1):
        first = INITIALISERS[start](start_of(net[0].weight.detach(), 1, 1.0, link=link), None)
        layers = attach(net, {"0": Pair(first.a, first.b, 1.0)}, form=PARAMETRISATIONS[form])
        PARAMETRISATIONS[form].prepare(layers["0"], None, 0)
        parts = [(part, part, p) for part, p in layers["0"].named_parameters(recurse=False) if p.requires_grad]
        optimizer = build_optimizer(parts, config, layers)
        for _ in range(steps):
            optimizer.zero_grad()
            weight = layers["0"].weight + layers["0"].B @ layers["0"].A
            (CURVATURES * weight.square() / 2).sum().backward()
            optimizer.step()
        add_pair(net[0].base, detach(net)["0"])
        found.append(float(net[0].weight.norm()))
    return found


@pytest.mark.parametrize(("form", "start", "rate"), [("frozen_a", "kaiming", 0.1), ("frozen_b", "random_b", 0.02)])
def test_rac_lora_converges_where_cola_diverges(form: str, start: str, rate: float) -> None:
    """One step size, 1 / L under the right sketch; RAC's frozen factor makes each link's problem convex."""
    assert not math.isfinite(distances("plain", start, 30, 20, rate)[-1])
    rac = distances(form, start, 150, 20, rate)
    assert rac[-1] < 1e-6 < rac[50] < rac[10] < rac[0] / 4


def test_one_link_of_half_a_lora_stops_at_a_wrong_point() -> None:
    """Asymmetric LoRA without a chain: of nine dimensions a frozen factor of rank 1 reaches three."""
    (alone,) = distances("frozen_a", "kaiming", 1, 2000, 0.1)
    (longer,) = distances("frozen_a", "kaiming", 1, 4000, 0.1)
    assert alone == pytest.approx(longer, rel=1e-6) and alone > 5
    assert distances("frozen_a", "kaiming", 100, 20, 0.1)[-1] < 1e-3, "as many steps in a chain arrive"
