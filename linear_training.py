"""Train a linear probe by gradient descent on the last layer of a frozen LM: the baseline for LoRA.

    python linear_training.py                                        # embedded model and data, the paper's settings
    python linear_training.py --standardize --learning_rate 1e-3     # a probe that has converged after 50 epochs
    python linear_training.py --validation_share 0.1 --patience 5 --num_epochs 500
    python linear_training.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion --dtype bfloat16

Reads results/moments/<model>/<dataset>/{train,test}.pooled.npy; cache.py makes them here if they are missing.
Writes results/linear_training/<model>/<dataset>/{metrics.json,history.csv,head.safetensors}; --standardize writes
to <dataset>.standardized/, beside the paper's probe.

The LM runs once. Dropout acts on the pooled state m (d,), which a frozen LM never changes. Epochs over the stored
states therefore compute the same as epochs through the LM: head(dropout(m)) -> (c,), cross-entropy, AdamW.

Differs from the paper: head and pooled states are in float32; the paper trains under bfloat16 autocast.

The defaults are the paper's settings, which stop before the probe converges. On the embedded model and data, test loss
and accuracy are 1.258 and .585 after these 50 epochs; with --standardize, 1.289 and .590 after 50 and 1.213 and .599
after 300; with --standardize --learning_rate 1e-3, 1.215 and .594 after 50. So part of LoRA's gain is convergence.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import cache
from utils.algebra.moments import load_pooled
from utils.data.load import LabelledTexts, load_splits
from utils.data.splits import stratified_rows
from utils.models.load import load_config
from utils.parallel import object_of_first
from utils.results import result_path, settings_from_moments
from utils.script import UserError, run_script
from utils.settings import Data, Model, Run, Session, check
from utils.training.loop import TrainingRun, make_identity, train_once
from utils.training.objective import BatchOrder, Objective, make_head, save_head

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    pooling: Literal["mean", "last"] = "mean"  # pooled state of a text: mean of its tokens, or its last token
    dropout: float = 0.05  # dropout on the pooled state
    learning_rate: float = 1e-4  # learning rate of AdamW
    weight_decay: float = 0.01  # weight decay of AdamW
    batch_size: int = 64  # texts per step
    num_epochs: int = 50  # passes over the training states; accuracy on test after each
    standardize: bool = False  # scale inputs to mean 0 and variance 1 over the training rows
    validation_share: float = 0.0  # stratified share of the training rows kept apart to choose the best epoch
    patience: int | None = None  # stop after so many epochs without a new lowest validation loss; None: never
    model: Model = Model()  # The LM, and the number of tokens of a text that it reads; the probe is always float32.
    data: Data = Data()
    session: Session = Session()
    run: Run = Run()

    def __post_init__(self) -> None:
        check(self, "at least 1", "batch_size", "num_epochs", "patience")
        check(self, "at least 0, below 3e38", "weight_decay")
        check(self, "positive, below 3e38", "learning_rate")
        check(self, "in [0, 1)", "dropout", "validation_share")
        if self.patience is not None and not self.validation_share:
            raise ValueError("--patience needs a --validation_share above 0, such as 0.1")


def find_states(config: Any, split: Literal["train", "test"], save_pooled: Literal["last", "all"],
                data: LabelledTexts) -> Path:  # fmt: skip
    """Makes a split's moments and the pooled states of its last layer, or of all, if missing; returns their path."""
    wanted = cache.Config(
        split, config.pooling, model=config.model, data=config.data, output=cache.Output(save_pooled), run=config.run
    )
    unimportant = ("num_folds", "product_dtype")  # they cannot affect the states
    return cache.ensure(settings_from_moments(wanted, cache.config_path(wanted), unimportant), data)


