"""One training engine for linear_training.py, lora_finetuning.py and from_scratch.py: what is trained differs, not how.

The rows of a step, its dropout masks and its learning rate follow from (seed, step) alone. A state on disk therefore
needs weights, optimiser, scheduler and the step: a killed run goes on with the numbers of an uninterrupted one.
"""

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from utils.checkpoints import load_state, save_state
from utils.data import LabelledTexts
from utils.io import UserError, pick_device, settings
from utils.metrics import classification_scores, regression_scores

Track = Literal["none", "tensorboard", "trackio", "wandb"]
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
        """Labels as the loss takes them: (n,) int64 classes, or float32 scaled targets.

        Raises:
            UserError: a class that the head has no output for.
        """
        if self.is_regression:
            return torch.from_numpy((labels - self.mean) / self.scale).float()
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_labels:
            raise UserError(
                f"Labels run from {labels.min()} to {labels.max()}, the head has {self.num_labels} outputs (0 to "
                f"{self.num_labels - 1}). Train and test must have the same classes; see --label_column."
            )
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
        del scores["log_loss"]  # what `loss` is
        return {"loss": loss, **scores}


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
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(self.num_rows)
        cuts = range(self.rows_per_step, self.num_rows, self.rows_per_step)
        if self.lengths is None or self.rows_per_step == 1:
            return np.split(order, cuts)
        group = np.arange(self.num_rows) // (GROUP * self.rows_per_step)
        order = order[np.lexsort((-self.lengths[order], group))]
        batches = np.split(order, cuts)
        return [batches[index] for index in random.permutation(len(batches))]


# ------------------------------------------------------------------ a run
@dataclass
class Run:
    """Everything one training run consists of; n training rows, b rows of a batch, c outputs."""

    model: Any  # a module, from what `inputs` gives to (b, c); each parameter that requires a gradient is trained
    inputs: Callable[[np.ndarray], tuple[Tensor, ...]]  # training rows (b,) -> inputs of the model, on its device
    targets: Tensor  # (n,), on the device
    objective: Objective
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR  # stepped once an optimiser step
    order: BatchOrder
    evaluate: Callable[[nn.Module], dict[str, Any]]  # a row of the history, without step and training loss
    num_steps: int
    steps_per_evaluation: int
    batch_size: int  # rows of one forward pass; a step has order.rows_per_step of them, over all processes
    seed: int
    accelerator: Accelerator
    state_path: Path
    identity: dict[str, Any]  # settings and fingerprints; a state of another run has others
    minutes_per_state: float = 3.0
    stop: Callable[[list[dict]], bool] = lambda history: False  # asked after each evaluation
    history: list[dict] = field(default_factory=list)
    step: int = 0  # optimiser steps done
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of the steps since the last row of the history

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def make_accelerator(config: Any, folder: Path) -> tuple[Accelerator, torch.device]:
    """Processes and trackers by accelerate; the device named, or under torchrun the one of this process.

    Raises:
        UserError: the device does not exist, or the package of the tracker is missing.
    """
    device = pick_device(config.device)
    tracker = None if config.track == "none" else config.track
    if tracker and importlib.util.find_spec(tracker) is None:
        raise UserError(f"--track {tracker} needs a package that is not installed. Run: pip install {tracker}")
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=tracker, project_dir=folder / "track")
    if tracker:
        simple = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings(config).items()}
        accelerator.init_trackers(folder.parent.parent.name, config=simple)
    return accelerator, device if accelerator.num_processes == 1 else accelerator.device


def train(run: Run) -> None:
    """Trains until `num_steps` or until `stop` says so; goes on from the state of an interrupted run.

    Raises:
        UserError: a loss that is not finite, too little memory, or the state of another run.
    """
    load_state(run)
    model = run.accelerator.prepare_model(run.model, device_placement=False)
    started = saved = time.monotonic()
    run.model.train()
    is_main = run.accelerator.is_main_process
    bar = tqdm(total=run.num_steps, initial=run.step, unit="step", desc="train", mininterval=1, disable=not is_main)
    while run.step < run.num_steps and not (run.history and run.stop(run.history)):
        rate = float(run.scheduler.get_last_lr()[0])
        run.losses.append(train_step(run, model))
        bar.update()
        if run.step % run.steps_per_evaluation == 0 or run.step == run.num_steps:
            run.model.eval()
            add_row(run, rate)
            run.model.train()
            shown = [f"{name} {value:.4f}" for name, value in run.history[-1].items() if name in SHOWN and value]
            bar.set_postfix_str(", ".join(shown), refresh=False)
        if time.monotonic() - saved >= 60 * run.minutes_per_state and run.step < run.num_steps:
            save_state(run, run.seconds + time.monotonic() - started)
            saved = time.monotonic()
    bar.close()
    run.seconds += time.monotonic() - started
    run.accelerator.end_training()


