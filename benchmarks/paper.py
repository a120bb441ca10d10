"""docs/performance.md, "Scaling on paper": tables for models that no one has run here, from `cola_core.arithmetic`.

`python -m benchmarks.paper` rewrites what stands between the markers; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cola_core.arithmetic.flops import forward, full_step, knot, lora_step, probe, sampled_probe
from cola_core.arithmetic.memory import ADAM, activations, knot_bytes, logits_bytes, probe_bytes, sampled_bytes
from cola_core.arithmetic.shape import Shape, Work
from cola_core.targets import select_targets

__all__ = ["PAGE", "SETTINGS", "placed", "tables"]

PAGE = Path(__file__).parent.parent / "docs/performance.md"
BEGIN, END = "<!-- paper:begin -->", "<!-- paper:end -->"
LENGTH, SUPERVISED = 2048, 256  # tokens of a row, and those whose logits are computed
BATCH, STEPS, VALIDATION, PROBE, SKETCH, SHARE = 64, 500, 256, 64, 64, 0.125
GPU, RESERVED = 80, 8  # GB (1e9 bytes) of one GPU; kept for context, workspaces and fragments
LINKS = ((40, 8), (250, 16), (500, 64), (2000, 64))  # steps x rows
USED = 0.4
PEAKS = {"A100": 312e12, "H100": 989e12}  # FLOP/s in bf16 without sparsity, as NVIDIA states them
BF16 = 2


@dataclass(frozen=True)
class Setting:
    """A model and the GPUs that its weights are divided among; each GPU computes rows of its own."""

    name: str
    shape: Shape
    layers: int
    gpus: int

    @property
    def weights(self) -> int:
        """Linear maps, input and output embeddings, and norms."""
        return self.shape.linear + 2 * self.shape.head + (2 * self.layers + 1) * self.shape.hidden

    @property
    def resident(self) -> float:
        """Bytes of bf16 weights on each GPU: its part, and where there are several, two gathered blocks."""
        gathered = 2 * BF16 * self.shape.linear / self.layers if self.gpus > 1 else 0
        return BF16 * self.weights / self.gpus + gathered

    def ranks(self, rank: int, targets: str = "all") -> dict[str, int]:
        """One rank for every target."""
        return dict.fromkeys(select_targets(self.shape.modules, targets), rank)

    def trained(self, rank: int) -> int:
        """p."""
        return sum(r * sum(self.shape.modules[name]) for name, r in self.ranks(rank).items())

    def kept(self, rows: int, checkpointing: bool) -> float:
        """Bytes of a micro-batch with r = 8: activations and logits."""
        work = rows_of(rows)
        return activations(self.shape, work, self.ranks(8), BF16, (), checkpointing) + logits_bytes(self.shape, work)


def llama(layers: int, hidden: int, expanded: int, heads: int, kv_heads: int, vocabulary: int) -> Shape:
    """The shape of a Llama."""
    kv = hidden // heads * kv_heads
    attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    mlp = {"gate": (expanded, hidden), "up": (expanded, hidden), "down": (hidden, expanded)}
    block = {f"self_attn.{name}_proj": size for name, size in attention.items()}
    block |= {f"mlp.{name}_proj": size for name, size in mlp.items()}
    modules = {f"model.layers.{i}.{name}": size for i in range(layers) for name, size in block.items()}
    return Shape(modules, hidden, heads, vocabulary)


SETTINGS = (
    Setting("7B, 1 GPU", llama(32, 4096, 11008, 32, 32, 32000), 32, 1),
    Setting("70B, each of 8 GPUs", llama(80, 8192, 28672, 64, 8, 128256), 80, 8),
)


def rows_of(count: int) -> Work:
    """So many rows of LENGTH tokens."""
    return Work(count, LENGTH, SUPERVISED * count)


def tables() -> str:
    """Everything between the markers."""
    return "\n\n".join([fits(), costs(), shares()])


def placed(page: str) -> str:
    """The page with its tables made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def fits() -> str:
    """Bytes, line by line."""
    head = ["GB", *(setting.name for setting in SETTINGS)]
    return _table(head, ([what, *(_gigabytes(of(s)) for s in SETTINGS)] for what, of in _held()), _capacity())


