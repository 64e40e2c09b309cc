"""Fit scikit-learn's linear probes on the pooled states of every layer: logistic regression and least squares.

    python linear_sklearn.py                                         # embedded model and data
    python linear_sklearn.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion
    python linear_sklearn.py --solver saga                           # as in the paper's Figure 2 (scores on train)

Reads results/moments/<model>/<dataset>/{train,test}.pooled.npy; cache.py makes them here if they are missing.
Fits on train, scores on train and test.
Writes results/linear_sklearn/<model>/<dataset>.json and a picture beside it (.png, .pdf).

Symbols, per layer: X (n, d) pooled states, standardised on train (StandardScaler); y labels, Y (n, c) one-hot.

    logistic regression  min over W, b   sum_i log-loss(y_i, softmax(W x_i + b)) + |W|^2 / 2C     classification only
    least squares        min over W, b   |Y - X W - 1 b'|^2, of smallest norm if n < d
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import cache
from linear_training import SPLITS, find_states
from utils import results
from utils.algebra.linalg import whiten, without_constants
from utils.algebra.moments import load_pooled, open_pooled
from utils.data.load import LabelledTexts, load_splits
from utils.models.load import load_config, model_fingerprint, stored_as
from utils.pictures import plot_probes, save_figure
from utils.script import UserError, environment, pick_device, run_script
from utils.settings import Data, Model, Run, Unrecorded, check, result_settings
from utils.training.baselines import text_baselines
from utils.training.metrics import classification_scores, regression_scores, squared_error_scores
from utils.training.probes import as_array, preconditioned_start

ROWS_AT_ONCE = 8192  # rows widened to float64 at a time


@dataclass(frozen=True)
class Output(Unrecorded):
    """Settings of the picture and the processes."""

    num_workers: int = 1  # processes on the CPU, each fits one layer at a time
    picture: bool = True  # also draw the picture

    def __post_init__(self) -> None:
        check(self, "positive, below 3e38", "num_workers")


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    pooling: Literal["mean", "last"] = "mean"  # pooled state of a text: mean of its tokens, or its last token
    solver: Literal["lbfgs", "saga"] = "lbfgs"  # solver of logistic regression; saga is the paper's
    inverse_penalty: float = 1.0  # scikit-learn's C
    max_iter: int | None = None  # None: 10000 for lbfgs, 1000 for saga (the paper's)
    tolerance: float | None = None  # None: 1e-4 for lbfgs, 0.01 for saga (the paper's)
    model: Model = Model()
    data: Data = Data()
    output: Output = Output()
    run: Run = Run()  # Device, folders and speed; a GPU works through scikit-learn's array API.

    def __post_init__(self) -> None:
        check(self, "positive, below 3e38", "inverse_penalty", "max_iter", "tolerance")


# ------------------------------------------------------------------ one layer
def least_squares(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (d, c) and intercept (c,), float64, of the least-squares fit; of smallest norm if n <= d.

    Equals StandardScaler + LinearRegression with its cut: singular values of X below 1e-6 of the largest are zero. It
    solves the normal equations of X, centred and scaled in float64: no shift or unit of a feature costs a digit.
    """
    mean, label_mean = features.mean(0, dtype=torch.float64), targets.mean(0)
    covariance, cross = torch.zeros_like(torch.outer(mean, mean)), torch.zeros_like(torch.outer(mean, label_mean))
    for rows, row_targets in zip(features.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
        centred = rows.double() - mean
        covariance += centred.T @ centred / len(features)
        cross += centred.T @ (row_targets - label_mean) / len(features)
    whitener = whiten(without_constants(covariance, mean, 1e-12), 1e-12)
    weights = whitener @ (whitener.T @ cross)
    return weights, label_mean - mean @ weights


def probe_device(config: Config) -> torch.device:
    """The device that fits the probes; always the CPU for saga."""
    return pick_device(config.run.device if config.solver == "lbfgs" else "cpu")


def fit_logistic(config: Config, features: Tensor, labels: np.ndarray) -> tuple[Any, dict]:
    """A fitted LogisticRegression, and {"num_iterations", "converged"} with the iterations of scikit-learn.

    lbfgs starts at `preconditioned_start`; if rounding of float32 features stops it early, it continues in float64.
    `features` (n, d) are standardised, float32; each of the classes 0..c-1 has a text in `labels` (n,).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    max_iter, tolerance = {"lbfgs": (10_000, 1e-4), "saga": (1000, 0.01)}[config.solver]
    max_iter, tolerance, penalty = config.max_iter or max_iter, config.tolerance or tolerance, config.inverse_penalty
    model = LogisticRegression(
        solver=config.solver, C=penalty, max_iter=max_iter, tol=tolerance, random_state=config.data.seed
    )
    if config.solver == "lbfgs":
        binary = labels.max() == 1  # scikit-learn then fits one logit: half the penalty of two opposite ones
        start = preconditioned_start(features, labels, penalty / (2 if binary else 1))
        start = start[1:] - start[:1] if binary else start
        model.warm_start, model.coef_, model.intercept_ = True, start[:, :-1].copy(), start[:, -1].copy()
    num_iterations = 0
    for dtype in (features.dtype, torch.float64):
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(as_array(features.to(dtype)), labels)
        num_iterations += int(model.n_iter_[0])
        converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in raised)
        if converged or config.solver != "lbfgs" or num_iterations >= max_iter:
            break
    return model, {"num_iterations": num_iterations, "converged": converged}


def logistic_scores(config: Config, features: dict[str, Tensor], data: dict[str, LabelledTexts]) -> dict[str, dict]:
    """Scores of logistic regression on each split; and, as `solver`, its iterations and convergence."""
    import sklearn
    from sklearn.preprocessing import StandardScaler

    # the array API keeps tensors on their device; on the CPU scikit-learn is faster on numpy arrays
    with sklearn.config_context(array_api_dispatch=features["train"].device.type != "cpu"):
        scaler = StandardScaler(copy=False).fit(as_array(features["train"]))
        scaled = {split: torch.as_tensor(scaler.transform(as_array(x))) for split, x in features.items()}
        model, solver = fit_logistic(config, scaled["train"], data["train"].labels)
        scores = {"solver": solver}
        for split, part in data.items():
            probabilities = torch.as_tensor(model.predict_proba(as_array(scaled[split]))).cpu().numpy()
            scores[split] = classification_scores(part.labels, probabilities)
    return scores


def probe_layer(config: Config, paths: dict[str, Path], data: dict[str, LabelledTexts], layer: int) -> dict:
    """Fits the probes of one layer on train; returns its JSON entry, with scores on both splits of `data`."""
    device = probe_device(config)
    entry: dict[str, Any] = {"layer": layer}
    features = {split: load_pooled(path, layer).to(device) for split, path in paths.items()}
    targets = {split: cache.one_hot_targets(part) for split, part in data.items()}
    weights, intercept = least_squares(features["train"], targets["train"].to(device))
    for split, part in data.items():
        parts = [rows.double() @ weights + intercept for rows in features[split].split(ROWS_AT_ONCE)]  # X W + 1 b'
        predictions = torch.cat(parts).cpu().numpy()
        if part.is_regression:
            entry[split] = regression_scores(part.labels, predictions[:, 0])
        else:
            entry[split] = squared_error_scores(targets[split].numpy(), predictions)
    if not data["train"].is_regression:
        logistic = logistic_scores(config, features, data)
        entry |= {"solver": logistic["solver"], **{split: logistic[split] | entry[split] for split in data}}
    return entry


# ------------------------------------------------------------------ all layers
def probe_layers(config: Config, data: dict[str, LabelledTexts]) -> dict:
    """Fits the probes of all layers; returns the result without its identity."""
    import joblib

    paths = {split: find_states(config, split, "all", data[split]) for split in SPLITS}
    num_layers, num_train, width = open_pooled(paths["train"]).shape
    num_workers = config.output.num_workers if probe_device(config).type == "cpu" else 1  # they would share the GPU
    print(f"{num_layers} layers, {num_train:,} train texts, {width} features: {num_workers} at a time")
    calls = [joblib.delayed(probe_layer)(config, paths, data, layer) for layer in range(num_layers)]
    return {
        "environment": environment(),
        "num_samples": {split: len(part.texts) for split, part in data.items()},
        "num_classes": len(data["train"].label_names),
        "num_features": width,
        "baselines": text_baselines(data["train"], data["test"]),
        "layers": joblib.Parallel(n_jobs=num_workers)(calls),
    }


# ------------------------------------------------------------------ run
def print_table(result: dict) -> None:
    """Prints the scores of every layer on each split, the baselines, and warnings."""
    for split in SPLITS:
        rows = {f"layer {layer['layer']}": layer[split] for layer in result["layers"]}
        rows |= {name: scores["train"] if split == "train" else scores for name, scores in result["baselines"].items()}
        table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=list(rows["layer 0"])).astype(float)
        print(f"\nscores on {split}, fitted on train\n{table.to_string(float_format='{:.5g}'.format, na_rep='-')}")
    solvers = {str(layer["layer"]): layer["solver"] for layer in result["layers"] if "solver" in layer}
    if unfinished := [layer for layer, solver in solvers.items() if not solver["converged"]]:
        print(f"warning: {result['config']['solver']} has not converged at layer {', '.join(unfinished)}: --max_iter")
    n, d = result["num_samples"]["train"], result["num_features"]
    if n < d:
        print(f"warning: n / d = {n} / {d} < 1: least squares interpolates train; its train scores mean nothing")


def main(config: Config) -> None:
    """Writes the scores and a picture of them, and prints their table."""
    pick_device(config.run.device)  # refuses a wrong device before the passes
    moments = cache.Config(model=config.model, data=config.data, run=config.run)
    config = results.settings_from_moments(config, cache.config_path(moments))
    load_config(config.model, config.run)  # refuses a wrong name before it reads the data
    data = load_splits(config.data, config.run)
    train = data["train"]  # every class needs a text
    if absent := [name for label, name in enumerate(train.label_names) if label not in train.labels]:
        raise UserError(f"No train text of class {', '.join(absent[:5])}. Add some, or raise --max_samples.")
    path = results.result_path("linear_sklearn", config.run, config.model, config.data, ".json")
    identity = {
        "config": result_settings(config),
        "model_fingerprint": model_fingerprint(config.model, config.run),
        "fingerprints": {split: part.fingerprint for split, part in data.items()},
    }
    with results.one_run_at_a_time(path):
        result = results.find_result(path, identity, config.run)
        if result is None:
            result = identity | stored_as(config.model) | probe_layers(config, data)
        print_table(result)
        results.save_json(path, result)  # before the picture: its failure loses no score
        if config.output.picture:
            save_figure(plot_probes(result), path)
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
