"""The head, the loss and its scores, and the rows of each step; n or b texts, d features, c outputs."""

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

GROUP = 50  # batches that are sorted by length together: enough to save padding, few enough to stay random


# ------------------------------------------------------------------ head and objective
class Head(nn.Module):
    """Dropout and a linear layer on the pooled state: (b, d) -> (b, c)."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.linear(self.dropout(pooled))


@dataclass(frozen=True)
class Objective:
    """Cross-entropy over c classes; for regression the squared error of targets in units of their spread in train."""

    num_labels: int  # c; 1 for regression
    is_regression: bool
    mean: float = 0.0  # of the training targets
    scale: float = 1.0  # their standard deviation

    @classmethod
    def of(cls, train: LabelledTexts) -> "Objective":
        if not train.is_regression:
            return cls(train.num_labels, False)
        return cls(1, True, float(train.labels.mean()), float(train.labels.std()))

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
        """Mean loss and every score of outputs (n, c) against targets (n,), both on the CPU.

        Raises:
            UserError: the loss is not finite.
        """
        outputs = outputs.double()
        loss = self.loss_sum(outputs, targets.double() if self.is_regression else targets).item() / len(targets)
        if not math.isfinite(loss):
            raise UserError(f"The evaluation's loss is {loss}. Try a smaller --learning_rate or --dtype float32.")
        if self.is_regression:
            true, predicted = (
                (values * self.scale + self.mean).numpy() for values in (targets.double(), outputs[:, 0])
            )
            return {"loss": loss, **regression_scores(true, predicted)}
        scores = classification_scores(targets.numpy(), outputs.softmax(1).numpy())
        del scores["log_loss"]  # the same as `loss`
        return {"loss": loss, **scores}


def save_head(path: Path, head: Head, objective: Objective, metadata: dict, mean: Tensor | None = None,
              spread: Tensor | None = None) -> None:  # fmt: skip
    """Writes `weight` (c, d) and `bias` (c,), which take the pooled state as it is and give labels as they are.

    `mean` and `spread`, (d,), are those of inputs standardised in training; with the scale of regression targets they
    are folded into the weights.
    """
    weight, bias = (tensor.detach().double().cpu() for tensor in (head.linear.weight, head.linear.bias))
    if mean is not None and spread is not None:
        weight = weight / spread.double()
        bias = bias - weight @ mean.double()
    weight, bias = weight * objective.scale, bias * objective.scale + objective.mean
    save_tensors(path, {"weight": weight.float(), "bias": bias.float()}, metadata)


# ------------------------------------------------------------------ order of the rows
class BatchOrder:
    """The rows of each optimiser step; every row once an epoch; a function of seed and step alone.

    With `lengths`, rows of like length come together: the rows of `GROUP` batches are sorted by length and cut, and
    the batches shuffled again. Batches of one row are in plain random order either way.
    """

    def __init__(self, num_rows: int, rows_per_step: int, seed: int, lengths: np.ndarray | None = None) -> None:
        self.num_rows, self.rows_per_step, self.seed, self.lengths = num_rows, rows_per_step, seed, lengths
        self.steps_per_epoch = -(-num_rows // rows_per_step)
        self.epoch, self.batches = -1, []  # type: tuple[int, list[np.ndarray]]

    def __call__(self, step: int) -> np.ndarray:
        """Rows of `step`, counted from 0, (rows_per_step,) or fewer at the end of an epoch; longest first."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self.shuffle(epoch)
        return self.batches[index]

    def shuffle(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(self.num_rows)
        cuts = range(self.rows_per_step, self.num_rows, self.rows_per_step)
        if self.lengths is None or self.rows_per_step == 1:
            return np.split(order, cuts)
        group = np.arange(self.num_rows) // (GROUP * self.rows_per_step)
        order = order[np.lexsort((-self.lengths[order], group))]
        batches = np.split(order, cuts)
        return [batches[index] for index in random.permutation(len(batches))]
