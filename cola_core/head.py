"""An encoder's head, fitted alone on frozen features, so that the first probe sees a sensible head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from cola_core.config.task import HeadConfig
from cola_core.errors import UserError
from cola_core.models import head_parameters
from cola_core.rows import Row
from cola_core.scoring import Objective

__all__ = ["fit_head"]

BATCH = 32


def fit_head(objective: Objective, rows: Sequence[Row], config: HeadConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit the head's last linear map by logistic regression; whatever stands before it stays as it was drawn.

    Args:
        objective: an encoder with its classification head.
        rows: the training split.

    Returns:
        the head's parameters by name, and a record of the fit.

    Raises:
        UserError: all rows are of one class.
    """
    _refuse_one_class(objective.task.labels, rows)
    last = _last_linear(objective)
    features, labels = _features(objective, last, rows)
    fit = LogisticRegression(C=config.inverse_regularisation, max_iter=config.max_iterations, tol=1e-6)
    fit.fit(features.numpy(), labels.numpy())
    weight, bias = torch.zeros_like(last.weight), torch.full_like(last.bias, -10.0)
    for row, label in enumerate(fit.classes_ if len(fit.classes_) > 2 else fit.classes_[1:]):
        weight[label] = torch.from_numpy(fit.coef_[row]).to(weight.dtype).to(weight.device)
        bias[label] = float(fit.intercept_[row])
    if len(fit.classes_) <= 2:
        bias[fit.classes_[0]] = 0.0  # two classes: scikit-learn gives the second one's odds alone
    with torch.no_grad():
        last.weight.copy_(weight)
        last.bias.copy_(bias)
    head = {name: p.detach().clone() for name, p in head_parameters(objective.model).items()}
    accuracy = float(fit.score(features.numpy(), labels.numpy()))
    return head, {"rows": len(rows), "train_accuracy": accuracy, "iterations": int(max(fit.n_iter_))}


def _refuse_one_class(labels: Sequence[str], rows: Sequence[Row]) -> None:
    found = {row.label for row in rows}
    if len(found) == 1:
        raise UserError(
            f"prepare.train: all training rows ({len(rows)}) are of class {labels[found.pop()]!r}; "
            "a head needs rows of at least two classes"
        )


def _last_linear(objective: Objective) -> nn.Linear:
    classes = len(objective.task.labels)
    names = {name.rpartition(".")[0] for name in head_parameters(objective.model)}
    found = [objective.model.get_submodule(name) for name in sorted(names)]
    return next(m for m in found if isinstance(m, nn.Linear) and m.out_features == classes)


def _features(objective: Objective, last: nn.Linear, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """What the last linear map is given: n x features, float64, with the labels, in row order."""
    caught: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: caught.append(args[0].cpu().double()))
    order = objective.groups(rows, BATCH)
    try:
        with torch.no_grad():
            for indices in order:
                objective.scores(objective.scoring_batch([rows[i] for i in indices]))
    finally:
        handle.remove()
    flat = [i for indices in order for i in indices]
    inverse = torch.tensor(flat).argsort()
    return torch.cat(caught)[inverse], torch.tensor([row.label for row in rows])
