"""What training runs leave on disk: the state of an unfinished one, and the result of a finished one.

Both hold the settings and the fingerprints of the rows, and are used again only where these are the same.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from utils.baselines import text_baselines
from utils.data import LabelledTexts
from utils.io import (
    FORMAT_VERSION,
    UserError,
    check_same_settings,
    environment,
    load_json,
    open_tensors,
    path_name,
    result_settings,
    save_json,
    save_tensors,
    write_atomically,
)

if TYPE_CHECKING:
    from utils.training import Head, Objective, Run


# ------------------------------------------------------------------ state of an unfinished run
def save_state(run: Run, seconds: float) -> None:
    """Writes weights, optimiser, scheduler and progress as one safetensors file; the main process does, all wait."""
    if run.accelerator.is_main_process:
        tensors: dict[str, Tensor] = {f"weight.{k}": v for k, v in run.trained_parameters().items()}
        numbers: dict[str, dict[str, float]] = {}
        for index, state in run.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
            numbers[index] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        progress = {name: getattr(run, name) for name in ("step", "history", "losses", "batch_size")}
        progress |= {"seconds": seconds, "optimizer": numbers, "scheduler": run.scheduler.state_dict()}
        save_tensors(run.state_path, tensors, {"format_version": FORMAT_VERSION, **run.identity, **progress})
    run.accelerator.wait_for_everyone()


def load_state(run: Run) -> None:
    """Puts the state of an interrupted run, if there is one, into `run`; `find_finished` has compared its settings."""
    if not run.state_path.is_file():
        return
    with open_tensors(run.state_path) as (file, progress):
        with torch.no_grad():
            for name, parameter in run.trained_parameters().items():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
        states: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in progress["optimizer"].items()}
        for key in file.keys():  # noqa: SIM118, not a dict
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                states[int(index)][name] = file.get_tensor(key)
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": states})
    run.scheduler.load_state_dict(progress["scheduler"])
    for group, rate in zip(run.optimizer.param_groups, run.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    for name in ("step", "history", "losses", "batch_size", "seconds"):
        setattr(run, name, progress[name])
    print(f"going on from step {run.step} of {run.num_steps}")


# ------------------------------------------------------------------ results
def result_folder(config: Any, kind: str) -> Path:
    """`<results_dir>/<kind>/<model>/<dataset>`."""
    return config.results_dir / kind / path_name(config.model_name) / path_name(config.dataset_name)


def make_identity(config: Any, train_data: LabelledTexts, test_data: LabelledTexts) -> dict[str, Any]:
    """What makes two runs the same: settings that change the result, and the rows."""
    fingerprints = {"train_fingerprint": train_data.fingerprint, "test_fingerprint": test_data.fingerprint}
    return {"config": result_settings(config), **fingerprints}


def find_finished(folder: Path, config: Any, identity: dict[str, Any], accelerator: Accelerator) -> dict | None:
    """The metrics of a finished result with these settings and rows; with --overwrite the old ones are removed.

    Raises:
        UserError: a result, finished or not, with other settings or of other rows.
    """
    metrics_path, state_path = folder / "metrics.json", folder / "state.safetensors"
    if config.overwrite:
        if accelerator.is_main_process:
            metrics_path.unlink(missing_ok=True)
            state_path.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        return None
    metrics = load_json(metrics_path) if metrics_path.is_file() else None
    found = {metrics_path: metrics} if metrics else {}
    if state_path.is_file():
        with open_tensors(state_path) as (_, progress):
            found[state_path] = progress
    for path, stored in found.items():
        check_same_settings(stored["config"], config, path)
        if any(stored[name] != identity[name] for name in ("train_fingerprint", "test_fingerprint")):
            raise UserError(f"{path} was made from other rows of {config.dataset_name}. Train again with --overwrite.")
    if metrics:
        print(f"reused, already complete with these settings:\n{metrics_path}")
    return metrics


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
    save_tensors(path, {"weight": weight.float(), "bias": bias.float()}, {"format_version": FORMAT_VERSION, **metadata})


def best_row(history: list[dict], is_regression: bool) -> dict:
    """The row with the lowest validation loss; without a validation share the best on test, which flatters."""
    if "validation_loss" in history[0]:
        return min(history, key=lambda row: row["validation_loss"])
    return min(history, key=lambda row: row["test_loss"] if is_regression else -row["test_accuracy"])


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, and puts it in its place on success."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_history(path: Path, history: list[dict]) -> None:
    """Writes one line per evaluation, atomically."""
    with write_atomically(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def save_result(folder: Path, run: Run, train_data: LabelledTexts, test_data: LabelledTexts, extra: dict) -> dict:
    """Writes history.csv and, last, metrics.json; removes the state; returns the metrics."""
    metrics = {
        **run.identity,
        "environment": environment(),
        "num_train": len(train_data.texts),
        "num_test": len(test_data.texts),
        "label_names": train_data.label_names,
        "num_trained_parameters": sum(p.numel() for p in run.trained_parameters().values()),
        "num_steps": run.step,
        "texts_per_step": run.order.rows_per_step,
        "batch_size": run.batch_size,  # smaller than asked for where memory ran out
        "num_processes": run.accelerator.num_processes,
        "seconds": run.seconds,
        **extra,
        "last": run.history[-1],
        "best": best_row(run.history, run.objective.is_regression),
        "best_rule": "validation loss" if "validation_loss" in run.history[0] else "test score (flatters)",
        "baselines": text_baselines(train_data, test_data),
    }
    save_history(folder / "history.csv", run.history)
    save_json(folder / "metrics.json", metrics)
    run.state_path.unlink(missing_ok=True)
    return metrics


def print_scores(metrics: dict) -> None:
    """The last and the best step beside the baselines."""
    names = [name for name in metrics["last"] if name.startswith(("validation_", "test_"))]
    names = [name for name in names if name.endswith(("loss", "accuracy", "f1", "r2", "mse", "pearson"))]
    print(f"\n{'':<26}{'step':>7}" + "".join(f"{name.replace('_', ' '):>24}" for name in names))
    for row in ("last", "best"):
        title = row if row == "last" else f"best by {metrics['best_rule']}"
        cells = [metrics[row][name] for name in names]
        print(
            f"{title:<26}{metrics[row]['step']:>7}" + "".join(f"{'' if c is None else f'{c:.4f}':>24}" for c in cells)
        )
    for title, scores in metrics["baselines"].items():
        scores = {**scores, "loss": scores.get("log_loss")}
        cells = [scores.get(name.removeprefix("test_")) for name in names]
        print(f"{title:<26}{'':>7}" + "".join(f"{'' if cell is None else f'{cell:.4f}':>24}" for cell in cells))
