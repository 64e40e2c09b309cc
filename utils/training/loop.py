"""Train the models of linear_training.py, lora_finetuning.py and from_scratch.py.

The rows of a step, its dropout masks and its learning rate follow from (seed, step) alone. A state on disk therefore
needs only weights, optimiser and step, and a killed run continues with the numbers of an uninterrupted one.
"""

import contextlib
import importlib.util
import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import results
from utils.data.load import LabelledTexts
from utils.models.batches import split_rows
from utils.models.check import routes_tokens
from utils.models.load import model_fingerprint, stored_as
from utils.parallel import leave, object_of_first
from utils.script import UserError, environment, pick_device, termination_noted
from utils.settings import all_settings, result_settings
from utils.training.baselines import text_baselines
from utils.training.objective import BatchOrder, Objective

STATE, METRICS = "state.safetensors", "metrics.json"  # in the folder of a result; a finished run has no state


@dataclass(frozen=True)
class TrainingRun:
    """One training run; n training rows, b rows of a batch, c outputs."""

    model: Any  # a module, from the results of `inputs` to (b, c); the run trains parameters that require a gradient
    inputs: Callable[[np.ndarray], tuple[Tensor, ...]]  # training rows (b,) -> inputs of the model, on its device
    targets: Tensor  # (n,), on the device
    objective: Objective
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]  # step, counted from 0 -> learning rate
    order: BatchOrder
    evaluate: Callable[[nn.Module], dict[str, Any]]  # a row of the history, without step and training loss
    num_steps: int
    steps_per_evaluation: int
    batch_size: int  # rows of one forward pass; a step has order.rows_per_step of them, over all processes
    accelerator: Any  # accelerate's
    folder: Path  # folder of the result
    identity: dict[str, Any]  # settings and fingerprints; `load_progress` refuses the state of another run
    config: Any  # the settings of the script
    save_weights: Callable[[], None]  # writes the trained weights into the folder
    stop: Callable[[list[dict]], bool] = lambda history: False  # called after each evaluation
    sides: np.ndarray | None = None  # (n,) training rows of different sides never share a forward pass

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


@dataclass
class Progress:
    """The progress of a run; together with weights and optimiser it is the run's whole state."""

    history: list[dict] = field(default_factory=list)
    step: int = 0  # optimiser steps done
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # losses of the steps since the last row of the history


# ------------------------------------------------------------------ one result
def make_identity(config: Any, data: dict[str, LabelledTexts]) -> dict[str, Any]:
    """The identity of a run: settings that change the result, fingerprints of the model and of the rows."""
    return {
        "config": result_settings(config),
        "model_fingerprint": model_fingerprint(config.model, config.run),
        "train_fingerprint": data["train"].fingerprint,
        "test_fingerprint": data["test"].fingerprint,
    }


def find_finished(config: Any, folder: Path, data: dict[str, LabelledTexts]) -> dict | None:
    """The metrics of a finished run; None if the caller must make it. Raises UserError: it has another identity."""
    return results.find_result(folder / METRICS, make_identity(config, data), config.run)


def train_once(config: Any, folder: Path, data: dict[str, LabelledTexts], build: Callable[[Any], TrainingRun]) -> dict:
    """The metrics of the run that `build` makes, in every process; reused if `folder` has a result of this identity."""
    with results.one_run_at_a_time(folder / METRICS):
        metrics = object_of_first(lambda: find_finished(config, folder, data))
        if metrics is not None:
            print(f"reused, already complete with these settings:\n{folder / METRICS}")
            return metrics
        run = build(start_accelerator(config, folder))
        progress = train(run)
        return object_of_first(lambda: save_result(run, progress, data))


