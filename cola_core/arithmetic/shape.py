"""A model and a piece of work as arithmetic sees them: linear maps in their blocks, and the tokens that pass them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

__all__ = ["Group", "Map", "Shape", "Work", "walk"]

# What a map does in its block, by how its name ends in Llama and OPT, BERT, T5 and GPT-2 (whose one map gives queries,
# keys and values), in the order of a forward pass; maps of one role and block read the same stream.
QUERY, KEY = ("q_proj", "query", "q", "c_attn"), ("k_proj", "key", "k", "c_attn")
ROLES = {
    "attention": (*QUERY, *KEY, "v_proj", "value", "v"),
    "result": ("o_proj", "out_proj", "attention.output.dense", "o", "attn.c_proj"),
    "expand": ("gate_proj", "up_proj", "fc1", "intermediate.dense", "wi", "wi_0", "wi_1", "c_fc"),
}
CROSS = ("EncDecAttention.k", "EncDecAttention.v")  # T5's decoder: these two read what the encoder gave
HIDDEN = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "num_heads")


@dataclass(frozen=True)
class Shape:
    """A model.

    modules: linear map of a block -> (out, in), in any order; hidden: d; heads: of attention's queries;
    vocabulary: V, rows of the output layer, 0 without one.
    """

    modules: Mapping[str, tuple[int, int]]
    hidden: int = 0
    heads: int = 0
    vocabulary: int = 0

    @classmethod
    def of(cls, modules: Mapping[str, tuple[int, int]], kind: str, config: Mapping[str, Any]) -> Shape:
        """From cola.json's modules and kind, and config.json; what the latter does not tell is 0 and not counted."""
        vocabulary = 0 if kind == "encoder" else _first(config, ["vocab_size"])
        hidden = _first(config, HIDDEN) if vocabulary or kind == "encoder" else 0
        return cls(modules, hidden, _first(config, HEADS), vocabulary)

    @property
    def head(self) -> int:
        """Weights read at each position whose output is computed: V d, or an encoder's pooler, d d."""
        return (self.vocabulary or self.hidden) * self.hidden

    @property
    def linear(self) -> int:
        """P."""
        return sum(out * inner for out, inner in self.modules.values())

    @property
    def complete(self) -> bool:
        """Whether names and config tell where attention and the output layer are; else only P is counted."""
        return self.head > 0 and any(group.role == "attention" for group in walk(self, Work(0, 0, 0), {}))


@dataclass(frozen=True)
class Work:
    """One pass over rows x length tokens, padding included where there is any.

    outputs: positions whose logits are computed; decoder_rows x decoder_length: tokens of an encoder-decoder's second
    stack; packed: rows lie end to end, and attention's results are put together anew.
    """

    rows: float
    length: float
    outputs: float
    decoder_rows: float = 0
    decoder_length: float = 0
    packed: bool = False

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

    @classmethod
    def end_to_end(cls, lengths: Sequence[int], outputs: float) -> Work:
        """Packed rows of these lengths, as so many rows of one length.

        Every formula here is a sum of multiples of the tokens, rows x length, of what attention takes, rows x length^2,
        and of the outputs: two numbers that keep both sums lose nothing, though neither need be whole.
        """
        tokens, squares = sum(lengths), sum(length**2 for length in lengths)
        return cls(tokens**2 / squares, squares / tokens, outputs, packed=True)

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
    """Maps that read the same stream.

    role: attention (queries, keys, values), result (of attention), expand (an MLP's first maps) or contract (all else).
    """

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
    for (second, _, order, _), names in groupby(sorted(shape.modules, key=_place), _place):
        maps = []
        for name in names:
            own = second and not _ends(name, CROSS)
            rows, length = work.decoder_rows if second else work.rows, work.decoder_length if own else work.length
            out, inner = shape.modules[name]
            maps.append(Map(name, out, inner, rows, length, ranks.get(name, 0), name in trained, needs[own]))
        yield Group([*ROLES, "contract"][order] if order or _attends(maps) else "contract", maps)
        needs[second] |= any(m.above for m in maps)


def _first(config: Mapping[str, Any], names: Sequence[str]) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def _attends(maps: Sequence[Map]) -> bool:
    """Whether there are queries and keys: some families have but one of them under these names."""
    return all(any(_ends(m.name, names) for m in maps) for names in (QUERY, KEY))


def _place(name: str) -> tuple[bool, list[int], int, str]:
    """When a map is computed: stack, block, role; a map of no known role stands alone."""
    order = next((i for i, endings in enumerate(ROLES.values()) if _ends(name, endings)), len(ROLES))
    blocks = [int(part) for part in name.split(".") if part.isdigit()]
    return name.startswith("decoder."), blocks, order, name if order == len(ROLES) else ""


def _ends(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
