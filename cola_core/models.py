"""The frozen base: load it, find what can be adapted, give it its store and its device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cola_core.axes.bases import BASES
from cola_core.config.recipe import MachineConfig
from cola_core.errors import UserError
from cola_core.root import base_manifest, check_base

__all__ = [
    "adaptable",
    "as_matrix",
    "head_parameters",
    "keeps_transposed",
    "load_base",
    "module_shapes",
    "place",
    "save_merged",
    "weight_shape",
]

CLASSES = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "encoder": "AutoModelForSequenceClassification",
}


def load_base(path: Path, machine: MachineConfig, labels: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """Load a base in its master dtype, frozen, in eval mode; links are added to it before `place` casts it.

    Args:
        path: a base directory with cola.json.
        labels: classes of an encoder's head (ignored by language models).
        dropout: every dropout probability of the base itself.

    Raises:
        UserError: a file has changed since it was fetched, or transformers cannot read the directory.
    """
    kind = check_base(path)["kind"]
    torch.set_num_threads(machine.threads)
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        _set_dropout(config, dropout)
        if kind == "encoder":
            config.num_labels = labels
        torch.manual_seed(0)  # the head that a checkpoint lacks is drawn here, then replaced by stage `head`
        model: PreTrainedModel = getattr(transformers, CLASSES[kind]).from_pretrained(
            path, config=config, dtype=BASES[machine.dtype].master, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be loaded as a {kind} model: {str(error).splitlines()[0]}") from None
    model.requires_grad_(False).eval()
    return model


def place(model: PreTrainedModel, machine: MachineConfig) -> PreTrainedModel:
    """Cast once to the compute dtype of the base store and move to the device; a head, which trains, stays wide.

    Raises:
        UserError: there is no such device here.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "machine.device: cuda: torch sees no such device here; use machine=cpu, or a CUDA build of torch"
        )
    store = BASES[machine.dtype]
    head = {name.rpartition(".")[0] for name in head_parameters(model)}
    model.to(device=machine.device, dtype=store.compute)  # type: ignore[call-arg]
    if store.adapter != store.compute:
        for name in head:
            module = model.get_submodule(name).to(store.adapter)
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.to(store.adapter) for x in inputs))
    return model


def save_merged(
    model: PreTrainedModel, machine: MachineConfig, base: Path, labels: Sequence[str], folder: Path
) -> None:
    """Write a merged model for `from_pretrained`: cast once, with the base's own settings and an encoder's label names.

    `load_base` has changed settings for training, such as every dropout; they are no part of the result.
    """
    config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
    if base_manifest(base)["kind"] == "encoder":
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    model.config = config
    model.config._name_or_path = ""
    model.to(dtype=BASES[machine.dtype].compute)  # type: ignore[call-arg]
    model.save_pretrained(folder)


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The linear maps inside the model's numbered blocks, in model order.

    Embeddings, the LM head, poolers and classifiers stand outside the blocks and are never adapted: a tied head would
    change the embeddings with it.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    }


def module_shapes(path: Path, kind: str) -> dict[str, list[int]]:
    """(out, in) of everything adaptable in a base directory, without reading a weight; kept in cola.json."""
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[kind]).from_config(config)
    return {name: list(weight_shape(module)) for name, module in adaptable(model).items()}


def head_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """An encoder's head: what stands beside the base model proper; nothing in a language model."""
    if model.get_output_embeddings() is not None:
        return {}
    prefix = f"{model.base_model_prefix}."
    return {name: p for name, p in model.named_parameters() if not name.startswith(prefix)}


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map, whichever way its weight is stored (GPT-2's Conv1D keeps in x out)."""
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return (int(columns), int(rows)) if keeps_transposed(module) else (int(rows), int(columns))


def as_matrix(module: nn.Module, tensor: Tensor | None = None) -> Tensor:
    """The module's weight, or a tensor of its shape, as out x in."""
    found: Tensor = module.weight.detach() if tensor is None else tensor  # type: ignore[union-attr, operator]
    return found.T if keeps_transposed(module) else found


def keeps_transposed(module: nn.Module) -> bool:
    """Whether the weight is kept in x out, by GPT-2's Conv1D or what stands for it."""
    return isinstance(module, Conv1D) or bool(getattr(module, "transposed", False))


def _set_dropout(config: Any, probability: float) -> None:
    """Every family names its dropouts differently, but all names say so."""
    for name, value in vars(config).items():
        if ("dropout" in name or "pdrop" in name or "layerdrop" in name) and isinstance(value, int | float | None):
            setattr(config, name, probability)