def start_accelerator(config: Any, folder: Path) -> Any:
    """Starts accelerate on the device asked for, with its tracker, in the existing group of processes."""
    from accelerate import Accelerator

    device, tracker = pick_device(config.run.device), config.session.track
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise UserError(f"--track {tracker} needs a package that is not installed. Run: pip install {tracker}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # the one that accelerate takes
    log = {"log_with": None if tracker == "none" else tracker, "project_dir": folder / "track"}
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", **log)
    simple = {k: v if isinstance(v, int | float | str) else str(v) for k, v in all_settings(config).items()}
    accelerator.init_trackers(folder.parent.parent.name, config=simple)
    return accelerator


# ------------------------------------------------------------------ state of an unfinished run
def save_state(run: TrainingRun, progress: Progress) -> None:
    """Writes weights, optimiser, identity and progress of a run."""
    tensors: dict[str, Tensor] = {f"weight.{name}": weight for name, weight in run.trained_parameters().items()}
    for index, state in run.optimizer.state_dict()["state"].items():  # with numbers, such as the count of steps
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    results.save_tensors(run.folder / STATE, tensors, run.identity | vars(progress))


def load_progress(run: TrainingRun) -> Progress:
    """Loads an interrupted run into model and optimiser; returns its progress. Raises UserError: a wrong state."""
    path, overwrite, progress = run.folder / STATE, run.config.run.overwrite, Progress()
    object_of_first(lambda: results.check_state(path, run.identity, overwrite) if path.is_file() else None)
    if path.is_file():
        states: dict[int, dict[str, Tensor]] = defaultdict(dict)
        with results.open_tensors(path) as (file, stored), torch.no_grad():
            for name, parameter in run.trained_parameters().items():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
            for key in file.keys():  # noqa: SIM118, no dict
                if key.startswith("optimizer."):
                    _, index, name = key.split(".")
                    states[int(index)][name] = file.get_tensor(key)
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": dict(states)})
        progress = Progress(**{name: stored[name] for name in vars(progress)})
        print(f"going on from step {progress.step} of {run.num_steps}")
    if object_of_first(lambda: progress.step) != progress.step:
        raise UserError(f"{path} differs between machines. Set --results_dir to a folder they share.")
    return progress


# ------------------------------------------------------------------ training
def train(run: TrainingRun) -> Progress:
    """Trains up to `num_steps` or until `stop` is true, from the state of an interrupted run if one exists."""
    from accelerate import DistributedDataParallelKwargs

    progress, accelerator = load_progress(run), run.accelerator
    # an expert to which a step sends no token has no gradient
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=routes_tokens(run.model))
    model = accelerator.prepare_model(run.model, device_placement=False)
    run.model.train()
    clock, saved = time.monotonic(), progress.seconds
    bar = tqdm(desc="train", total=run.num_steps, initial=progress.step, unit="step")
    with bar, termination_noted() as termination:
        while progress.step < run.num_steps and not (progress.history and run.stop(progress.history)):
            progress.losses.append(train_step(run, progress, model))
            bar.update()
            is_last = progress.step == run.num_steps
            if progress.step % run.steps_per_evaluation == 0 or is_last:
                add_row(run, progress)
            progress.seconds += time.monotonic() - clock
            clock = time.monotonic()
            # all processes must end after the same step, or one would wait for another
            asked = torch.tensor(float(termination.is_set()), device=run.targets.device)
            is_ended = accelerator.reduce(asked).item() > 0
            is_due = progress.seconds - saved >= 60 * run.config.session.minutes_per_state
            if accelerator.is_main_process and (is_ended or is_due) and not is_last:
                save_state(run, progress)
                saved = progress.seconds
            if is_ended and not is_last:
                leave()  # together, now that the state is written
                sys.exit(128 + signal.SIGTERM)
    for tracker in accelerator.trackers:  # not by end_training(), which would also end the group of processes
        tracker.finish()
    return progress


def add_row(run: TrainingRun, progress: Progress) -> None:
    """Evaluates and appends a row to the history; its training loss is the mean since the last row."""
    row = {
        "step": progress.step,
        "epoch": progress.step / run.order.steps_per_epoch,
        "learning_rate": run.learning_rate(progress.step - 1),
        "train_loss": math.fsum(progress.losses) / len(progress.losses),
    }
    run.model.eval()
    row |= run.evaluate(run.model)
    run.model.train()
    progress.history.append(row)
    progress.losses.clear()
    run.accelerator.log(row, step=progress.step)