SHOWN = ("train_loss", "test_loss", "test_accuracy", "test_r2")


def add_row(run: Run, learning_rate: float) -> None:
    """Evaluates and appends a row to the history; the training loss is the mean over the steps since the last one."""
    row = {
        "step": run.step,
        "epoch": run.step / run.order.steps_per_epoch,
        "learning_rate": learning_rate,
        "train_loss": math.fsum(run.losses) / len(run.losses),
    }
    run.history.append(row | run.evaluate(run.model))
    run.losses.clear()
    run.accelerator.log(run.history[-1], step=run.step)


def train_step(run: Run, model: nn.Module) -> float:
    """One optimiser step, with the batch halved as often as memory asks for it; returns the mean loss over its rows."""
    rows = run.order(run.step)
    while (loss := try_gradients(run, model, rows)) is None:
        halve_batch(run, rows)
    if not math.isfinite(loss):
        some = ", ".join(map(str, rows[:20].tolist())) + (", ..." if len(rows) > 20 else "")
        raise UserError(
            f"The loss became {loss} at step {run.step + 1}, rows {some} of the train split. Try a smaller "
            "--learning_rate or --dtype float32; if it is the first step, look at those texts and labels."
        )
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return loss


def try_gradients(run: Run, model: nn.Module, rows: np.ndarray) -> float | None:
    """`accumulate_gradients`, or None where the device has too little memory; its tensors are then free again."""
    try:
        return accumulate_gradients(run, model, rows)
    except torch.OutOfMemoryError:
        return None


def accumulate_gradients(run: Run, model: nn.Module, rows: np.ndarray) -> float:
    """Adds up the gradient of the mean loss over `rows`, `batch_size` of them at a time; returns that loss.

    Each process takes its share of the rows; DDP averages over processes, hence the factor. A process without a row
    of its own at the end of an epoch runs one row with weight 0.
    """
    accelerator, num_rows = run.accelerator, len(rows)
    rank, world = accelerator.process_index, accelerator.num_processes
    own = rows[rank::world]
    weight = world / num_rows if len(own) else 0.0
    parts = np.split(own, range(run.batch_size, len(own), run.batch_size)) if len(own) else [rows[:1]]
    torch.manual_seed(int(np.random.SeedSequence((run.seed, run.step, rank)).generate_state(1)[0]))  # dropout
    total = torch.zeros((), device=run.targets.device)
    for number, part in enumerate(parts, 1):
        batch_targets = run.targets[torch.from_numpy(part).to(run.targets.device)]
        last = number == len(parts)
        with contextlib.nullcontext() if last else accelerator.no_sync(model):  # gradients are exchanged once a step
            loss = weight * run.objective.loss_sum(model(*run.inputs(part)), batch_targets)
            accelerator.backward(loss)
        total += loss.detach()
    return accelerator.reduce(total, "mean").item()


def halve_batch(run: Run, rows: np.ndarray) -> None:
    """Halves the rows of a forward pass, so that twice as many passes make up the same step.

    Raises:
        UserError: there is nothing left to halve, or several processes would have to agree.
    """
    if run.batch_size == 1 or run.accelerator.num_processes > 1:
        raise UserError(
            f"Out of memory at step {run.step + 1} with --batch_size {run.batch_size}. Try --gradient_checkpointing, "
            "--max_length, --dtype bfloat16 or a smaller --batch_size with more --gradient_accumulation."
        )
    passes, before = -(-len(rows) // run.batch_size), run.batch_size
    run.batch_size = -(-min(run.batch_size, len(rows)) // 2)
    run.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    tqdm.write(
        f"out of memory at step {run.step + 1}: batch {before} -> {run.batch_size}, accumulation {passes} -> "
        f"{-(-len(rows) // run.batch_size)}; the {len(rows)} texts of a step stay the same"
    )
