"""The peers as their users run them: PEFT layers, transformers' Trainer, full fine-tuning, and torch's bare floor."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.pairs import Pairs, timed
from benchmarks.setting import Ours, Setting
from cola_core.adapters import Pair
from cola_core.rows import Row
from cola_core.scoring import Objective

__all__ = ["against_trainer", "floor", "peft_layers", "peft_model"]

TASK_TYPES = {"causal": TaskType.CAUSAL_LM, "encoder": TaskType.SEQ_CLS}


def peft_model(model: nn.Module, pairs: Mapping[str, Pair], where: Setting) -> Any:
    """PEFT's model around `model`, its adapters started from `pairs`."""
    rank = next(iter(pairs.values())).rank
    rslora = where.params.link["scale"] == "rslora"
    config = LoraConfig(
        task_type=TASK_TYPES[where.kind],
        r=rank,
        lora_alpha=where.params.link["alpha"],
        use_rslora=rslora,
        target_modules=list(pairs),
    )
    wrapped: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, pair in pairs.items():
            layer = wrapped.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(pair.a)
            layer.lora_B["default"].weight.copy_(pair.b)
    return wrapped


def peft_layers(model: Any, pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """PEFT's layers under the names that this project's training loop knows A and B by."""
    layers = {}
    for name in pairs:
        module, layers[name] = model.base_model.model.get_submodule(name), nn.Module()
        layers[name].A, layers[name].B = module.lora_A["default"].weight, module.lora_B["default"].weight
        layers[name].base = module.base_layer
    return layers


class _Recording(Trainer):
    """The Trainer as it is, and a note of what each step's loss was: asking it to log would cost it time."""

    losses: list[Tensor]

    def training_step(self, *arguments: Any, **more: Any) -> Tensor:
        """The Trainer's own step."""
        loss: Tensor = super().training_step(*arguments, **more)
        self.losses.append(loss)
        return loss


class _Alternate(TrainerCallback):
    """After every step of the Trainer one of ours, in the same thread; both are timed."""

    def __init__(self, ours: Ours, pairs: int, warm_up: int) -> None:
        self.ours, self.left, self.warm_up, self.pairs, self.mark = ours, pairs + warm_up, warm_up, Pairs(), 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        peer = time.perf_counter() - self.mark  # from the end of our last step: its data loading included
        ours = timed(self.ours.step)
        if state.global_step > self.warm_up:
            self.pairs.add(ours, peer)
        self.left -= 1
        control.should_training_stop = self.left == 0
        self.mark = time.perf_counter()


def against_trainer(where: Setting, ours: Ours, model: Any, pairs: int, warm_up: int = 1) -> Pairs:
    """Steps of `ours` and of transformers' Trainer with PEFT, in turn, on the same rows in the same order.

    The Trainer is used as its documentation does: a tokenised dataset with labels of -100 on the prompt, dynamic
    padding, everything else at its defaults but what a fair comparison fixes: order, rate, no dropout, no reports.
    """
    callback = _Alternate(ours, pairs, warm_up)
    config = ours.training.course.config
    rows = [row for step in ours.rows for row in step]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=config.batch,
            max_steps=config.steps,
            learning_rate=config.learning_rate,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data: Any = [_features(row, where.kind) for row in rows]
        trainer = _Recording(model, arguments, _collator(where), train_dataset=data, callbacks=[callback])
        trainer.losses = []
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    moved = [bool(p.abs().sum() > 0) for name, p in model.named_parameters() if "lora_B" in name]
    assert moved and all(moved), "the Trainer's gradient is zero"
    ours.check([float(loss) for loss in trainer.losses])
    return callback.pairs


def _features(row: Row, kind: str) -> dict[str, Any]:
    """A row as transformers' documentation prepares it."""
    if kind == "encoder":
        return {"input_ids": row.prompt, "attention_mask": [1] * len(row.prompt), "labels": row.label}
    ids = [*row.prompt, *row.answer]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(row.prompt) + row.answer}


def _collator(where: Setting) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(where.base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return (DataCollatorWithPadding if where.kind == "encoder" else DataCollatorForSeq2Seq)(tokenizer)


@contextmanager
def floor(objective: Objective, names: Sequence[str]) -> Iterator[None]:
    """Inside, a backward computes the activations' gradients down to the first of the modules `names`, nothing else.

    What adapters on these modules cannot do without: their outputs ask for gradients where nothing above them does.
    """

    def ask(_: nn.Module, __: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)

    handles = [objective.model.get_submodule(name).register_forward_hook(ask) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
