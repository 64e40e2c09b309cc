"""Does NTPS predict? Six questions to a real LLM, fixed before its results existed, and what the study says to them.

    python -m fig_plot.findings                # the committed studies, from fig_plot/data/
    python -m fig_plot.findings --published    # the paper's numbers, from fig_plot/published/ (import_published.py)

QUESTIONS, FIXED BEFORE LOOKING. They are asked of SmolLM2-135M (`smollm2`) on ten of the paper's twelve datasets and
four more; the ladder of docstring LMs is asked the same by the same code. Terms:

    score         mean over the fractions 5 %, ..., 95 % at the last layer, V and U solved on the training rows
    accuracy      of the logistic probe of the last layer (linear_sklearn.py), on test rows
    headroom      1 - accuracy
    best layer    the one with the highest cross-validated ridge R2 on the training rows; test rows choose nothing
    LoRA gain     test accuracy after LoRA - accuracy; where another probe is meant, it is named
    noise         the same procedure with the tasks permuted, 1,000 times
    interval      95 %, bootstrap over tasks, 1,000 draws; seeds of a task are averaged first
    baselines     headroom, number of classes, bag of words, best layer's probe, same score of a random V

Each correlation is Spearman's across the tasks of a model, averaged over models where there are several. The paper
claims + for accuracy, - for MSE, - for LoRA gain; every choice and every test is made in that direction.

1. Like for like: does the paper's procedure give its three correlations on another model? Score: `ntps`, V of the
   largest eigenvalues, at every layer and fraction; measures: accuracy and MSE on the TRAINING rows of the same
   layer's probe, and LoRA gain over the paper's probe and over a converged one. Statistic: the best correlation over
   layer and K in the claimed direction. It is reproduced if it lies within the range of the eight published ones or
   beyond; it is more than choosing if p < .05 against noise. Then one step at a time: last layer; last layer and mean
   over K; the same on test rows. If the number of classes, held fixed (partial Spearman), takes the MSE's correlation
   to where its interval has 0, that is said with it.
2. By the fixed rule on test rows, which scores order tasks by accuracy, by accuracy above the majority class, by MSE
   / variance, by LoRA gain over a converged probe? `ntps` is the claim, all other scores are asked beside it. A score
   orders tasks if its interval lies on the claimed side of 0 (no side was claimed for other scores: then on either
   side). It is of use if the interval of its lead over the best baseline, in the size of the correlation, is above 0.
3. Does next-token prediction's V keep more of the labels than random subspaces of the same dimension? Score:
   `retained` minus its mean over 20 random V; z: the same in standard deviations of the draws. Yes if the interval of
   the mean over tasks is above 0, no if it is below; the number of tasks with z above 2 and below -2 is given, V by
   PCA beside it.
4. Does LoRA raise NTPS, its variants, and `retained` over a random V, and does the rise follow the gain? Statistic:
   score after minus before, mean over tasks; Spearman of that change with LoRA gain. Raised, or following, if the
   interval is above 0. Unanswered, not "no", if it has 0 inside.
5. What predicts the LoRA gain of a task left out? Candidates, one at a time: headroom; held-out R2 of the best layer
   minus that of the last; ridge R2; LogME; H-score; z of `retained`; `retained` minus that of random V; `ntps`;
   number of classes. Statistic: mean absolute error, in points, of a least-squares line through the other tasks (an
   intercept per model), beside that of the other tasks' mean gain. A candidate predicts if the interval of its lead
   over the mean gain is above 0. And the AUC for "gain > 2 points", with interval, beside headroom's here and
   headroom's .79 in the published numbers.
6. Is a score reproducible against its spread over tasks? Standard deviation between seeds (other rows, other initial
   weights) over the standard deviation over tasks, and the largest difference over batches and precision of products
   over the same. Reproducible if the share is below one tenth.

The number of tasks is given with every answer; a question whose data are missing stays unanswered.

Reads the CSV files of collect.py. Writes verdict_*.csv beside them:

    verdict_correlations.csv  each score and baseline with each measure, across tasks and across models
    verdict_partial.csv       the same with LoRA gain, given the headroom 1 - probe accuracy
    verdict_selection.csv     best layer and K, its permutation null, and the choice judged on a task left out
    verdict_sensitivity.csv   correlation at every layer and K
    verdict_controls.csv      what V by PCA, a random V, random weights and permuted labels give
    verdict_decision.csv      AUC of "LoRA gains more than two points"
    verdict_seeds.csv         spread between seeds beside that over tasks
    verdict_calibration.csv   error of the LoRA gain predicted from a score, in points of accuracy

The fixed rule is the score of a run: mean over all fractions at the last layer. A correlation across tasks is computed
within each model and averaged over models; one across models within each task, averaged over tasks. Intervals are
bootstraps over tasks. The random-weights model is left out of all but the controls.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fig_plot.collect import parse_size, save_csv
from fig_plot.correlations import (
    CORRELATIONS,
    auc,
    bootstrap_interval,
    bootstrap_mean_correlation,
    expected_maximum,
    leave_one_out_selection,
    partial_spearman,
    selection_null,
    spearman,
    spearman_rows,
)
from fig_plot.tables import (
    CONTROLS,
    DATA_DIR,
    MEASURES,
    NAMES,
    PUBLISHED_DIR,
    SCORES,
    average_seeds,
    load_seeds,
    matrix,
    mean_of_others,
    read_table,
    trained_models,
)
from utils.io import UserError, run_script
from utils.model_table import MODELS

GAINS = ("lora_gain", "lora_gain_paper", "full_gain")
TASK_BASELINES = ("majority_accuracy", "num_classes", "headroom", "bag_of_words_accuracy")
MODEL_BASELINES = ("num_parameters", "held_out_loss", "headroom")
WORTHWHILE_GAIN = 0.02  # in the go / no-go question


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    published: bool = False  # the paper's numbers instead of the mini study
    data_dir: Path | None = None  # by default fig_plot/data/, with --published fig_plot/published/
    num_draws: int = 1000  # bootstrap samples of the tasks, and permutations of the selection null
    seed: int = 0  # of both


# ------------------------------------------------------------------ correlations under the fixed rule
def correlation_rows(cells: pd.DataFrame, config: Config) -> Iterator[dict[str, Any]]:
    """Rows of verdict_correlations.csv: direction, score, measure, correlation, value, low, high, number of groups."""
    for measure in [name for name in MEASURES if name in cells and cells[name].notna().any()]:
        target = matrix(cells, measure)
        names = dict.fromkeys((*SCORES, *CONTROLS, *TASK_BASELINES, *MODEL_BASELINES, "probe_accuracy"))
        for name in [name for name in names if name in cells and name != measure]:
            score = matrix(cells, name)
            yield from direction_rows("tasks", name, measure, score, target, config)
            yield from direction_rows("models", name, measure, score.T, target.T, config)
        yield from others_rows(measure, target, config)


def direction_rows(
    direction: str, name: str, measure: str, score: pd.DataFrame, target: pd.DataFrame, config: Config
) -> Iterator[dict[str, Any]]:
    """One row per kind of correlation; `score` and `target` are (groups, members), correlated within each group."""
    score, target = score.align(target, join="inner")
    x, y = score.to_numpy(float), target.to_numpy(float)
    groups = int(np.isfinite(spearman_rows(x, y)).sum())
    if not groups:
        return
    for kind, correlation in CORRELATIONS.items():
        draws = {"num_draws": config.num_draws if kind == "spearman" else config.num_draws // 4, "seed": config.seed}
        if direction == "tasks":
            interval = bootstrap_mean_correlation(x, y, correlation, **draws)
        else:  # groups are the tasks here
            within = np.array([correlation(*rows) for rows in zip(x, y, strict=True)])
            interval = bootstrap_interval(np.mean, within[np.isfinite(within)], **draws)
        yield {"direction": f"across {direction}", "measure": measure, "score": name, "correlation": kind,
               **interval._asdict(), "groups": groups, "members": int(np.isfinite(x * y).sum(1).max())}  # fmt: skip


def others_rows(measure: str, target: pd.DataFrame, config: Config) -> Iterator[dict[str, Any]]:
    """The baseline without a score: what the other models reach on the task, or the model on the other tasks."""
    yield from direction_rows("tasks", "mean of the others", measure, mean_of_others(target), target, config)
    yield from direction_rows("models", "mean of the others", measure, mean_of_others(target.T), target.T, config)


def mean_partial(score: np.ndarray, gain: np.ndarray, headroom: np.ndarray) -> float:
    """Mean over models of the partial Spearman over tasks; all three are (tasks, models)."""
    values = [partial_spearman(*model) for model in zip(score.T, gain.T, headroom.T, strict=True)]
    defined = [value for value in values if np.isfinite(value)]
    return float(np.mean(defined)) if defined else float("nan")


def partial_rows(cells: pd.DataFrame, config: Config, scores: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of verdict_partial.csv: Spearman of score and gain with the headroom held fixed, mean over models."""
    for measure in known_gains(cells):
        for name in scores:
            tables = [matrix(cells, column).to_numpy(float).T for column in (name, measure, "headroom")]
            interval = bootstrap_interval(mean_partial, *tables, num_draws=config.num_draws // 4, seed=config.seed)
            yield {"measure": measure, "score": name, "given": "headroom", **interval._asdict()}


def known_gains(cells: pd.DataFrame) -> list[str]:
    """The gains that were measured anywhere."""
    return [name for name in GAINS if name in cells and cells[name].notna().any()]


def decision_rows(cells: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """AUC of "the gain is above two points", pooled over models and tasks; below .5 the score points the other way."""
    for measure in known_gains(cells):
        known = cells[cells[measure].notna()]
        for name in (*SCORES, *CONTROLS, "headroom", "num_parameters"):
            if name in known:
                value = auc(known[name].to_numpy(float), known[measure].to_numpy(float) > WORTHWHILE_GAIN)
                yield {"measure": measure, "score": name, "auc": value, "cells": len(known)}


# ------------------------------------------------------------------ layer and K chosen on the outcome
def score_maps(layers: pd.DataFrame, model: str, order: str, score: str) -> tuple[np.ndarray, pd.DataFrame]:
    """(configurations, tasks) of one score, and the layer and fraction of each configuration; tasks sorted by name."""
    rows = layers[(layers["model"] == model) & (layers["eigenvectors"] == order) & ~layers["center"]]
    table = rows.pivot_table(index=["layer", "fraction"], columns="dataset", values=score)
    return table.to_numpy(), table.index.to_frame(index=False)


def selection_rows(
    cells: pd.DataFrame, layers: pd.DataFrame, config: Config, measures: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Rows of verdict_selection.csv, one per model, measure, order and score."""
    for model in sorted(cells["model"].unique()):
        target_of = cells[cells["model"] == model].set_index("dataset").sort_index()
        for order in ("largest", "smallest"):
            for score in ("ntps", "retained"):
                maps, configurations = score_maps(layers, model, order, score)
                for measure in measures:
                    target = target_of[measure].to_numpy(float)
                    if np.isfinite(target).sum() < 3 or maps.shape[1] != len(target):
                        continue
                    best = selection_null(maps, target, num_permutations=config.num_draws, seed=config.seed)
                    without = leave_one_out_selection(maps, target, config.num_draws, config.seed)
                    last = configurations["layer"] == configurations["layer"].max()
                    chosen = configurations.iloc[best.configuration]
                    yield {"model": model, "measure": measure, "eigenvectors": order, "score": score,
                           "fixed_rule": spearman(maps[last].mean(0), target), "best": best.best,
                           "layer": int(chosen["layer"]), "fraction": chosen["fraction"],
                           "null_mean": best.null_mean, "null_quantile": best.null_quantile, "p": best.p_value,
                           "leave_one_out": without.correlation, "leave_one_out_p": without.p_value,
                           "configurations": len(maps), "tasks": int(np.isfinite(target).sum())}  # fmt: skip


def sensitivity_rows(cells: pd.DataFrame, layers: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of verdict_sensitivity.csv: Spearman across tasks at every layer and fraction, per model."""
    for model in sorted(cells["model"].unique()):
        targets = cells[cells["model"] == model].set_index("dataset").sort_index()
        for score in NAMES:
            maps, configurations = score_maps(layers, model, "largest", score)
            for measure in ("probe_accuracy", "lora_gain"):
                target = targets[measure].to_numpy(float)
                if maps.shape[1] != len(target) or np.isfinite(target).sum() < 3:
                    continue
                values = spearman_rows(maps, target)
                for (layer, fraction), value in zip(configurations.to_numpy(), values, strict=True):
                    yield {"model": model, "score": score, "measure": measure, "layer": int(layer),
                           "fraction": fraction, "spearman": value}  # fmt: skip


# ------------------------------------------------------------------ controls and calibration
def control_rows(cells: pd.DataFrame, config: Config) -> Iterator[dict[str, Any]]:
    """Rows of verdict_controls.csv: mean over tasks of each score for each V, and its lead over a random V."""
    for model, rows in cells.groupby("model"):
        for score in NAMES:
            for v in ("", "_smallest", "_pca", "_random"):
                lead = (rows[score + v] - rows[f"{score}_random"]).dropna().to_numpy()
                interval = bootstrap_interval(np.mean, lead, num_draws=config.num_draws, seed=config.seed)
                row = {"model": model, "score": score, "v": v.removeprefix("_") or "autoregression"}
                row |= {"value": rows[score + v].mean(), "lead_over_random": interval.value}
                row |= {"low": interval.low, "high": interval.high, "tasks": len(lead)}
                if not v and f"{score}_z" in rows:
                    z = rows[f"{score}_z"].dropna()
                    row |= {"permuted_labels": rows[f"{score}_null_mean"].mean(), "mean_z": z.mean()}
                    row |= {"tasks_above_2_z": int((z > 2).sum())}
                yield row


def calibration_rows(cells: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of verdict_calibration.csv: root mean squared error of a gain predicted for a task left out, in points.

    Least squares on the other tasks, all models together, an intercept per model; `nothing` is the intercept alone.
    """
    predictors = {"nothing": [], **{name: [name] for name in (*SCORES, "headroom")}}
    predictors |= {"headroom and ntps": ["headroom", "ntps"], "headroom and retained_z": ["headroom", "retained_z"]}
    for measure in known_gains(cells):
        for name, columns in predictors.items():
            rows = cells.dropna(subset=[measure, *columns])
            models = pd.get_dummies(rows["model"]).to_numpy(float)
            design, target = np.hstack([models, rows[columns].to_numpy(float)]), rows[measure].to_numpy(float)
            errors = np.empty(len(rows))
            for dataset in rows["dataset"].unique():
                out = (rows["dataset"] == dataset).to_numpy()
                weights = np.linalg.lstsq(design[~out], target[~out])[0]
                errors[out] = design[out] @ weights - target[out]
            worst = np.quantile(np.abs(errors), 0.95)
            yield {"measure": measure, "predictors": name, "rmse_points": 100 * np.sqrt(np.mean(errors**2)),
                   "within_95_percent_points": 100 * worst, "cells": len(rows)}  # fmt: skip


def seed_rows(seeds: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of verdict_seeds.csv: spread between seeds (sample, initial weights, order), beside that over tasks."""
    for model, rows in seeds.groupby("model"):
        for name in ("ntps", "retained", *MEASURES):
            table = rows.pivot(index="dataset", columns="seed", values=name).dropna()
            if table.shape[1] > 1 and len(table) > 1:
                between = float(np.sqrt(table.var(axis=1).mean()))
                yield {"model": model, "name": name, "sd_between_seeds": between, "seeds": table.shape[1],
                       "sd_over_tasks": table.mean(axis=1).std(), "tasks": len(table)}  # fmt: skip


# ------------------------------------------------------------------ the paper's numbers
def published_tables(data_dir: Path, config: Config) -> dict[str, pd.DataFrame]:
    """The same questions asked of the published values; maps over layers and K were not published.

    Raises:
        UserError: the values have not been imported.
    """
    if not (data_dir / "fig3.csv").is_file():
        raise UserError(f"No {data_dir / 'fig3.csv'}. Run: python -m fig_plot.import_published PATH")
    fig2, fig3 = pd.read_csv(data_dir / "fig2.csv"), pd.read_csv(data_dir / "fig3.csv")
    fig3 = fig3.assign(lora_gain=fig3["lora_accuracy"] - fig3["linear_accuracy"], headroom=1 - fig3["linear_accuracy"])
    train = fig2[fig2["metric"] == "train_accuracy"].rename(columns={"value": "probe_accuracy"})
    error = fig2[fig2["metric"] != "train_accuracy"].rename(columns={"value": "probe_mse"})
    rows: list[dict] = []
    for without in (None, "medical"):  # its texts are a defect of the released loader
        for cells, measure in ((train, "probe_accuracy"), (error, "probe_mse"), (fig3, "lora_gain")):
            kept = cells[cells["dataset"] != without]
            target, score = matrix(kept, measure), matrix(kept, "ntps")
            sizes = pd.Series({model: parse_size(MODELS[model].parameters) for model in target.index})
            scores = {"ntps": score, "num_parameters": pd.DataFrame(dict.fromkeys(target, sizes))}
            if "headroom" in kept:
                scores["headroom"] = matrix(kept, "headroom")
            found = [*others_rows(measure, target, config)]
            for name, table in scores.items():
                found += direction_rows("tasks", name, measure, table, target, config)
                found += direction_rows("models", name, measure, table.T, target.T, config)
            rows += [{"without": without or "", **row} for row in found]
    sizes_of_sweep = (1, 10, 19, 100, 475)
    noise = [(size, *expected_maximum(size, 12, seed=config.seed)) for size in sizes_of_sweep]
    decision = [
        {"score": name, "auc": auc(sign * fig3[name].to_numpy(), fig3["lora_gain"].to_numpy() > WORTHWHILE_GAIN)}
        for name, sign in (("ntps", -1), ("headroom", 1))
    ]
    partial = partial_rows(fig3, config, ("ntps",))
    return {
        "correlations": pd.DataFrame(rows),
        "partial": pd.DataFrame(partial),
        "noise": pd.DataFrame(noise, columns=["configurations", "mean", "quantile"]),
        "decision": pd.DataFrame(decision),
    }


# ------------------------------------------------------------------ run
def study_tables(data_dir: Path, config: Config) -> dict[str, pd.DataFrame]:
    """Every table of the mini study."""
    seeds = load_seeds(data_dir)
    every = average_seeds(seeds)
    layers = read_table("layers", data_dir)
    layers = layers[(layers["split"] == "train") & (layers["seed"] == layers["seed"].min())]
    cells = trained_models(every)
    rows = {
        "correlations": correlation_rows(cells, config),
        "partial": partial_rows(cells, config, (*SCORES, *CONTROLS)),
        "decision": decision_rows(cells),
        "selection": selection_rows(cells, layers, config, ("probe_accuracy", "lora_gain")),
        "sensitivity": sensitivity_rows(cells, layers),
        "controls": control_rows(every, config),
        "calibration": calibration_rows(cells),
        "seeds": seed_rows(seeds),
    }
    return {name: pd.DataFrame(table_rows) for name, table_rows in rows.items()}


def print_summary(tables: dict[str, pd.DataFrame]) -> None:
    """Spearman of every score with the main measures, and the smaller tables."""
    spearmans = tables["correlations"].query("correlation == 'spearman'")
    shown = spearmans.assign(
        cell=spearmans.apply(lambda row: f"{row.value:+.2f} [{row.low:+.2f}, {row.high:+.2f}]", axis=1)
    )
    shown["group"] = shown["direction"]
    if "without" in shown:
        shown["group"] += shown["without"].map(lambda name: f", without {name}" if name else "")
    for group, rows in shown.groupby("group", sort=False):
        print(f"\nSpearman {group}, mean and 95 % interval")
        print(rows.pivot(index="score", columns="measure", values="cell").fillna("").to_string())
    for name, table in tables.items():
        if name not in ("correlations", "sensitivity") and not table.empty:
            print(f"\n{name}\n{table.round(3).to_string(index=False)}")


def main(config: Config) -> None:
    """Writes the tables and prints what they say."""
    data_dir = config.data_dir or (PUBLISHED_DIR if config.published else DATA_DIR)
    tables = published_tables(data_dir, config) if config.published else study_tables(data_dir, config)
    print_summary(tables)
    for name, table in tables.items():
        path = data_dir / f"verdict_{name}.csv"
        if table.empty:  # nothing to say, such as of gains where nothing was trained
            path.unlink(missing_ok=True)
        else:
            save_csv(path, table)
    print(data_dir)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
