"""Which model, which layer, is LoRA worth it? Every closed-form score of several models on one labelled dataset.

    python prescreen.py                                                   # the embedded models and data
    python prescreen.py --dataset_name my.jsonl --models smollm2 tiny
    python prescreen.py --dataset_name emotion --models Qwen/Qwen2-0.5B Qwen/Qwen2-1.5B --dtype bfloat16

Reads the dataset and the models; runs cache.py's pass over the training rows where their moments are missing. Nothing
is trained, and no text is kept.
Writes results/prescreen/<dataset>.json, .csv and a page, .png and .pdf; moments that cache.py has not made with these
settings go to results/prescreen/moments/. docs/scores.md explains every number of the page.

How models are ranked. Each layer's R2 is that of ridge regression on the pooled states, cross-validated over the folds
that cache.py keeps: the share of the label variance that a linear probe explains on texts it has not seen. A model
stands for its best layer; for each fold that layer is chosen on the other folds, so that more layers are no advantage.
Intervals are 90 %, from the spread over folds; two models are told apart by the difference fold by fold.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import t as student
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import cache
import K_sweep
from utils.algebra.features import layer_scores
from utils.algebra.memory import num_parameters
from utils.algebra.moment_sums import Sizes
from utils.algebra.moments import LayerMoments, check_has_every_layer, load_layer
from utils.algebra.ridge import check_several, load_folds
from utils.algebra.scores import SCORES, summarize
from utils.calibration import Gain, expected_gain, read_lines
from utils.data.load import LabelledTexts, load_splits
from utils.models.identity import read_config
from utils.models.table import MODELS, model_source
from utils.pictures import save_figure
from utils.prescreen_page import check_memory, peak_memory, print_page, save_table
from utils.prescreen_pictures import plot_page
from utils.results import open_tensors, save_json
from utils.script import UserError, environment, pick_device, run_script
from utils.settings import Data, Dtype, Model, Run, Unrecorded, check_at_least_one, result_settings, with_values
from utils.training.baselines import bag_of_words_folds, text_baselines

EMBEDDED = ("micro", "tiny", "small", "medium", "large", "smollm2")  # compared by default where they are installed
LEVEL = 0.9  # of the intervals
NOTHING = 2.0  # z below which a score is called no better than under permuted labels
WORTHWHILE = 2.0  # points of accuracy
OF_PASS = 0.9  # of the time of a model, about


@dataclass(frozen=True)
class Output(Unrecorded):
    """What is written beside the numbers."""

    picture: bool = True  # draw the page too


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    models: tuple[str, ...] = ()  # hub ids, folders, short names; none: tiny and its relatives that are installed
    dtype: Dtype = "float32"  # of the models
    max_length: int | None = None  # tokens per text; None: each model's context
    pooling: Literal["mean", "last"] = "mean"  # pooled state of a text
    num_folds: int = 5  # of the cross-validation
    num_random: int = 5  # random subspaces that the NTPS scores are compared with
    data: Data = Data(max_samples=2000)
    output: Output = Output()
    run: Run = Run()

    def __post_init__(self) -> None:
        check_at_least_one(self, "num_random")
        if self.num_folds < 2:
            raise ValueError("--num_folds must be at least 2: the intervals come from the folds")


# ------------------------------------------------------------------ what decides the ranking
@dataclass(frozen=True)
class Errors:
    """Sums of squares of a cross-validated ridge regression."""

    errors: np.ndarray  # (layers, folds)
    baselines: np.ndarray  # (folds,), of the training mean

    def chosen(self) -> np.ndarray:
        """For each fold, the layer with the least error on the other folds, (folds,)."""
        return (self.errors.sum(1, keepdims=True) - self.errors).argmin(0)

    @property
    def best_layer(self) -> int:
        """The layer with the least error on all folds: the one to use."""
        return int(self.errors.sum(1).argmin())

    def fold_r2(self) -> np.ndarray:
        """R2 on each fold, its layer chosen on the others, (folds,)."""
        return 1 - self.errors[self.chosen(), range(len(self.baselines))] / self.baselines

    def r2(self) -> float:
        """R2 over all folds, the layer of each chosen on the others."""
        return float(1 - self.errors[self.chosen(), range(len(self.baselines))].sum() / self.baselines.sum())


def interval(folds: np.ndarray) -> float:
    """Half the width of the 90 % interval of the mean over folds, by Student's t."""
    return float(student.ppf((1 + LEVEL) / 2, len(folds) - 1) * folds.std(ddof=1) / math.sqrt(len(folds)))


def told_apart(better: np.ndarray, worse: np.ndarray) -> bool:
    """Whether the mean difference of two R2, fold by fold, is above 0 by more than its 90 % interval."""
    difference = better - worse
    return bool(difference.mean() > interval(difference))


