"""One training engine for linear_training.py, lora_finetuning.py and from_scratch.py: what is trained differs, not how.

The rows of a step, its dropout masks and its learning rate follow from (seed, step) alone. A state on disk therefore
needs weights, optimiser, scheduler and the step: a killed run goes on with the numbers of an uninterrupted one.
"""

import contextlib
import csv
import importlib.util
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from utils.data.load import LabelledTexts
from utils.models.batches import split_rows
from utils.models.check import routes_tokens
from utils.models.identity import model_fingerprint
from utils.parallel import processes
from utils.results import check_state, find_result, save_json, state_if_there_is_place, write_atomically
from utils.script import UserError, environment, pick_device, termination_noted
from utils.settings import Session, all_settings, result_settings
from utils.training.baselines import text_baselines
from utils.training.objective import BatchOrder, Objective
from utils.training.state import load_state, save_state


# ------------------------------------------------------------------ a run
@dataclass(frozen=True)
class Place:
    """Where a run takes place: its processes, its device, and the folder of its result."""

    accelerator: Accelerator
    device: torch.device
    folder: Path

    @property
    def state_path(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.json"


@dataclass(frozen=True)
class TrainingRun:
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
    place: Place
    identity: dict[str, Any]  # settings and fingerprints; a state of another run has others
    session: Session
    stop: Callable[[list[dict]], bool] = lambda history: False  # asked after each evaluation
    sides: np.ndarray | None = None  # (n,) training rows of different sides never share a forward pass

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


@dataclass
class Progress:
    """How far a run has come; with weights and optimiser its whole state."""

    batch_size: int  # that of the run, or smaller where memory ran out
    history: list[dict] = field(default_factory=list)
    step: int = 0  # optimiser steps done
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of the steps since the last row of the history


def make_place(config: Any, folder: Path) -> Place:
    """Processes and trackers by accelerate; the device named, or under torchrun the one of this process.

    accelerate trains in the group of processes that is there already, where the script has many.

    Raises:
        UserError: the device does not exist, or the package of the tracker is missing.
    """
    device, tracker = pick_device(config.run.device), config.session.track
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise UserError(f"--track {tracker} needs a package that is not installed. Run: pip install {tracker}")
    log_with = None if tracker == "none" else tracker
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=log_with, project_dir=folder / "track")
    if log_with:
        simple = {k: v if isinstance(v, int | float | str) else str(v) for k, v in all_settings(config).items()}
        accelerator.init_trackers(folder.parent.parent.name, config=simple)
    return Place(accelerator, device if accelerator.num_processes == 1 else accelerator.device, folder)


def make_identity(config: Any, data: dict[str, LabelledTexts]) -> dict[str, Any]:
    """What makes two runs the same: settings that change the result, the model, and the rows."""
    return {
        "config": result_settings(config),
        "model_fingerprint": model_fingerprint(config.model, config.run),
        "train_fingerprint": data["train"].fingerprint,
        "test_fingerprint": data["test"].fingerprint,
    }


def find_finished(config: Any, identity: dict[str, Any], place: Place) -> dict | None:
    """The metrics of a finished run of this identity, None where it has to be made.

    With --overwrite what is there stays until the new result takes its place; so does a state that this run can go on
    from, so that the same command goes on after a kill.

    Raises:
        UserError: a result, finished or not, of another identity; or it has to be made and cannot be written.
    """

    def look() -> dict | None:
        metrics = find_result(place.metrics_path, identity, config.run)
        if metrics is not None:
            print(f"reused, already complete with these settings:\n{place.metrics_path}")
        elif place.state_path.is_file():
            check_state(place.state_path, identity, config.run.overwrite)
        return metrics

    return processes().object_of_first(look)


# ------------------------------------------------------------------ training
def save_progress(run: TrainingRun, progress: Progress, seconds: float) -> None:
    """Writes the state of the run; in the main process, whose clock says when. The others wait in their next step.

    Where it cannot be written the run goes on without.
    """
    values = {**vars(progress), "seconds": seconds, "scheduler": run.scheduler.state_dict()}
    with state_if_there_is_place():
        save_state(run.place.state_path, run.trained_parameters(), run.optimizer, run.identity, values)


def any_asked(run: TrainingRun, asked: bool) -> bool:
    """Whether the system has asked any process to end: all end after the same step, or one would wait for another."""
    accelerator = run.place.accelerator
    if accelerator.num_processes == 1:
        return asked
    return bool(accelerator.reduce(torch.tensor(float(asked), device=run.targets.device), "sum") > 0)