def validation_rows(data: LabelledTexts, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The sorted row numbers to train on and to validate on; if `share` is above 0, at least one each.

    Raises:
        UserError: no row remains to train on.
    """
    num_rows = len(data.texts)
    if not share:
        return np.arange(num_rows), np.arange(0)
    num_held_out = max(1, round(share * num_rows))
    if num_held_out == num_rows:
        raise UserError(
            f"--validation_share {share:g} leaves none of the {num_rows} train texts to train on. Lower it."
        )
    classes = np.zeros(num_rows) if data.is_regression else data.labels
    held_out = np.sort(stratified_rows(classes, num_held_out, seed))
    return np.setdiff1d(np.arange(num_rows), held_out), held_out


def standardization(states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each coordinate, (d,) float64; the deviation of a constant is 1."""
    spread = states.double().std(0, correction=0)
    return states.double().mean(0), torch.where(spread > 0, spread, 1)


@torch.no_grad()
def evaluate(head: torch.nn.Module, objective: Objective, parts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Scores of the head on the states and targets of each part, as `<part>_<score>`."""
    found = {part: objective.scores(head(states).cpu(), targets) for part, (states, targets) in parts.items()}
    return {f"{part}_{name}": value for part, scores in found.items() for name, value in scores.items()}


def build_run(config: Config, data: dict[str, LabelledTexts], accelerator: Any, folder: Path) -> TrainingRun:
    """The run of a head with AdamW over the stored states; makes missing states."""
    device = accelerator.device
    kept, held_out = validation_rows(data["train"], config.validation_share, config.data.seed)
    states = {split: load_pooled(find_states(config, split, "last", data[split]), -1) for split in SPLITS}
    mean, spread = standardization(states["train"][kept]) if config.standardize else (0.0, 1.0)
    states = {split: ((found - mean) / spread).float().to(device) for split, found in states.items()}
    objective = Objective.of(data["train"])
    targets = {split: objective.targets(data[split].labels) for split in SPLITS}
    parts = {"test": (states["test"], targets["test"])}
    if len(held_out):
        parts["validation"] = (states["train"][held_out], targets["train"][held_out])
    train_states, identity = states["train"][kept], make_identity(config, data)
    torch.manual_seed(config.data.seed)
    head = make_head(train_states.shape[1], objective.num_labels, config.dropout).to(device)
    order = BatchOrder(len(kept), config.batch_size, config.data.seed)

    def has_stalled(history: list[dict]) -> bool:
        if config.patience is None:
            return False
        losses = [row["validation_loss"] for row in history]
        return len(losses) - 1 - int(np.argmin(losses)) >= config.patience

    return TrainingRun(
        model=head,
        inputs=lambda rows: (train_states[torch.from_numpy(rows).to(device)],),
        targets=targets["train"][kept].to(device),
        objective=objective,
        optimizer=torch.optim.AdamW(head.parameters(), config.learning_rate, weight_decay=config.weight_decay),
        learning_rate=lambda step: config.learning_rate,
        order=order,
        evaluate=lambda model: object_of_first(lambda: evaluate(model, objective, parts)),
        num_steps=config.num_epochs * order.steps_per_epoch,
        steps_per_evaluation=order.steps_per_epoch,
        batch_size=config.batch_size,
        accelerator=accelerator,
        folder=folder,
        identity=identity,
        config=config,
        save_weights=lambda: save_head(folder / "head.safetensors", head, objective, identity, mean, spread),
        stop=has_stalled,
    )


def run(config: Config, data: dict[str, LabelledTexts]) -> dict:
    """Trains the probe and writes its result, unless it exists already; returns the metrics, in every process."""
    ending = ".standardized" if config.standardize else ""
    folder = result_path("linear_training", config.run, config.model, config.data, ending)
    return train_once(config, folder, data, lambda accelerator: build_run(config, data, accelerator, folder))


def main(config: Config) -> None:
    """Trains the probe and writes its result, unless it exists already."""
    moments = cache.Config(model=config.model, data=config.data, run=config.run)
    config = settings_from_moments(config, cache.config_path(moments))
    load_config(config.model, config.run)  # refuses a wrong name before it reads the data
    run(config, load_splits(config.data, config.run))


if __name__ == "__main__":
    run_script(main, Config, __doc__, share_work=True)
