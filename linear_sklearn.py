"""Fit scikit-learn's linear probes on the pooled states of every layer: logistic regression and least squares.

    python linear_sklearn.py                                         # embedded model and data
    python linear_sklearn.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion --ridge
    python linear_sklearn.py --solver saga --score_split train       # as in the paper's Figure 2

Reads results/moments/<model>/<dataset>/{train,test}.pooled.npy and makes them, by one pass of cache.py each,
where they are missing. Fits on train, scores on train and test.
Writes results/linear_sklearn/<model>/<dataset>.json and a picture beside it (.png, .pdf; with --score_split train
<dataset>.train.png, .pdf), NTPS in it where K_sweep.py has run.

Symbols, per layer: X (n, d) pooled states, standardised on train (StandardScaler); y labels, Y (n, c) one-hot.

    logistic regression  min over W, b   sum_i log-loss(y_i, softmax(W x_i + b)) + |W|^2 / 2C     classification only
    least squares        min over W, b   |Y - X W - 1 b'|^2, of smallest norm where n < d
    ridge (--ridge)      the same + alpha |W|^2, cross-validated over the folds of cache.py from their moments alone
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import joblib
import numpy as np
import pandas as pd
import sklearn
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import cache
from utils.algebra.linalg import whiten, without_constants
from utils.algebra.moments import moments_path
from utils.algebra.pooled import load_pooled, open_pooled, pooled_path
from utils.algebra.products import ProductDtype
from utils.algebra.ridge import load_folds, ridge_path
from utils.data.load import LabelledTexts, load_splits
from utils.models.identity import load_config, model_fingerprint, stored_as
from utils.pictures import plot_probes, save_figure
from utils.results import find_result, load_json, read_identity, result_path, save_json, settings_from_moments
from utils.script import UserError, environment, pick_device, run_script
from utils.settings import (
    Data,
    Model,
    Run,
    Unrecorded,
    check_positive,
    command_line,
    flatten,
    result_settings,
    with_values,
)
from utils.training.baselines import text_baselines
from utils.training.metrics import classification_scores, regression_scores, squared_error_scores
from utils.training.probes import as_array, fit_logistic, num_processes

ROWS_AT_ONCE = 8192  # rows widened to float64 at a time

NO_SOLVER = {"converged": True}  # of least squares, which is in closed form


@dataclass(frozen=True)
class Output(Unrecorded):
    """What is shown, and how many layers are fitted at once."""

    score_split: Literal["test", "train"] = "test"  # in table and picture; the file has both (the paper: train)
    memory_gb: float | None = None  # limit of all layers fitted at once; None: half of the machine's memory
    num_workers: int | None = None  # processes on the CPU; None: as many as cores and memory allow
    picture: bool = True  # draw it too

    def __post_init__(self) -> None:
        check_positive(self, "memory_gb", "num_workers")


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    pooling: Literal["mean", "last"] = "mean"  # pooled state of a text: mean of its tokens, or its last token
    num_folds: int = 5  # of --ridge; equal texts share a fold
    product_dtype: ProductDtype = "auto"  # of the moments
    solver: Literal["lbfgs", "saga"] = "lbfgs"  # of logistic regression; saga is the paper's
    inverse_penalty: float = 1.0  # scikit-learn's C
    max_iter: int | None = None  # None: 10000 for lbfgs, 1000 for saga (the paper's)
    tolerance: float | None = None  # None: 1e-4 for lbfgs, 0.01 for saga (the paper's)
    ridge: bool = False  # also cross-validate ridge regression, from the moments
    alphas: tuple[float, ...] = tuple(10.0**k for k in range(-1, 7))  # penalties of --ridge, as scikit-learn's alpha
    model: Model = Model()
    data: Data = Data()
    output: Output = Output()
    run: Run = Run()  # on a GPU through scikit-learn's array API, layer after layer

    def __post_init__(self) -> None:
        check_positive(self, "inverse_penalty", "max_iter", "tolerance")
        if not self.alphas or min(self.alphas) <= 0:
            raise ValueError("--alphas must be positive")
        if self.ridge and self.num_folds < 2:
            raise ValueError("--ridge needs --num_folds of at least 2")


# ------------------------------------------------------------------ one layer
def least_squares(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (d, c) and intercept (c,), float64, of the least-squares fit; of smallest norm where n <= d.

    Equals StandardScaler + LinearRegression, with its cut (singular values of X below 1e-6 of the largest are zero), by
    the normal equations of X centred and scaled in float64: no shift and no unit of a feature costs a digit.

    Args:
        features: (n, d), as they are.
        targets: Y, (n, c), float64.
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


def predict(features: Tensor, weights: Tensor, intercept: Tensor) -> np.ndarray:
    """X W + 1 b', (n, c) float64."""
    return torch.cat([rows.double() @ weights + intercept for rows in features.split(ROWS_AT_ONCE)]).cpu().numpy()