def load_progress(run: TrainingRun) -> Progress:
    """The progress of an interrupted run, its state put into model, optimiser and schedule; else that of a new one.

    Raises:
        UserError: the state of another run, or one that only some of the processes see.
    """
    stored = load_state(run.place.state_path, run.trained_parameters(), run.optimizer, run.identity)
    step = stored and stored["step"]
    if processes().object_of_first(lambda: step) != step:
        raise UserError(
            f"{run.place.state_path} is not the same file for all processes. Set --results_dir to a folder that all "
            "machines share."
        )
    if stored is None:
        return Progress(run.batch_size)
    run.scheduler.load_state_dict(stored["scheduler"])
    for group, rate in zip(run.optimizer.param_groups, run.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    print(f"going on from step {stored['step']} of {run.num_steps}")
    return Progress(**{field.name: stored[field.name] for field in fields(Progress)})


def train(run: TrainingRun) -> Progress:
    """Trains until `num_steps` or until `stop` says so; goes on from the state of an interrupted run.

    Where the system asks it to end (SIGTERM) it keeps a state after the step that it is in.

    Raises:
        UserError: a loss that is not finite, too little memory, or the state of another run.
    """
    progress, accelerator = load_progress(run), run.place.accelerator
    # an expert that no token of a step goes to has no gradient
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=routes_tokens(run.model))
    model = accelerator.prepare_model(run.model, device_placement=False)
    started = saved = time.monotonic()
    run.model.train()
    is_main = accelerator.is_main_process
    bar = tqdm(
        total=run.num_steps, initial=progress.step, unit="step", desc="train", mininterval=1, disable=not is_main
    )
    with termination_noted() as termination:
        while progress.step < run.num_steps and not (progress.history and run.stop(progress.history)):
            rate = float(run.scheduler.get_last_lr()[0])
            progress.losses.append(train_step(run, progress, model))
            bar.update()
            if progress.step % run.steps_per_evaluation == 0 or progress.step == run.num_steps:
                run.model.eval()
                add_row(run, progress, rate)
                run.model.train()
                shown = [
                    f"{name} {value:.4f}" for name, value in progress.history[-1].items() if name in SHOWN and value
                ]
                bar.set_postfix_str(", ".join(shown), refresh=False)
            ends = any_asked(run, termination.asked) and progress.step < run.num_steps
            is_due = time.monotonic() - saved >= 60 * run.session.minutes_per_state
            if is_main and (ends or is_due) and progress.step < run.num_steps:
                save_progress(run, progress, progress.seconds + time.monotonic() - started)
                saved = time.monotonic()
            if ends:
                processes().leave()  # together, now that the state is written
                sys.exit(128 + signal.SIGTERM)
    bar.close()
    progress.seconds += time.monotonic() - started
    for tracker in accelerator.trackers:  # not by end_training(), which would also end the group of processes
        tracker.finish()
    return progress


SHOWN = ("train_loss", "test_loss", "test_accuracy", "test_r2")


def add_row(run: TrainingRun, progress: Progress, learning_rate: float) -> None:
    """Evaluates and appends a row to the history; the training loss is the mean over the steps since the last one."""
    row = {
        "step": progress.step,
        "epoch": progress.step / run.order.steps_per_epoch,
        "learning_rate": learning_rate,
        "train_loss": math.fsum(progress.losses) / len(progress.losses),
    }
    progress.history.append(row | run.evaluate(run.model))
    progress.losses.clear()
    run.place.accelerator.log(progress.history[-1], step=progress.step)


def train_step(run: TrainingRun, progress: Progress, model: nn.Module) -> float:
    """One optimiser step, with the batch halved as often as memory asks for it; returns the mean loss over its rows."""
    rows = run.order(progress.step)
    while (loss := try_gradients(run, progress, model, rows)) is None:
        halve_batch(run, progress, rows)
    if not math.isfinite(loss):
        some = ", ".join(map(str, rows[:20].tolist())) + (", ..." if len(rows) > 20 else "")
        raise UserError(
            f"The loss became {loss} at step {progress.step + 1}, rows {some} of the train split. Try a smaller "
            "--learning_rate or --dtype float32; if it is the first step, look at those texts and labels."
        )
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    return loss


def try_gradients(run: TrainingRun, progress: Progress, model: nn.Module, rows: np.ndarray) -> float | None:
    """`accumulate_gradients`, or None where the device has too little memory; its tensors are then free again."""
    try:
        return accumulate_gradients(run, progress, model, rows)
    except torch.OutOfMemoryError:
        return None


