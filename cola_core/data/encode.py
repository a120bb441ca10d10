"""Text to token ids: prompt and answer apart, so that what is supervised is known by position.

Prompts that are too long lose the *end of their longest column*: the cut is made in the text of the column, before the
template is rendered, so every word of the template stays, an article keeps its beginning, and the ids are those of a
real text. When that column is used up the next longest follows. Answers are never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from cola_core.config.task import PrepareConfig
from cola_core.data.examples import Example
from cola_core.data.templates import template
from cola_core.data.tokens import open_tokenizer
from cola_core.errors import UserError
from cola_core.files import read_json
from cola_core.root import check_base

__all__ = ["Codec", "Encoded", "candidate_ids", "encode"]

SPACE_MARKS = ("\u2581", "\u0120")  # how SentencePiece and byte-level BPE write the space before a word


@dataclass(frozen=True)
class Codec:
    """A tokenizer as one kind of model reads it.

    prefix, suffix: special tokens around a prompt; a causal prompt has no suffix, since the answer follows it.
    spaced: the tokenizer writes a space before the first word itself, so an answer's own leading space is not sent.
    pad, end: token ids; padding is told by position, so `pad` may be any token. start: a seq2seq decoder's first token.
    """

    tokenizer: Any
    prefix: list[int]
    suffix: list[int]
    spaced: bool
    pad: int
    end: int | None
    start: int | None

    @classmethod
    def of(cls, tokenizer: Any, kind: str, start: int | None = None) -> Codec:
        """Learn from one word what the tokenizer puts around a text.

        Args:
            tokenizer: one of transformers' fast tokenizers, or `Plain`.
            kind: causal, seq2seq or encoder.

        Raises:
            UserError: a tokenizer that cannot tell where its tokens stand in the text.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{tokenizer.name_or_path}: needs a fast tokenizer (tokenizer.json)")
        whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
        starts = [i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare]
        if not starts:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no token for 'a'")
        suffix = [] if kind == "causal" else whole[starts[0] + len(bare) :]
        spaced = tokenizer.convert_ids_to_tokens(bare)[0].startswith(SPACE_MARKS)
        ends = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None]
        return cls(tokenizer, whole[: starts[0]], suffix, spaced, ends[0], tokenizer.eos_token_id, start)

    @classmethod
    def load(cls, folder: Path) -> Codec:
        """The codec of a base directory (tokenizer files, config.json and cola.json).

        Raises:
            UserError: no tokenizer stands there, or a seq2seq config does not tell how its decoder starts.
        """
        kind = check_base(folder, weights=False)["kind"]
        tokenizer = open_tokenizer(folder)
        return cls.of(tokenizer, kind, _decoder_start(folder) if kind == "seq2seq" else None)

    def bodies(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts without special tokens."""
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return ids

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer as it follows a prompt."""
        return self.bodies([text.removeprefix(" ") if self.spaced else text])[0]

    def ends(self, text: str) -> list[int]:
        """For every token of a text, where in it the token ends (characters)."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [end for _, end in offsets]


@dataclass(frozen=True)
class Encoded:
    """One row of a prepared split: the columns of its Arrow file, and whether its prompt was cut."""

    id: str
    prompt: list[int]
    answer: list[int]
    label: int
    reference: str
    truncated: bool


def candidate_ids(config: PrepareConfig, codec: Codec) -> list[list[int]]:
    """Token ids of every answer, in the order of the sorted labels (choice; empty otherwise).

    Where one answer's tokens begin another's, all of them get an end token: otherwise the short one could never win or
    lose by what follows it.

    Raises:
        UserError: an answer without tokens, two answers with the same ones, or no end token where one is needed.
    """
    labels = sorted(config.answers) if config.kind == "choice" else []
    ids = {label: codec.answer(config.answers[label]) for label in labels}
    for label in labels:
        if not ids[label]:
            raise UserError(f"params.yaml: prepare.answers.{label}: {config.answers[label]!r} has no tokens")
    begins = [(a, b) for a, b in permutations(labels, 2) if ids[b][: len(ids[a])] == ids[a]]
    for a, b in begins:
        if ids[a] == ids[b]:
            raise UserError(f"params.yaml: prepare.answers: {a!r} and {b!r} have the same tokens; they must differ")
    tail = [_end(codec)] if begins else []
    return [ids[label] + tail for label in labels]


def encode(examples: Sequence[Example], config: PrepareConfig, codec: Codec) -> list[Encoded]:
    """Encode examples so that prompt + longest answer <= `max_tokens`.

    The room kept for the answer is the longest candidate (choice), `max_new_tokens` or the row's own answer if longer
    (generate), nothing (classify).

    Raises:
        UserError: a prompt without tokens, or no room for the template's own words; with file:line.
    """
    candidates = candidate_ids(config, codec)
    index = {label: number for number, label in enumerate(sorted(config.answers))}
    encoded = []
    for example, body in zip(examples, codec.bodies([e.prompt for e in examples]), strict=True):
        label = index.get(example.reference, -1)
        answer = _answer(example, label, candidates, config, codec)
        room = config.max_tokens - len(codec.prefix) - len(codec.suffix) - _reserve(answer, candidates, config)
        cut = body if len(body) <= room else _shorten(example, len(body), room, config, codec)
        if not codec.prefix and not cut:
            raise UserError(f"{example.place}: prepare.prompt: the prompt has no tokens")
        prompt = [*codec.prefix, *cut, *codec.suffix]
        encoded.append(Encoded(example.id, prompt, answer, label, example.reference, cut is not body))
    return encoded


def _answer(
    example: Example, label: int, candidates: list[list[int]], config: PrepareConfig, codec: Codec
) -> list[int]:
    """The supervised tokens: the right candidate, the reference and one end token, or none (classify)."""
    if config.answers:
        return candidates[label] if candidates else []
    return [*codec.answer(example.reference), _end(codec)]


def _reserve(answer: list[int], candidates: list[list[int]], config: PrepareConfig) -> int:
    """Tokens of room; a free answer's length must not tell itself to the model through its prompt's length."""
    if config.answers:
        return max(map(len, candidates), default=0)
    return max(len(answer), config.max_new_tokens)


def _shorten(example: Example, length: int, room: int, config: PrepareConfig, codec: Codec) -> list[int]:
    """The ids of a prompt of `length` tokens after cutting columns, longest first, at token ends to fit into `room`."""
    prompt = template("prepare.prompt", config.prompt)
    row = dict(example.row)
    texts = [name for name in prompt.columns(row) if isinstance(row[name], str)]
    for name in sorted(texts, key=lambda column: -len(row[column])):
        ends = [0, *codec.ends(row[name])]
        text, keep = row[name], len(ends) - 1
        while keep > 0:
            keep = max(keep - (length - room), 0)
            row[name] = text[: ends[keep]]
            body = codec.bodies([prompt.render(row, example.place)])[0]
            if len(body) <= room:
                return body
            length = len(body)
    raise UserError(
        f"{example.place}: the template and answer alone need {length + config.max_tokens - room} tokens; "
        f"prepare.max_tokens is {config.max_tokens}"
    )


def _end(codec: Codec) -> int:
    if codec.end is None:
        raise UserError(f"{codec.tokenizer.name_or_path}: the tokenizer has no end token, and these answers need one")
    return codec.end


def _decoder_start(folder: Path) -> int:
    for name in ("generation_config.json", "config.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        if isinstance(content.get("decoder_start_token_id"), int):
            return int(content["decoder_start_token_id"])
    raise UserError(f"{folder / 'config.json'}: decoder_start_token_id: missing; a seq2seq model needs it")