def train_step(run: TrainingRun, progress: Progress, model: nn.Module) -> float:
    """One optimiser step; returns the mean loss over its rows."""
    rows = run.order(progress.step)
    loss = accumulate_gradients(run, progress.step, model, rows)
    if not math.isfinite(loss):
        found = f"The loss became {loss} at step {progress.step + 1}, rows {', '.join(map(str, rows))} of train"
        raise UserError(f"{found}. Lower --learning_rate or set --dtype float32; at step 1, check texts and labels.")
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate(progress.step)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    return loss


def accumulate_gradients(run: TrainingRun, step: int, model: nn.Module, rows: np.ndarray) -> float:
    """Adds up the gradient of the mean loss over `rows`, `batch_size` of them at a time; returns that loss.

    A process without a row of its own at the end of an epoch runs one row with weight 0.
    """
    accelerator = run.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    own = rows[rank::world]
    weight = world / len(rows) if len(own) else 0.0  # DDP averages over processes
    parts = split_rows(own, run.batch_size, run.sides) or [rows[:1]]
    torch.manual_seed(int(np.random.SeedSequence((run.order.seed, step, rank)).generate_state(1)[0]))  # dropout
    total = torch.zeros((), device=run.targets.device)
    for number, part in enumerate(parts, 1):
        batch_targets = run.targets[torch.from_numpy(part).to(run.targets.device)]
        is_last = number == len(parts)
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):  # one exchange of gradients a step
            loss = weight * run.objective.loss_sum(model(*run.inputs(part)), batch_targets)
            accelerator.backward(loss)
        total += loss.detach()
    return accelerator.reduce(total, "mean").item()


# ------------------------------------------------------------------ results
def best_row(history: list[dict], is_regression: bool) -> dict:
    """The row with the lowest validation loss; without a validation share the best on test, an optimistic choice."""
    if "validation_loss" in history[0]:
        return min(history, key=lambda row: row["validation_loss"])
    return min(history, key=lambda row: row["test_loss"] if is_regression else -row["test_accuracy"])


def save_result(run: TrainingRun, progress: Progress, data: dict[str, LabelledTexts]) -> dict:
    """Writes the weights, history.csv and, last, metrics.json; prints and returns the metrics."""
    history = progress.history
    metrics = {
        **run.identity,
        "environment": environment(),
        "num_train": len(data["train"].texts),
        "num_test": len(data["test"].texts),
        "label_names": data["train"].label_names,
        "num_trained_parameters": sum(p.numel() for p in run.trained_parameters().values()),
        "num_steps": progress.step,
        "texts_per_step": run.order.rows_per_step,
        "num_processes": run.accelerator.num_processes,
        "seconds": progress.seconds,
        **stored_as(run.config.model),
        "last": history[-1],
        "best": best_row(history, run.objective.is_regression),
        "best_rule": "validation loss" if "validation_loss" in history[0] else "test score (flatters)",
        "baselines": text_baselines(data["train"], data["test"]),
    }
    run.save_weights()  # now that all is computed: old and new files coexist only briefly
    (run.folder / METRICS).unlink(missing_ok=True)  # left by an earlier run
    with results.write_atomically(run.folder / "history.csv") as temporary:
        pd.DataFrame(history).to_csv(temporary, index=False)
    results.save_json(run.folder / METRICS, metrics)
    (run.folder / STATE).unlink(missing_ok=True)
    print_scores(metrics)
    print(run.folder / METRICS)
    return metrics


def print_scores(metrics: dict) -> None:
    """Prints the test scores of the last and the best step, beside those of the baselines."""
    rows = {name: {f"test_{k}": v for k, v in scores.items()} for name, scores in metrics["baselines"].items()}
    rows |= {"last": metrics["last"], f"best by {metrics['best_rule']}": metrics["best"]}
    names = ["step", *(name for name in metrics["last"] if name.startswith("test_"))]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=names).astype({"step": "Int64"})
    print("\n" + table.to_string(float_format="{:.4f}".format, na_rep=""))