def load_features(path: Path, layer: int, device: torch.device) -> Tensor:
    """Pooled states of one layer beside the moments at `path`, (n, d) float32; no other layer is read."""
    features = load_pooled(path, layer)
    if not features.isfinite().all():
        row, pooled = int((~features.isfinite().all(1)).nonzero()[0]), pooled_path(path)
        raise UserError(f"Non-finite features at layer {layer}, row {row}, in {pooled}. Delete it; it is made anew.")
    return features.to(device)


def probe_device(config: Config) -> torch.device:
    """Where the probes are fitted: as asked for; saga has no implementation off the CPU."""
    return pick_device(config.run.device if config.solver == "lbfgs" else "cpu")


def probe_layer(config: Config, paths: dict[str, Path], data: dict[str, LabelledTexts], layer: int) -> dict:
    """Fits the probes of one layer on train: its JSON entry, with the scores on both splits; `paths` of the moments."""
    device = probe_device(config)
    entry: dict[str, Any] = {"layer": layer}
    features = {split: load_features(paths[split], layer, device) for split in data}
    targets = {split: cache.one_hot_targets(part) for split, part in data.items()}
    weights, intercept = least_squares(features["train"], targets["train"].to(device))
    for split, part in data.items():
        predictions = predict(features[split], weights, intercept)
        if part.is_regression:
            entry[split] = regression_scores(part.labels, predictions[:, 0])
        else:
            entry[split] = squared_error_scores(targets[split].numpy(), predictions)
    if not data["train"].is_regression:
        # the array API keeps tensors where they are; on the CPU scikit-learn is faster on numpy arrays
        with sklearn.config_context(array_api_dispatch=device.type != "cpu"):
            scaler = StandardScaler(copy=False).fit(as_array(features["train"]))
            features = {split: torch.as_tensor(scaler.transform(as_array(x))) for split, x in features.items()}
            model, entry["solver"] = fit_logistic(features["train"], data["train"].labels, config)
            for split, part in data.items():
                probabilities = torch.as_tensor(model.predict_proba(as_array(features[split]))).cpu().numpy()
                entry[split] = classification_scores(part.labels, probabilities) | entry[split]
    if config.ridge:
        folds = load_folds(paths["train"], layer, device)
        entry["ridge"] = ridge_path(*folds, config.alphas) if folds else None
    return entry


# ------------------------------------------------------------------ all layers
def find_features(config: Config, split: Literal["train", "test"], data: LabelledTexts) -> Path:
    """The moments of a split, with the pooled states of every layer beside them; made if they are not there."""
    wanted = cache.Config(
        split, config.pooling, config.num_folds, config.product_dtype,
        model=config.model, data=config.data, output=cache.Output("all"), run=config.run,
    )  # fmt: skip
    if config.ridge and not pooled_path(cache.config_path(wanted)).is_file():  # the pass is needed anyway
        wanted = with_values(wanted, folds="all")
    return cache.ensure(wanted, data)


def check_labels(train: LabelledTexts) -> None:
    """Whether every class has a text to learn from.

    Raises:
        UserError: fewer texts than classes, or a class without any.
    """
    if train.is_regression:
        return
    num, counts = len(train.texts), np.bincount(train.labels, minlength=train.num_labels)
    absent = [name for name, count in zip(train.label_names, counts, strict=True) if not count]
    if num < train.num_labels:
        raise UserError(f"{num} train texts are fewer than the {train.num_labels} classes. Raise --max_samples.")
    if absent:
        raise UserError(f"No train text of class {', '.join(absent[:5])}. Add some, or raise --max_samples.")