def _held() -> Iterator[tuple[str, Callable[[Setting], float]]]:
    yield "weights in bf16 (of 8 GPUs: an eighth, and two gathered blocks)", lambda s: s.resident
    for rank in (8, 64):
        yield f"adapters and Adam, r = {rank} on all linears", lambda s, r=rank: ADAM * s.trained(r)  # type: ignore[misc]
    for rows in (1, 4, 8):
        for checkpointing, words in ((False, "activations and logits"), (True, "the same with checkpointing")):
            yield f"{words}, {rows} x {LENGTH}", lambda s, n=rows, c=checkpointing: s.kept(n, c)  # type: ignore[misc]
    yield f"probe, {PROBE} rows in one batch, with checkpointing", lambda s: _probing(PROBE // s.gpus, False, s)
    yield "probe, accumulate, a row at a time, with checkpointing", partial(_probing, 1, True)
    yield "probe, sampled, an eighth of every gradient's rows, a row at a time", _sampled
    yield "in host memory, where links are merged: the fp32 master", lambda s: knot_bytes(s.shape, s.weights)


def _probing(rows: int, accumulate: bool, setting: Setting) -> float:
    held = probe_bytes(setting.shape, rows_of(rows), setting.shape.modules, BF16, True, accumulate)
    return held - accumulate * _elsewhere(setting)


def _sampled(setting: Setting) -> float:
    held = sampled_bytes(setting.shape, rows_of(1), setting.shape.modules, BF16, SKETCH, SHARE)
    return held - SHARE * _elsewhere(setting)


def _elsewhere(setting: Setting) -> float:
    """Sums of gradients that other GPUs hold."""
    return 4 * setting.shape.linear * (1 - 1 / setting.gpus)


def _capacity() -> Iterator[list[str]]:
    """What the lines add up to."""
    for checkpointing, words in ((False, "without"), (True, "with")):
        counts = (f"{_most(s, checkpointing):,}" for s in SETTINGS)
        yield [f"**rows a micro-batch has room for, r = 8, {words} checkpointing**", *counts]
    full = (_gigabytes(s.weights * (ADAM + BF16) / s.gpus) for s in SETTINGS)
    yield ["for comparison: weights and Adam of full fine-tuning", *full]


def _most(setting: Setting, checkpointing: bool) -> int:
    """Rows that fit beside weights, adapters and Adam."""
    free = (GPU - RESERVED) * 1e9 - setting.resident - ADAM * setting.trained(8)
    two, one = (setting.kept(n, checkpointing) for n in (2, 1))
    return int((free - one) / (two - one)) + 1 if free >= one else 0


def costs() -> str:
    """FLOPs and seconds of a step, a probe, a knot and a link."""
    head = ["", *(f"{s.name.split(',')[0]}: {unit}" for s in SETTINGS for unit in ("PFLOP", *PEAKS))]
    return _table(head, ([what, *_spent(of)] for what, of in _work()))


def _work() -> Iterator[tuple[str, Callable[[Setting], float]]]:
    step, held, probed = rows_of(BATCH), rows_of(VALIDATION), rows_of(PROBE)
    for rank in (8, 64):
        yield f"LoRA step, all linears, r = {rank}", lambda s, r=rank: lora_step(s.shape, step, s.ranks(r))  # type: ignore[misc]
    yield "the same with checkpointing, r = 8", lambda s: lora_step(s.shape, step, s.ranks(8), checkpointing=True)
    yield "LoRA step, query and value, r = 8", lambda s: lora_step(s.shape, step, s.ranks(8, "query_value"))
    yield "full fine-tuning step", lambda s: full_step(s.shape, step)
    yield f"validation, {VALIDATION} rows", lambda s: forward(s.shape, held, s.ranks(8))
    yield f"probe, {PROBE} rows, sketch {SKETCH}", _probe
    yield (
        "the same, sampled, an eighth of every gradient's rows",
        lambda s: sampled_probe(s.shape, probed, s.shape.modules, SKETCH, SHARE),
    )
    yield "a knot, r = 8", lambda s: knot(s.shape, s.ranks(8))
    yield f"**a link: {STEPS} steps, 5 validations, probe, knot**", lambda s: _link(s) + _probe(s)


def shares() -> str:
    """What a probe adds to the link that follows it."""
    setting = SETTINGS[0]
    head = ["probe rows", *(f"link of {steps} x {batch} rows" for steps, batch in LINKS)]
    return _table(head, ([str(n), *(_added(setting, n, *link) for link in LINKS)] for n in (16, 64, 256)))


def _added(setting: Setting, rows: int, steps: int, batch: int) -> str:
    pairs = setting.ranks(8)
    taken = probe(setting.shape, rows_of(rows), pairs, SKETCH)
    return f"{100 * taken / (steps * lora_step(setting.shape, rows_of(batch), pairs)):.2f} %"


def _probe(setting: Setting) -> float:
    return probe(setting.shape, rows_of(PROBE), setting.shape.modules, SKETCH)


def _link(setting: Setting) -> float:
    pairs = setting.ranks(8)
    validations = 5 * forward(setting.shape, rows_of(VALIDATION), pairs)
    steps = STEPS * lora_step(setting.shape, rows_of(BATCH), pairs)
    return steps + validations + knot(setting.shape, pairs)


def _spent(of: Callable[[Setting], float]) -> Iterator[str]:
    """PFLOP, and seconds on that setting's GPUs at the assumed use."""
    for setting in SETTINGS:
        flops = of(setting)
        yield f"{flops / 1e15:,.{4 if flops < 1e15 else 1}f}"
        yield from (_duration(flops / (setting.gpus * USED * peak)) for peak in PEAKS.values())


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.{2 if size < 1e10 else 1}f}"


def _table(head: Sequence[str], *parts: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *(row for part in parts for row in part)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(placed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