def rank_models(screened: list[dict[str, Any]], words: np.ndarray) -> list[dict[str, Any]]:
    """The models, best first, each with what is said of it.

    Args:
        screened: of `screen_model`.
        words: R2 of a bag of words on each fold, (folds,).
    """
    ranked = sorted(screened, key=lambda model: -model["r2"])
    lines = read_lines()
    for place, model in enumerate(ranked):
        folds = np.array(model["fold_r2"])
        gain = expected_gain(model["predictors"], lines)
        model["rank"] = place + 1
        model["as_good_as_first"] = place == 0 or not told_apart(np.array(ranked[0]["fold_r2"]), folds)
        model["above_words"] = told_apart(folds, words)
        model["gain"] = {"low": gain.low, "high": gain.high, "reason": gain.reason}
        model["sentence"] = sentence(model, float(words.mean()), gain)
    return ranked


def sentence(model: dict[str, Any], words_r2: float, gain: Gain) -> str:
    """The one sentence about a model."""
    found = f"a linear probe of layer {model['best_layer']} explains {max(0.0, model['r2']):.0%} of the label variance"
    if model["z"] is None or model["z"] < NOTHING or model["r2"] <= 0:
        return "nothing above permuted labels: the states do not tell these classes, or the texts are too few"
    if not model["above_words"]:
        return f"bag of words does as well (R2 {words_r2:.2f}; {found}): you may not need an LLM"
    if gain.low is not None and gain.high is not None and gain.high < WORTHWHILE:
        return f"a linear probe is enough: {found}, and LoRA is likely to gain {gain.low:.0f} to {gain.high:.0f} points"
    if gain.low is not None:
        return f"LoRA is likely to gain {gain.low:.0f} to {gain.high:.0f} points; {found}"
    return f"{found}, bag of words {words_r2:.0%}; LoRA's gain is not predicted: {gain.reason}"


# ------------------------------------------------------------------ one model
def find_or_make_moments(
    model: Model, config: Config, train: LabelledTexts, advance: Callable[[float], object]
) -> cache.Config:
    """The settings of the moments of these rows: those in results_dir where they fit, else of its folder prescreen."""
    wanted = cache.Config(
        pooling=config.pooling, num_folds=config.num_folds, model=model, data=config.data, run=config.run
    )
    wanted = with_values(wanted, folds="all")
    here = with_values(wanted, overwrite=False)
    if cache.config_path(here).is_file():
        try:
            cache.ensure(here, train, advance=advance)
            return here
        except UserError:  # of other settings or rows; they stay
            pass
    own = with_values(wanted, results_dir=config.run.results_dir / "prescreen")
    cache.ensure(own, train, renew=config.run.overwrite, advance=advance)
    return own


def ntps_scores(moments: LayerMoments, config: Config, layer: int) -> dict[str, dict[str, float | None]]:
    """The scores of K_sweep.py at the last layer: value, null, and mean and z against random subspaces.

    None of them where the pooled states do not vary, or no text has two tokens.
    """
    sweep = with_values(K_sweep.Config(data=config.data), num_null_draws=30)
    entry = K_sweep.sweep_layer(moments, None, sweep, layer)
    if entry["ntps"] is None:
        return {}
    score, draws, solved = summarize([entry], sweep.fractions), [], K_sweep.solve_perception(moments, center=False)
    directions = K_sweep.informative_directions(solved.covariance_whitener.T @ moments.pooled_label_covariance)
    for seed in range(config.num_random):
        v = K_sweep.random_directions(entry["rank_v"], moments.pooled_second_moment, (seed, layer))
        spanned = K_sweep.Spanned.of(v, moments, solved, sweep.fractions)
        found = (
            *K_sweep.euclidean_scores(solved, spanned, sweep),
            *K_sweep.whitened_scores(*directions, spanned),
        )
        draws.append([values.mean().item() for values in found])
    scores = {}
    for name, values in zip(SCORES, np.transpose(draws), strict=True):
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        z = float((score[name]["value"] - values.mean()) / spread) if spread > 1e-12 else None
        null = {key: score[name].get(key) for key in ("null_mean", "null_std", "z")}
        scores[name] = {"value": score[name]["value"], **null, "random_mean": float(values.mean()), "random_z": z}
    return scores