def accumulate_gradients(run: TrainingRun, progress: Progress, model: nn.Module, rows: np.ndarray) -> float:
    """Adds up the gradient of the mean loss over `rows`, `batch_size` of them at a time; returns that loss.

    Each process takes its share of the rows; DDP averages over processes, hence the factor. A process without a row
    of its own at the end of an epoch runs one row with weight 0.
    """
    accelerator, num_rows = run.place.accelerator, len(rows)
    rank, world = accelerator.process_index, accelerator.num_processes
    own = rows[rank::world]
    weight = world / num_rows if len(own) else 0.0
    parts = split_rows(own, progress.batch_size, run.sides) or [rows[:1]]
    torch.manual_seed(int(np.random.SeedSequence((run.seed, progress.step, rank)).generate_state(1)[0]))  # dropout
    total = torch.zeros((), device=run.targets.device)
    for number, part in enumerate(parts, 1):
        batch_targets = run.targets[torch.from_numpy(part).to(run.targets.device)]
        last = number == len(parts)
        with contextlib.nullcontext() if last else accelerator.no_sync(model):  # gradients are exchanged once a step
            loss = weight * run.objective.loss_sum(model(*run.inputs(part)), batch_targets)
            accelerator.backward(loss)
        total += loss.detach()
    return accelerator.reduce(total, "mean").item()


def halve_batch(run: TrainingRun, progress: Progress, rows: np.ndarray) -> None:
    """Halves the rows of a forward pass, so that twice as many passes make up the same step.

    Raises:
        UserError: there is nothing left to halve, or several processes would have to agree.
    """
    if progress.batch_size == 1 or run.place.accelerator.num_processes > 1:
        raise UserError(
            f"Out of memory at step {progress.step + 1} with --batch_size {progress.batch_size}. Try "
            "--gradient_checkpointing, --max_length, --dtype bfloat16 or a smaller --batch_size with more "
            "--gradient_accumulation."
        )
    passes, before = -(-len(rows) // progress.batch_size), progress.batch_size
    progress.batch_size = -(-min(progress.batch_size, len(rows)) // 2)
    run.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    tqdm.write(
        f"out of memory at step {progress.step + 1}: batch {before} -> {progress.batch_size}, accumulation {passes} -> "
        f"{-(-len(rows) // progress.batch_size)}; the {len(rows)} texts of a step stay the same"
    )


# ------------------------------------------------------------------ results
def best_row(history: list[dict], is_regression: bool) -> dict:
    """The row with the lowest validation loss; without a validation share the best on test, which flatters."""
    if "validation_loss" in history[0]:
        return min(history, key=lambda row: row["validation_loss"])
    return min(history, key=lambda row: row["test_loss"] if is_regression else -row["test_accuracy"])


def save_history(path: Path, history: list[dict]) -> None:
    """Writes one line per evaluation, atomically."""
    with write_atomically(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def save_result(
    run: TrainingRun,
    progress: Progress,
    data: dict[str, LabelledTexts],
    extra: dict,
    save_weights: Callable[[], None],
) -> dict:
    """Writes the weights, history.csv and, last, metrics.json; removes the state; returns the metrics.

    All of it is computed before any of it is written: what was there does not stand long beside what is new.
    """
    metrics = {
        **run.identity,
        "environment": environment(),
        "num_train": len(data["train"].texts),
        "num_test": len(data["test"].texts),
        "label_names": data["train"].label_names,
        "num_trained_parameters": sum(p.numel() for p in run.trained_parameters().values()),
        "num_steps": progress.step,
        "texts_per_step": run.order.rows_per_step,
        "batch_size": progress.batch_size,  # smaller than asked for where memory ran out
        "num_processes": run.place.accelerator.num_processes,
        "seconds": progress.seconds,
        **extra,
        "last": progress.history[-1],
        "best": best_row(progress.history, run.objective.is_regression),
        "best_rule": "validation loss" if "validation_loss" in progress.history[0] else "test score (flatters)",
        "baselines": text_baselines(data["train"], data["test"]),
    }
    save_weights()
    save_history(run.place.folder / "history.csv", progress.history)
    save_json(run.place.metrics_path, metrics)
    run.place.state_path.unlink(missing_ok=True)
    return metrics


def print_scores(metrics: dict) -> None:
    """The last and the best step beside the baselines."""
    names = [name for name in metrics["last"] if name.startswith(("validation_", "test_"))]
    names = [name for name in names if name.endswith(("loss", "accuracy", "f1", "r2", "mse", "pearson"))]
    rows = {"last": metrics["last"], f"best by {metrics['best_rule']}": metrics["best"]}
    for title, scores in metrics["baselines"].items():
        rows[title] = {f"test_{name}": value for name, value in (scores | {"loss": scores.get("log_loss")}).items()}
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=["step", *names])
    table.columns = table.columns.str.replace("_", " ")
    table = table.astype({"step": "Int64"}).astype({name: float for name in table.columns[1:]})
    print("\n" + table.to_string(float_format="{:.4f}".format, na_rep=""))
