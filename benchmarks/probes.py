"""The gradient probe: its memory and time beside a plain backward, whole gradients, and PEFT's LoRA-GA."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from benchmarks.memory import left_bytes, peak_bytes
from benchmarks.pairs import Pairs, alternate
from benchmarks.results import Row, compared
from benchmarks.setting import Setting
from cola_core.axes.allocators import Question, allocate
from cola_core.config.recipe import AllocateConfig
from cola_core.draws import draw_a
from cola_core.models import adaptable, weight_shape
from cola_core.probe import Profile, probe
from cola_core.rows import Row as Example

__all__ = ["probe_rows", "sampled_curve"]

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


class Probes:
    """The probe and its peers on one model: every method takes the gradient of the same rows and leaves nothing."""

    def __init__(self, where: Setting) -> None:
        self.where, self.objective = where, where.objective()
        self.modules: Mapping[str, nn.Module] = adaptable(self.objective.model)
        self.weights: dict[str, Tensor] = {name: m.weight for name, m in self.modules.items()}  # type: ignore[misc]
        self.bytes = sum(weight.nbytes for weight in self.weights.values())
        self.batch = self.objective.training_batch(list(where.probe))

    def ours(self, rows: Sequence[Example] | None = None, **changes: object) -> Profile:
        """The product's probe, of all rows if none are named."""
        config = self.where.profile(**changes)
        return probe(self.objective, rows or list(self.where.probe), self.modules, {}, config, (0, 1))

    def plain(self, keep: bool = False) -> None:
        """One forward and backward with the same weight gradients, freed unless kept."""
        self.ask(True)
        self.objective(self.batch).backward()
        if not keep:
            self.ask(False)

    def activations(self, rows: Sequence[Example] | None = None) -> int:
        """Bytes of the model's activations as the backward needs them, and of what it takes to compute them."""
        batch = self.objective.training_batch(rows) if rows else self.batch
        self.ask(True)
        found = peak_bytes(lambda: self.objective(batch))
        self.ask(False)
        return found

    def whole(self) -> dict[str, Any]:
        """GoRA's probe as its authors do it: all mean gradients kept, then importance and B for every module."""
        self.plain(keep=True)
        units, found = self.objective.units(self.batch), {}
        for name, weight in self.weights.items():
            assert weight.grad is not None
            mean = weight.grad / units
            a = draw_a(0, 1, name, 8, weight_shape(self.modules[name])[1]).float()
            b = -mean @ a.T @ torch.linalg.inv(a @ a.T)
            found[name] = (float((weight.detach() * mean).abs().mean()), a, b)
        self.ask(False)
        return found

    def lora_ga(self) -> None:
        """PEFT's LoRA-GA up to its gradients, the part that is a probe."""
        words: dict[str, Any] = {"init_lora_weights": "lora_ga", "target_modules": list(self.modules)}
        config = LoraConfig(lora_ga_config=LoraGAConfig(), **words)
        preprocess_loraga(self.objective.model, config, lambda: self.objective(self.batch).backward())
        for module in self.modules.values():
            del module._peft_loraga_grad
        self.objective.eval()
        self.ask(False)

    def sampled_bytes(self, share: float) -> int:
        """Peak above the activations of a row where it is taken twice, one at a time: more rows add nothing."""
        row = [self.where.probe[0]]
        work = functools.partial(self.ours, row * 2, probe="sampled", row_share=share, micro_batch=1)
        return peak_bytes(work) - self.activations(row)

    def ranks(self, found: Profile) -> dict[str, int]:
        """What the recipe's allocator makes of a profile."""
        shapes = {name: weight_shape(module) for name, module in self.modules.items()}
        config = AllocateConfig(**self.where.params.allocate)
        return allocate(Question(shapes, found.modules, config, 0, 1)).ranks

    def ask(self, on: bool) -> None:
        """Want gradients of the weights, or no longer, and then drop those that are there."""
        for weight in self.weights.values():
            weight.requires_grad_(on)
            weight.grad = None if not on else weight.grad


def probe_rows(where: Setting, pairs: int) -> Iterator[Row]:
    """Memory, ranks against `accumulate`, time beside a plain backward and the peers."""
    probes = Probes(where)
    exact = probes.ours()
    assert all(m["gradient_norm"] > 0 for m in exact.modules.values()), "a gradient is zero"
    whole = probes.whole()
    for name, (importance, _, _) in whole.items():
        assert abs(exact.modules[name]["importance"] - importance) <= 1e-3 * importance, name
    activations = probes.activations()
    extra = peak_bytes(probes.ours) - activations
    note = (
        f"above model and {activations / 2**20:.0f} MiB of activations, in bytes of all target weights; A from its seed"
    )
    yield compared(
        "probe-memory", "one_batch probe, all linears: peak memory / target weights",
        Pairs([extra], [probes.bytes]), 0.15, unit="B", note=note,
    )  # fmt: skip
    what = "one_batch probe beside all mean gradients kept (GoRA's authors): what is left when the pass ends"
    left = Pairs([left_bytes(probes.ours)], [left_bytes(lambda: probes.plain(keep=True))])
    yield compared("probe-memory-whole", what, left, None, unit="B")
    probes.ask(False)
    yield _same_ranks(probes, exact)
    for name, what, peer, goal in _timings(probes):
        yield compared(name, what, alternate(probes.ours, peer, pairs if goal else (pairs + 1) // 2), goal)


def _same_ranks(probes: Probes, exact: Profile) -> Row:
    wanted, found = probes.ranks(exact), probes.ranks(probes.ours(probe="accumulate"))
    equal = sum(found[name] == rank for name, rank in wanted.items())
    what = "modules whose rank is equal under one_batch and accumulate / modules"
    return compared("probe-ranks", what, Pairs([equal], [len(wanted)]), 1.0, unit="modules", at_least=True)


def _timings(probes: Probes) -> Iterator[tuple[str, str, Callable[[], object], float | None]]:
    yield "probe-time", "one_batch probe beside one plain backward with the same weight gradients", probes.plain, 1.1
    yield "probe-time-whole", "one_batch probe beside all mean gradients kept (GoRA's authors)", probes.whole, None
    yield "probe-time-lora-ga", "one_batch probe beside PEFT's LoRA-GA probe", probes.lora_ga, None


def sampled_curve(where: Setting, quick: bool) -> dict[str, Any]:
    """The sampled probe: memory against the share of modules that get the exact probe's rank."""
    probes = Probes(where)
    exact = probes.ours()
    points = [_sampled(probes, exact, share) for share in (SHARES[1:2] if quick else SHARES)]
    return {"id": "probe-sampled", "what": "sampled probe: memory against equal ranks", "points": points}


def _sampled(probes: Probes, exact: Profile, share: float) -> dict[str, Any]:
    """One point: memory in bytes of all target weights, ranks and importances against the exact probe's."""
    started = time.perf_counter()
    found = probes.ours(probe="sampled", row_share=share)
    seconds = time.perf_counter() - started
    wanted, ranks = probes.ranks(exact), probes.ranks(found)
    errors = [abs(found.modules[n]["importance"] / exact.modules[n]["importance"] - 1) for n in wanted]
    return {
        "row_share": share,
        "memory_share": probes.sampled_bytes(share) / probes.bytes,
        "equal_ranks": sum(ranks[name] == rank for name, rank in wanted.items()) / len(wanted),
        "worst_rank_difference": max(abs(ranks[name] - rank) for name, rank in wanted.items()),
        "mean_importance_error": sum(errors) / len(errors),
        "seconds": seconds,
    }