def probe_layers(config: Config, paths: dict[str, Path], data: dict[str, LabelledTexts]) -> dict:
    """The result of all layers, each read, fitted and forgotten by one of the processes."""
    num_layers, num_train, width = open_pooled(paths["train"]).shape
    rows = (num_train, len(data["test"].texts))
    workers = config.output.num_workers if probe_device(config).type == "cpu" else 1  # they would share the one device
    num_workers = num_processes(workers, config.output.memory_gb, num_layers, rows, width, data["train"].num_labels)
    threads = max(1, joblib.cpu_count() // num_workers) if num_workers > 1 else None
    print(f"{num_layers} layers, {num_train:,} train texts, {width} features: {num_workers} at a time")
    with joblib.parallel_config("loky", inner_max_num_threads=threads) if threads else contextlib.nullcontext():
        calls = [joblib.delayed(probe_layer)(config, paths, data, layer) for layer in range(num_layers)]
        layers = joblib.Parallel(n_jobs=num_workers)(calls)
    return {
        "environment": environment(),
        "features": read_identity(paths["train"])["environment"],
        "num_samples": dict(zip(("train", "test"), rows, strict=True)),
        "num_classes": len(data["train"].label_names),
        "num_features": width,
        "samples_per_feature": num_train / width,
        "baselines": text_baselines(data["train"], data["test"]),
        "layers": layers,
    }


# ------------------------------------------------------------------ run
def load_ntps(config: Config) -> dict | None:
    """What K_sweep.py wrote of the train split of this model and dataset, if its moments had the same settings."""
    path = result_path("ntps", config.run, config.model, config.data, ".json")
    if not path.is_file():
        names = {*flatten(config.model), "dataset_name"}
        command = command_line("K_sweep.py", config, names)
        print(f"No NTPS at {path}: the picture shows the probes alone. For both: {command}")
        return None
    ntps, ours = load_json(path), result_settings(config)
    theirs = ntps["moments"]["config"]
    differing = [name for name, value in theirs.items() if name in ours and ours[name] != value]
    if differing:
        print(f"{path} was made with another {', '.join(differing)}: the picture shows the probes alone.")
    return None if differing else ntps


def print_table(result: dict, split: str) -> None:
    """The scores of every layer on one split, the baselines, and what a reader must not overlook."""
    rows = {f"layer {layer['layer']}": dict(layer[split]) for layer in result["layers"]}
    for layer, row in zip(result["layers"], rows.values(), strict=True):
        if result["config"]["ridge"]:
            best = layer["ridge"] or {}
            row |= {"cv_ridge_r2": best.get("best_r2"), "best_alpha": best.get("best_alpha")}
    names = list(rows["layer 0"])
    rows |= {name: scores["train"] if split == "train" else scores for name, scores in result["baselines"].items()}
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=names).astype(float)
    print(f"\nscores on {split}, fitted on train\n{table.to_string(float_format='{:.5g}'.format, na_rep='-')}")
    if unfolded := [str(layer["layer"]) for layer in result["layers"] if layer.get("ridge", {}) is None]:
        print(f"ridge: no folds are stored of layer {', '.join(unfolded)}: python cache.py --folds all --overwrite")
    unfinished = [str(layer["layer"]) for layer in result["layers"] if not layer.get("solver", NO_SOLVER)["converged"]]
    if unfinished:
        print(f"warning: {result['config']['solver']} has not converged at layer {', '.join(unfinished)}: --max_iter")
    if result["samples_per_feature"] < 1:
        n, d = result["num_samples"]["train"], result["num_features"]
        print(f"warning: n / d = {n} / {d} < 1: least squares interpolates train; its train scores mean nothing")


def main(config: Config) -> None:
    """Writes the scores and a picture of them, and prints their table."""
    pick_device(config.run.device)  # before the passes, not after them
    load_config(config.model, config.run)  # its name is wrong or right before the data are read
    config = settings_from_moments(config, moments_path(config.run, config.model, config.data, "train"))
    data = load_splits(config.data, config.run)
    check_labels(data["train"])
    path = result_path("linear_sklearn", config.run, config.model, config.data, ".json")
    identity = {
        "config": result_settings(config),
        "model_fingerprint": model_fingerprint(config.model, config.run),
        "fingerprints": {split: part.fingerprint for split, part in data.items()},
    }
    result = find_result(path, identity, config.run)
    if result is None:
        paths = {
            "train": find_features(config, "train", data["train"]),
            "test": find_features(config, "test", data["test"]),
        }
        result = identity | stored_as(config.model) | probe_layers(config, paths, data)
    print_table(result, config.output.score_split)
    if config.output.picture:
        figure = plot_probes(result, load_ntps(config), config.output.score_split)
        ending = ".train.json" if config.output.score_split == "train" else ".json"
        save_figure(figure, result_path("linear_sklearn", config.run, config.model, config.data, ending))
    save_json(path, result)  # last: where the JSON is, the picture is
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
