"""Define the head and its file, the loss and its scores, and the rows of each step; d features, c outputs."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from utils.data.load import LabelledTexts
from utils.results import save_tensors
from utils.script import UserError
from utils.training.metrics import classification_scores, regression_scores

GROUP = 50  # batches sorted by length together: enough to save padding, few enough to stay random


def make_head(hidden_size: int, num_labels: int, dropout: float) -> nn.Sequential:
    """Dropout and a linear layer on the pooled state: (b, d) -> (b, c)."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden_size, num_labels))


@dataclass(frozen=True)
class Objective:
    """Cross-entropy over c classes; for regression the squared error of targets in units of their spread in train."""

    num_labels: int  # c; 1 for regression
    is_regression: bool
    mean: float = 0.0  # mean of the training targets
    scale: float = 1.0  # their standard deviation

    @classmethod
    def of(cls, train: LabelledTexts) -> "Objective":
        """The objective for these training texts."""
        if train.is_regression:
            return cls(1, True, float(train.labels.mean()), float(train.labels.std()))
        return cls(train.num_labels, False)

    def targets(self, labels: np.ndarray) -> Tensor:
        """Labels as the loss takes them: (n,) int64 classes, or float32 scaled targets."""
        if self.is_regression:
            return torch.from_numpy((labels - self.mean) / self.scale).float()
        return torch.from_numpy(labels).long()

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss summed over texts, from outputs (b, c) and targets (b,)."""
        if self.is_regression:
            return mse_loss(outputs[:, 0], targets, reduction="sum")
        return cross_entropy(outputs, targets, reduction="sum")

    def scores(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Mean loss and every score of outputs (n, c) against targets (n,), both on the CPU."""
        outputs = outputs.double()
        loss = self.loss_sum(outputs, targets.double() if self.is_regression else targets).item() / len(targets)
        if not math.isfinite(loss):
            raise UserError(f"The evaluation's loss is {loss}. Try a smaller --learning_rate or --dtype float32.")
        if self.is_regression:
            in_own_unit = (values.double() * self.scale + self.mean for values in (targets, outputs[:, 0]))
            return {"loss": loss, **regression_scores(*(values.numpy() for values in in_own_unit))}
        scores = classification_scores(targets.numpy(), outputs.softmax(1).numpy())
        del scores["log_loss"]  # the same as `loss`
        return {"loss": loss, **scores}


def save_head(path: Path, head: nn.Sequential, objective: Objective, metadata: dict, mean: Tensor | float = 0.0,
              spread: Tensor | float = 1.0) -> None:  # fmt: skip
    """Writes `weight` (c, d) and `bias` (c,): they map pooled states to labels, both as they were before scaling."""
    weight, bias = (parameter.detach().double().cpu() for parameter in head[1].parameters())
    weight = weight / spread
    bias = (bias - (weight * mean).sum(1)) * objective.scale + objective.mean
    save_tensors(path, {"weight": (weight * objective.scale).float(), "bias": bias.float()}, metadata)


@dataclass(frozen=True, eq=False)
class BatchOrder:
    """The rows of each optimiser step, a function of seed and step alone; every epoch has every row once."""

    num_rows: int
    rows_per_step: int
    seed: int
    lengths: np.ndarray | None = None  # tokens of each row; a step then has rows of like length, longest first

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every row comes once."""
        return -(-self.num_rows // self.rows_per_step)

    def __call__(self, step: int) -> np.ndarray:
        """Rows of `step`, counted from 0, (rows_per_step,) or fewer at the end of an epoch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return shuffled_batches(self, epoch)[index]


@functools.lru_cache(maxsize=1)
def shuffled_batches(order: BatchOrder, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch; with lengths, sorts each `GROUP` of random batches together, then shuffles all."""
    random = np.random.default_rng((order.seed, epoch))
    rows = random.permutation(order.num_rows)
    cuts = range(order.rows_per_step, order.num_rows, order.rows_per_step)
    if order.lengths is None or order.rows_per_step == 1:
        return np.split(rows, cuts)
    group = np.arange(order.num_rows) // (GROUP * order.rows_per_step)
    batches = np.split(rows[np.lexsort((-order.lengths[rows], group))], cuts)
    return [batches[index] for index in random.permutation(len(batches))]