def screen_model(name: str, config: Config, train: LabelledTexts, advance: Callable[[float], object]) -> dict[str, Any]:
    """Every score of every layer of a model, and its R2 on each fold.

    Args:
        name: of the model.
        config: of the run.
        train: the texts.
        advance: told the share of the work that each step was.

    Raises:
        UserError: the model cannot be had or does not fit the memory.
    """
    model, start = Model(name, dtype=config.dtype, max_length=config.max_length), time.perf_counter()
    text = read_config(model, config.run).get_text_config()
    num_layers = text.num_hidden_layers + 1
    sizes = Sizes(num_layers, text.hidden_size, train.num_labels, config.num_folds, num_layers)
    parameters = check_memory(model, config.run, 8 * sizes.num_numbers)
    path = cache.config_path(find_or_make_moments(model, config, train, lambda share: advance(OF_PASS * share)))
    of_pass = time.perf_counter() - start
    device = pick_device(config.run.device)
    layers, judged = [], []
    with open_tensors(path) as (file, metadata):
        check_has_every_layer(metadata, "prescreen.py")
        for layer in range(num_layers):
            moments = load_layer(file, metadata, layer, device)
            found = layer_scores(moments, None, load_folds(path, layer, device), (config.data.seed, layer))
            layers.append(found.scores)
            judged.append(found.parts)
            advance((1 - OF_PASS) / num_layers)
    errors = Errors(
        np.array([[part.error for part in parts] for parts in judged]), np.array([part.baseline for part in judged[-1]])
    )
    last, folds = layers[-1] | ntps_scores(moments, config, num_layers - 1), errors.fold_r2()
    at_best = layers[errors.best_layer]["ridge_r2"]
    return {
        "model": name,
        "num_parameters": parameters,
        "hidden_size": text.hidden_size,
        "num_layers": num_layers,
        "num_tokens": metadata["num_tokens"],
        "r2": errors.r2(),
        "r2_interval": interval(folds),
        "fold_r2": folds.tolist(),
        "best_layer": errors.best_layer,
        "z": at_best["z"],
        "layer_lead": at_best["value"] - last["ridge_r2"]["value"],  # of the best layer over the last one
        "last_layer": last,
        "layers": layers,
        "predictors": {
            **{score: entry["value"] for score, entry in last.items()},
            **{f"{score}_z": entry["z"] for score, entry in last.items()},
            "log10_parameters": math.log10(parameters),
        },
        "seconds_of_pass": of_pass,
        "seconds_of_scores": time.perf_counter() - start - of_pass,
        "peak_gigabytes": peak_memory(),
    }


# ------------------------------------------------------------------ run
def is_installed(name: str) -> bool:
    """Whether an embedded model is on this machine."""
    try:
        return name in MODELS and bool(model_source(name))
    except UserError:
        return False


def screen_all(
    names: tuple[str, ...], config: Config, train: LabelledTexts
) -> tuple[list[dict[str, Any]], dict[str, str], bool]:
    """The models that could be screened, why the others could not, and whether the user broke off."""
    screened, failed, sizes = [], dict[str, str](), dict[str, int]()
    for name in names:
        try:
            sizes[name] = num_parameters(Model(name), config.run)
        except Exception as error:  # one odd model must not end the run
            failed[name] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    done, bar = 0, "{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left{postfix}"
    # the same texts go through all models, so that the work is about as their sizes
    with tqdm(total=sum(sizes.values()), desc="prescreen", smoothing=0, bar_format=bar) as progress:
        for name in sorted(sizes, key=lambda name: sizes[name]):
            progress.set_postfix_str(name)
            done += sizes[name]
            advance = partial(lambda size, share: progress.update(size * share), sizes[name])
            try:
                screened.append(screen_model(name, config, train, advance))
            except KeyboardInterrupt:
                return screened, failed, True
            except Exception as error:
                failed[name] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            progress.update(done - progress.n)  # moments that were there, or a model that failed
    return screened, failed, False


def baselines(rows: dict[str, LabelledTexts], num_folds: int) -> dict[str, Any]:
    """Majority and bag of words: scores on the test rows, and R2 of the words on the folds that judge the models.

    Raises:
        UserError: all texts are in one fold.
    """
    train = rows["train"]
    folds = cache.assign_folds(train.texts, num_folds)
    check_several(len(np.unique(folds)), "prescreen.py")
    scores = text_baselines(train, rows["test"])
    words = bag_of_words_folds(train, cache.one_hot_targets(train).numpy(), folds)
    return {name: {k: v for k, v in found.items() if k != "train"} for name, found in scores.items()} | {
        "fold_r2": words.tolist()
    }


def main(config: Config) -> None:
    """Screens the models, prints the table and a sentence a model, and writes the page.

    Raises:
        UserError: a model failed; the others are written nevertheless.
    """
    names = tuple(dict.fromkeys(config.models)) or tuple(filter(is_installed, EMBEDDED))
    device = pick_device(config.run.device)
    rows = load_splits(config.data, config.run)
    without = baselines(rows, config.num_folds)
    disable_progress_bar()  # of transformers, for each model's weights: there is one bar over all
    with torch.inference_mode():
        screened, failed, interrupted = screen_all(names, config, rows["train"])
    enable_progress_bar()
    if not screened:
        if interrupted:
            raise KeyboardInterrupt
        raise UserError("No model could be screened. " + " ".join(f"{name}: {why}" for name, why in failed.items()))
    result = {
        "config": result_settings(config),
        "environment": environment(),
        "fingerprint": rows["train"].fingerprint,
        "device": str(device),
        "num_samples": {split: len(data.texts) for split, data in rows.items()},
        "num_classes": len(rows["train"].label_names),
        "baselines": without,
        "models": rank_models(screened, np.array(without["fold_r2"])),
        "failed": failed,
    }
    print_page(result)
    path = config.run.results_dir / "prescreen" / f"{config.data.path_name}.json"
    save_table(path.with_suffix(".csv"), result)
    if config.output.picture:
        save_figure(plot_page(result), path)
    save_json(path, result)
    print(path)
    if interrupted:
        raise KeyboardInterrupt
    if failed:
        raise UserError(
            f"{len(failed)} of {len(names)} models failed: {'; '.join(f'{k}: {v}' for k, v in failed.items())}"
        )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
