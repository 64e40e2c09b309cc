"""Rank models and their layers on one labelled dataset, and compare the best with a bag of words.

    python prescreen.py                                                   # the two embedded models and embedded data
    python prescreen.py --dataset_name my.jsonl --models smollm2 tiny
    python prescreen.py --dataset_name emotion --models Qwen/Qwen2-0.5B Qwen/Qwen2-1.5B --dtype bfloat16

Reads the dataset and the models; runs cache.py's pass over the training rows unless an earlier run has done so.
Writes results/prescreen/<dataset>.json, .csv (every score of every layer) and a page, .png and .pdf, and the moments
below results/prescreen/moments/. docs/scores.md explains every number.

Ranking: each layer has the R2 of ridge regression on the pooled states, cross-validated over the folds
that cache.py keeps: the share of the label variance that a linear probe explains on unseen texts. The ranking
uses each model's best layer, chosen for each fold on the other folds, so that more layers are no advantage. Intervals
are 90 %, from the spread over folds; two models, or a model and the bag of words, are compared fold by fold.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

import cache
import K_sweep
from utils.algebra import features
from utils.algebra.moments import LayerMoments, load_layer
from utils.algebra.ridge import load_folds
from utils.algebra.scores import SCORES, summarize
from utils.data.load import LabelledTexts, load_splits
from utils.models.table import MODELS, model_source
from utils.pictures import plot_prescreen, save_figure
from utils.results import open_tensors, save_json, write_atomically
from utils.script import UserError, environment, message_of, pick_device, run_script
from utils.settings import Data, Dtype, Model, Run, command_line, result_settings, with_values

SMALLEST_Z = 2.0  # a layer with a smaller z is no better than under permuted labels


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    models: tuple[str, ...] = ("tiny", "micro")  # hub ids, folders, short names
    dtype: Dtype = "float32"  # dtype of the models
    max_length: int | None = None  # tokens per text; None: each model's context
    pooling: Literal["mean", "last"] = "mean"  # pooled state of a text
    num_folds: int = 5  # folds of the cross-validation
    num_random_draws: int = 5  # random subspaces, for a z of the NTPS scores
    data: Data = Data(max_samples=2000)
    run: Run = Run()

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("--models needs the name of a model")
        if min(self.num_folds, self.num_random_draws) < 2:
            raise ValueError("--num_folds and --num_random_draws need at least 2: intervals and z come from a spread")


# ------------------------------------------------------------------ the ranking
def interval(values: np.ndarray) -> float:
    """Half the width of the 90 % interval of the mean over folds, by Student's t."""
    from scipy.stats import t as student

    return float(student.ppf(0.95, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


def judge_layers(errors: np.ndarray, baselines: np.ndarray) -> dict[str, Any]:
    """R2 of a model over all folds and on each, and its best layer; for a fold, the best layer of the other folds.

    `errors` are sums of squared errors of ridge regression, (layers, folds), `baselines` those of the training mean.
    """
    on_other_folds = errors.sum(1, keepdims=True) - errors
    chosen = errors[on_other_folds.argmin(0), range(len(baselines))]
    folds, r2 = 1 - chosen / baselines, float(1 - chosen.sum() / baselines.sum())
    best_layer = int(errors.sum(1).argmin())
    return {"r2": r2, "r2_interval": interval(folds), "fold_r2": folds.tolist(), "best_layer": best_layer}


def is_significantly_better(better: np.ndarray, worse: np.ndarray) -> bool:
    """True if the 90 % interval of the mean difference of two R2, (folds,) each, lies above 0."""
    difference = better - worse
    return bool(difference.mean() > interval(difference))


def rank_models(screened: list[dict[str, Any]], words: np.ndarray) -> list[dict[str, Any]]:
    """The models by R2, largest first, each with its rank, its comparisons and its verdict.

    `screened` are results of `screen_model`, `words` is the R2 of a bag of words on each fold, (folds,).
    """
    ranked = sorted(screened, key=lambda model: -model["r2"])
    first = np.array(ranked[0]["fold_r2"])
    for rank, model in enumerate(ranked, 1):
        folds = np.array(model["fold_r2"])
        model["rank"] = rank
        model["as_good_as_first"] = rank == 1 or not is_significantly_better(first, folds)
        model["above_words"] = is_significantly_better(folds, words)
        model["lead_over_words"] = float((folds - words).mean())
        model["lead_interval"] = interval(folds - words)
        model["verdict"] = verdict(model)
    return ranked


def verdict(model: dict[str, Any]) -> str:
    """The verdict on a ranked model in a few words."""
    if model["z"] is None or model["z"] < SMALLEST_Z or model["r2"] <= 0:
        return "finds nothing"
    if not model["above_words"]:
        return "no better than words"
    if model["rank"] == 1:
        return "first choice"
    return "as good as the first" if model["as_good_as_first"] else "behind the first"


def recommendation(result: dict[str, Any]) -> str:
    """The recommendation printed under the table: the first model above the bag of words, or that bag itself."""
    informative = [model for model in result["models"] if model["verdict"] != "finds nothing"]
    if not informative:
        return "No model beats permuted labels: the states tell nothing about the labels, or the texts are too few."
    above_words = [model for model in informative if model["verdict"] != "no better than words"]
    chosen, *others = above_words or informative
    probe = f"a linear probe on layer {chosen['best_layer']} of {chosen['model']}"
    if not above_words:
        return f"Start with a bag of words: {probe} does not beat it. You may not need an LLM."
    words = max(0.0, float(np.mean(result["baselines"]["fold_r2"])))
    told = f"Start with {probe}: it explains {chosen['r2']:.0%} of the label variance, bag of words {words:.0%}."
    ties = ", ".join(model["model"] for model in others if model["verdict"] == "as good as the first")
    return told + (f" The folds do not separate it from {ties}." if ties else "")


# ------------------------------------------------------------------ one model
def find_or_make_moments(model: Model, config: Config, train: LabelledTexts) -> Path:
    """The path of the moments of these rows, apart from those of cache.py, which lack folds at most layers."""
    shared = {name: getattr(config, name) for name in ("pooling", "num_folds", "data", "run")}
    own = {"folds": "all", "results_dir": config.run.results_dir / "prescreen"}
    return cache.ensure(with_values(cache.Config(model=model, **shared), **own), train)


def ntps_scores(moments: LayerMoments, config: Config, layer: int) -> dict[str, dict[str, float | None]]:
    """The scores of K_sweep.py at one layer: value, null, and mean and z of random V; empty if the layer has none."""
    sweep = K_sweep.Config(data=config.data, num_null_draws=30)
    found = K_sweep.sweep_layer(moments, None, sweep, layer, config.num_random_draws)
    score = summarize(found, len(sweep.fractions)) if found.scores else {}
    return {name: score[name] for name in SCORES if name in score}


def screen_model(name: str, config: Config, train: LabelledTexts) -> dict[str, Any]:
    """Every score of every layer of a model, and its R2 on each fold.

    Raises:
        UserError: the model cannot be loaded or does not fit into memory.
    """
    start, device = time.perf_counter(), pick_device(config.run.device)
    model = Model(name, dtype=config.dtype, max_length=config.max_length)
    path = find_or_make_moments(model, config, train)
    seconds_of_pass = time.perf_counter() - start
    layers, fits = [], []
    with open_tensors(path) as (file, metadata):
        for layer in metadata["layers"]:
            moments = load_layer(file, metadata, layer, device)
            scores, fits_of_layer = features.feature_scores(moments, None, load_folds(file, layer, device))
            layers.append(scores)
            fits.append(fits_of_layer)
    errors = np.array([[fit.error for fit in folds] for folds in fits])
    judged = judge_layers(errors, np.array([fit.baseline for fit in fits[-1]]))
    return {
        "model": name,
        "hidden_size": len(moments.pooled_mean),
        "num_layers": len(layers),
        **judged,
        "z": layers[judged["best_layer"]]["ridge_r2"]["z"],
        "last_layer": layers[-1] | ntps_scores(moments, config, len(layers) - 1),
        "layers": layers,
        "seconds_of_pass": seconds_of_pass,
        "seconds_of_scores": time.perf_counter() - start - seconds_of_pass,
    }


def screen_all(config: Config, train: LabelledTexts) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Screens every model; returns the results, and the cause of each failure by model."""
    screened, failed = [], dict[str, str]()
    for name in tqdm(dict.fromkeys(config.models), desc="prescreen", unit="model"):
        try:
            screened.append(screen_model(name, config, train))
        except Exception as error:  # one odd model must not end the run
            failed[name] = message_of(error) or f"{type(error).__name__}: {error}"
    return screened, failed


def baselines(rows: dict[str, LabelledTexts], num_folds: int) -> dict[str, Any]:
    """Test scores of the majority class and of the bag of words, and R2 of the latter on the models' folds.

    Raises:
        UserError: all texts are in one fold, or the labels of a fold are the mean of the others.
    """
    from utils.training.baselines import bag_of_words_folds, text_baselines

    train = rows["train"]
    folds = cache.assign_folds(train.texts, num_folds)
    if len(np.unique(folds)) < 2:
        raise UserError("All texts fall into one fold, so prescreen.py cannot cross-validate. Give texts that differ.")
    words = bag_of_words_folds(train, cache.one_hot_targets(train).numpy(), folds)
    return text_baselines(train, rows["test"]) | {"fold_r2": words.tolist()}


# ------------------------------------------------------------------ table and file
def score_ranks(models: list[dict[str, Any]]) -> dict[str, list[int]]:
    """The rank of each model, 1 = best, by each score that all have at the last layer."""
    ranks = {}
    for name in (*features.CLOSED_FORM_SCORES, *SCORES):
        entries = [model["last_layer"].get(name, {"value": None}) for model in models]
        values: list[Any] = [None if entry.get("meaningless") else entry["value"] for entry in entries]
        if None not in values:
            ranks[name] = [1 + sum(other > value for other in values) for value in values]
    return ranks


def page_lines(result: dict[str, Any], ranks: dict[str, list[int]]) -> list[str]:
    """The lines under the table: recommendation, agreement of the scores, baselines, failures."""
    models, measure = result["models"], "accuracy" if result["num_classes"] else "r2"
    lines = [recommendation(result)]
    if len(models) > 1:
        num_agreeing = sum(of_score[0] == 1 for of_score in ranks.values())
        agreement = f"{num_agreeing} of {len(ranks)} scores rank {models[0]['model']} first"
        widths = {model["hidden_size"] for model in models}
        lines.append(agreement + ("; only R2 compares models of different width." if len(widths) > 1 else "."))
    values = [(name.replace("_", " "), result["baselines"][name][measure]) for name in ("majority", "bag_of_words")]
    told = ", ".join(f"{name} {'-' if value is None else format(value, '.3f')}" for name, value in values)
    lines.append(f"Without a model, test {measure}: {told}.")
    return lines + [f"failed: {name}: {why}" for name, why in result["failed"].items()]


def print_table(result: dict[str, Any], lines: list[str]) -> None:
    """Prints a row per model, best first, at most 100 columns wide, and the lines of the page."""
    num_texts, num_folds = result["num_samples"]["train"], len(result["baselines"]["fold_r2"])  # folds that have texts
    print(f"\n{result['config']['dataset_name']}: {num_texts:,} texts, {num_folds} folds, 90 % intervals")
    print(f"{'':<4}{'model':<26}{'best layer':<12}{'R2':<17}{'minus bag of words':<20}verdict")
    for model in result["models"]:
        layer = f"{model['best_layer']} of {model['num_layers'] - 1}"
        r2 = f"{model['r2']:.3f} +- {model['r2_interval']:.3f}"
        lead = f"{model['lead_over_words']:+.3f} +- {model['lead_interval']:.3f}"
        print(f"{model['rank']:<4}{model['model'][-25:]:<26}{layer:<12}{r2:<17}{lead:<20}{model['verdict']}")
    print("\n".join(["", *lines]))


def save_table(path: Path, models: list[dict[str, Any]], ranks: dict[str, list[int]]) -> None:
    """Writes every score of every layer, with its null and, at the last layer, its rank among the models, as CSV."""
    import pandas as pd

    rows, columns = [], ["value", "null_mean", "null_std", "z", "random_mean", "random_z"]
    for number, model in enumerate(models):
        for layer, scores in enumerate([*model["layers"][:-1], model["last_layer"]]):
            own = {name: of_score[number] for name, of_score in ranks.items() if layer == model["num_layers"] - 1}
            for name, entry in scores.items():
                row = {"model": model["model"], "layer": layer, "score": name}
                rows.append({**row, **{key: entry.get(key) for key in columns}, "rank": own.get(name)})
    table = pd.DataFrame(rows).astype({"rank": "Int64"})
    with write_atomically(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    print(path)


# ------------------------------------------------------------------ run
def installed_models() -> list[str]:
    """The models of demo/ on this machine, by their short names."""
    found = []
    for name in (name for name, spec in MODELS.items() if spec.command):
        with contextlib.suppress(UserError):  # a model that is not installed raises it
            model_source(name)
            found.append(name)
    return found


def main(config: Config) -> None:
    """Screens the models, prints the table and the recommendation, and writes the page.

    Raises:
        UserError: a model failed; results of the others are on disk.
    """
    pick_device(config.run.device)  # refuses a wrong device before the work
    rows = load_splits(config.data, config.run)
    without_model = baselines(rows, config.num_folds)
    with torch.inference_mode():
        screened, failed = screen_all(config, rows["train"])
    reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
    if not screened:
        raise UserError(f"No model could be screened. {reasons}")
    result: dict[str, Any] = {
        "config": result_settings(config),
        "environment": environment(),
        "fingerprint": rows["train"].fingerprint,
        "num_samples": {split: len(data.texts) for split, data in rows.items()},
        "num_classes": len(rows["train"].label_names),
        "baselines": without_model,
        "models": rank_models(screened, np.array(without_model["fold_r2"])),
        "failed": failed,
    }
    ranks = score_ranks(result["models"])
    lines = page_lines(result, ranks)
    print_table(result, lines)
    if config.models == Config().models and (more := [n for n in installed_models() if n not in config.models]):
        longer = command_line("prescreen.py", with_values(config, models=(*config.models, *more)))
        print(f"Also installed: {', '.join(more)}. To include them: {longer}")
    path = config.run.results_dir / "prescreen" / f"{config.data.path_name}.json"
    save_table(path.with_suffix(".csv"), result["models"], ranks)
    save_json(path, result)
    save_figure(plot_prescreen(result, lines), path)
    print(path)
    if failed:
        raise UserError(f"{len(failed)} of {len(failed) + len(screened)} models failed: {reasons}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
