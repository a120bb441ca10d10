"""Random 2-layer models of every family, with a byte-level tokenizer: real files, made in a second, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from cola_core.assets.saving import drop_noise
from cola_core.errors import UserError, suggest
from cola_core.seeds import derive

__all__ = ["build_tiny"]

POSITIONS = 1024


@dataclass(frozen=True)
class Family:
    """One architecture.

    specials: the tokenizer's named special tokens; the first ids, in order of first appearance.
    template: how the tokenizer frames a text; settings: of the config, beyond what all families share.
    """

    auto: Any
    specials: dict[str, str]
    template: str
    settings: dict[str, Any]


SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
FAMILIES = {
    "llama": Family(
        AutoModelForCausalLM,
        SENTENCE,
        "<s> $A",
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "initializer_range": 0.1},
    ),
    "opt": Family(
        AutoModelForCausalLM,
        {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"},
        "</s> $A",
        {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "dropout": 0.0,
         "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "init_std": 0.1},
    ),
    "gpt2": Family(
        AutoModelForCausalLM,
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "$A",
        {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.1},
    ),
    "t5": Family(
        AutoModelForSeq2SeqLM,
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "$A </s>",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bert": Family(
        AutoModel,
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
         "mask_token": "[MASK]"},
        "[CLS] $A [SEP]",
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": POSITIONS, "initializer_range": 0.1},
    ),
}  # fmt: skip


def build_tiny(family: str, folder: Path, seed: int = 0) -> None:
    """Write a random model of `family` and its tokenizer to `folder`; the same seed gives the same bytes.

    Llama has grouped keys and values (2 for 4 heads); gpt2, opt and t5 tie input and output embeddings; bert is a bare
    BertModel with its pooler. The tokenizer maps every byte to one token, so any text can be written.

    Raises:
        UserError: an unknown family.
    """
    if family not in FAMILIES:
        raise UserError(f"tiny:{family}: no such family{suggest(family, FAMILIES)}")
    kind = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(kind)
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **kind.settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "tiny", family))
        model = kind.auto.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    drop_noise(folder)


def _tokenizer(kind: Family) -> Any:
    specials = list(dict.fromkeys(kind.specials.values()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=kind.template, special_tokens=[(token, vocabulary[token]) for token in specials]
    )
    wrap: Any = PreTrainedTokenizerFast  # untyped in transformers
    return wrap(tokenizer_object=tokenizer, model_max_length=POSITIONS, **kind.specials)
