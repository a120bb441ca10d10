"""A model and a piece of work as arithmetic sees them: linear maps in model order, and the tokens that pass them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

__all__ = ["Group", "Map", "Shape", "Work", "walk"]

# How names end, by family: Llama and OPT, BERT, T5, GPT-2 (whose one map gives queries, keys and values).
QUERY, KEY = ("q_proj", "query", "q", "c_attn"), ("k_proj", "key", "k", "c_attn")
ATTENTION = (*QUERY, *KEY, "v_proj", "value", "v")
EXPAND = ("gate_proj", "up_proj", "fc1", "c_fc", "intermediate.dense", "wi", "wi_0", "wi_1")
CROSS = ("EncDecAttention.k", "EncDecAttention.v")  # T5's decoder: these two read what the encoder gave
HIDDEN = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class Shape:
    """A model.

    modules: linear map of a block -> (out, in), in model order; vocabulary: V, rows of the output layer, 0 without one;
    head: weights read at each position whose output is computed: V d, or an encoder's pooler.
    """

    modules: Mapping[str, tuple[int, int]]
    vocabulary: int = 0
    head: int = 0

    @classmethod
    def of(cls, modules: Mapping[str, tuple[int, int]], kind: str, config: Mapping[str, Any]) -> Shape:
        """From cola.json's modules and kind, and config.json; what the latter does not tell is not counted."""
        hidden = next((config[name] for name in HIDDEN if name in config), 0)
        if kind == "encoder":
            return cls(modules, 0, hidden**2)
        vocabulary = config.get("vocab_size", 0)
        return cls(modules, vocabulary, vocabulary * hidden)

    @property
    def linear(self) -> int:
        """P."""
        return sum(out * inner for out, inner in self.modules.values())

    @property
    def complete(self) -> bool:
        """Whether names and config tell where attention and the output layer are; else only P is counted."""
        return self.head > 0 and any(_role(name) == "attention" for name in self.modules)


@dataclass(frozen=True)
class Work:
    """One pass over rows x length tokens, padding included.

    outputs: positions whose logits are computed; decoder_rows x decoder_length: tokens of an encoder-decoder's second
    stack.
    """

    rows: float
    length: float
    outputs: float
    decoder_rows: float = 0
    decoder_length: float = 0

    @classmethod
    def of(cls, kind: str, rows: float, prompt: float, continuations: Sequence[float]) -> Work:
        """What `cola_core.batches` makes of prompts with continuations of these lengths: one, or every candidate.

        A causal model reads a shared prompt once, and of each continuation all but the last token.
        """
        if kind == "encoder":
            return cls(rows, prompt, rows)
        if kind == "seq2seq":
            return cls(rows, prompt, rows * sum(continuations), rows * len(continuations), max(continuations))
        more = sum(length - 1 for length in continuations)
        return cls(rows, prompt + more, rows * (1 + more))

    @property
    def tokens(self) -> float:
        """Of both stacks."""
        return self.rows * self.length + self.decoder_rows * self.decoder_length


@dataclass(frozen=True)
class Map:
    """One linear map in a pass over rows x length tokens.

    rank: of its adapter, 0 without one; trains: its own weight's gradient is taken; below: its input needs a gradient.
    """

    name: str
    out: int
    inner: int
    rows: float
    length: float
    rank: int
    trains: bool
    below: bool

    @property
    def tokens(self) -> float:
        """That pass it."""
        return self.rows * self.length

    @property
    def learns(self) -> bool:
        """Whether it is adapted or trained, so that its input is kept for the backward."""
        return self.trains or self.rank > 0

    @property
    def above(self) -> bool:
        """Whether its output needs a gradient."""
        return self.below or self.learns


@dataclass(frozen=True)
class Group:
    """Maps that read the same stream; role: attention (queries, keys, values), expand (an MLP's first) or inner."""

    role: str
    maps: list[Map]

    @property
    def query(self) -> Map:
        """The map of an attention's queries."""
        return next(m for m in self.maps if _ends(m.name, QUERY))

    @property
    def key(self) -> Map:
        """The map of its keys: in GPT-2 the same."""
        return next(m for m in self.maps if _ends(m.name, KEY))

    @property
    def width(self) -> int:
        """Heads x head size."""
        return self.query.out // (3 if self.query is self.key else 1)


def walk(
    shape: Shape, work: Work, ranks: Mapping[str, int], trained: Collection[str] = (), embeddings: bool = False
) -> Iterator[Group]:
    """Every group in the order of a forward pass, with what autograd asks of its maps.

    Blocks add to their stream, so once a part of it needs a gradient, everything after it does; before that, nothing.

    Args:
        ranks: adapted module -> rank; trained: modules whose own weights' gradients are taken; embeddings: theirs too.
    """
    needs = {False: embeddings, True: embeddings}  # the stream of a decoder beside an encoder: True
    for (_, role), names in groupby(shape.modules, lambda name: (_together(name), _role(name))):
        maps = []
        for name in names:
            second = work.decoder_rows > 0 and name.startswith("decoder.")
            rows, length = (work.decoder_rows if second else work.rows), work.length
            reads = second and not _ends(name, CROSS)
            length = work.decoder_length if reads else length
            out, inner = shape.modules[name]
            maps.append(Map(name, out, inner, rows, length, ranks.get(name, 0), name in trained, needs[reads]))
        yield Group(role, maps)
        needs[second] |= any(m.above for m in maps)


def _role(name: str) -> str:
    if _ends(name, ATTENTION):
        return "attention"
    return "expand" if _ends(name, EXPAND) else "inner"


def _together(name: str) -> str:
    """Equal for neighbours that read the same stream."""
    return name if _role(name) == "inner" else name.rpartition(".")[0]


def _ends(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
