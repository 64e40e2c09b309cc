"""Answer questions 2 to 6 and 8 of docs/findings.md, and later questions about the same tables.

Each function yields the rows of one CSV file. `cells` has a row per model and task (fig_plot/tables.py); `draws`
give the intervals over tasks.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import f

from fig_plot.findings.correlations import (
    Draws,
    bootstrap_interval,
    drawn_auc,
    mean_cell,
    mean_over_models,
    mean_partial_spearman,
    mean_spearman,
    spearman,
    spearman_lead,
)
from fig_plot.tables import (
    FEATURE_SCORES,
    HELD_OUT,
    MEASURES,
    RANDOM,
    SEED_KEYS,
    average_seeds,
    without_random_weights,
)
from utils.algebra.scores import SCORES

# scores of the run, all at the last layer, and those of its controls
RUN_SCORES = ("ntps", "ntps_smallest", "ntps_label", "ntps_whitened", "retained",
              "ntps_label_z", "ntps_whitened_z", "retained_z")  # fmt: skip
CONTROLS = ("ntps_pca", "retained_pca", "retained_random", "retained_z_pca", "retained_z_random",
            "retained_random_z", "retained_lead")  # fmt: skip
GAINS = ("lora_gain", "lora_gain_paper", "full_gain")
WORTHWHILE_GAIN = 0.02  # question 5 asks for gains above it
TASK_BASELINES = ("majority_accuracy", "num_classes", "headroom", "bag_of_words_accuracy", "best_layer_accuracy")
MODEL_BASELINES = ("num_parameters", "held_out_loss", "headroom")
RIVALS = ("num_classes", "bag_of_words_accuracy", "headroom", "best_layer_accuracy")  # in question 2, with random V
OF_THE_OUTCOME = ("headroom", "best_layer_accuracy")  # computed from the probe's accuracy: rivals for gains only
CANDIDATES = ("headroom", "best_layer_lead", "ridge_r2", "logme", "h_oas", "retained_z", "retained_lead", "ntps",
              "num_classes")  # fmt: skip
AFTER_LORA = (*SCORES, "retained_lead", HELD_OUT)  # compared before and after LoRA
LAYER_CHOOSERS = (*FEATURE_SCORES, *SCORES)  # they use training rows alone
Rows = Iterator[dict[str, Any]]


def known(cells: pd.DataFrame, names: tuple[str, ...]) -> list[str]:
    """The names of columns that exist and have any value, each once."""
    return [name for name in dict.fromkeys(names) if name in cells and cells[name].notna().any()]


def matrix(cells: pd.DataFrame, column: str) -> pd.DataFrame:
    """One column as a table of models x datasets; missing cells are NaN."""
    return cells.pivot(index="model", columns="dataset", values=column)


def models_with_twins(rows: pd.DataFrame) -> list[str]:
    """The models that have a twin with random weights."""
    models = set(rows["model"])
    return sorted(model for model in models if model + RANDOM in models)


def tables_of(cells: pd.DataFrame, *names: str) -> list[np.ndarray]:
    """Columns as arrays (models, tasks)."""
    return [matrix(cells, name).to_numpy(float) for name in names]


def rivals_of(measure: str) -> tuple[str, ...]:
    """The simple baselines to compare a score with, for this measure."""
    return tuple(name for name in RIVALS if measure in GAINS or name not in OF_THE_OUTCOME)


# ------------------------------------------------------------------ question 2: the fixed rule
def correlation_rows(cells: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_correlations.csv: every score and baseline with every measure, across tasks and across models.

    `mean of the others` is the baseline without a score: the mean of the other models on the task, or of the model on
    the other tasks.
    """
    names = (*RUN_SCORES, *CONTROLS, *FEATURE_SCORES, *TASK_BASELINES, *MODEL_BASELINES, "probe_accuracy")
    for measure in known(cells, MEASURES):
        target = matrix(cells, measure)
        scores = {name: (matrix(cells, name), matrix(cells, name).T) for name in known(cells, names) if name != measure}
        scores["mean of the others"] = mean_of_others(target), mean_of_others(target.T)
        for name, (in_models, in_tasks) in scores.items():
            for direction, score, outcome in (("tasks", in_models, target), ("models", in_tasks, target.T)):
                x, y = score.to_numpy(float), outcome.to_numpy(float)
                of_groups = np.array([spearman(*group) for group in zip(x, y, strict=True)])
                if not np.isfinite(of_groups).any():
                    continue
                # across models the groups are the tasks, which the bootstrap draws
                statistic, tables = (mean_spearman, (x, y)) if direction == "tasks" else (mean_cell, (of_groups,))
                interval = bootstrap_interval(statistic, *tables, draws=draws)
                yield {"direction": f"across {direction}", "measure": measure, "score": name, **interval._asdict(),
                       "groups": int(np.isfinite(of_groups).sum()),
                       "members": int(np.isfinite(x * y).sum(1).max())}  # fmt: skip


def mean_of_others(table: Any) -> Any:
    """The mean of the other values, for each value of a series, or for each cell of a table within its column."""
    present = table.notna()
    count = present.sum() - present
    return (table.sum() - table.fillna(0)) / count.where(count > 0)


def lead_rows(cells: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_leads.csv: |mean Spearman| of a score minus that of the best baseline, on the same cells."""
    for measure, name in itertools.product(known(cells, MEASURES), known(cells, (*RUN_SCORES, *FEATURE_SCORES))):
        rivals = known(cells, (*rivals_of(measure), f"{name}_random"))
        rows = cells.dropna(subset=[measure, name])
        target, score, *others = tables_of(rows, measure, name, *rivals)
        sizes = {rival: abs(spearman(table, target)) for rival, table in zip(rivals, others, strict=True)}
        sizes = {rival: size for rival, size in sizes.items() if np.isfinite(size)}
        if not sizes or not np.isfinite(spearman(score, target)):
            continue
        best = max(sizes, key=lambda rival: sizes[rival])
        interval = bootstrap_interval(spearman_lead, score, others[rivals.index(best)], target, draws=draws)
        yield {"measure": measure, "score": name, "best_baseline": best, "baseline_size": sizes[best],
               **interval.columns("lead"), "tasks": target.shape[1]}  # fmt: skip


def partial_rows(cells: pd.DataFrame, draws: Draws, scores: tuple[str, ...]) -> Rows:
    """Rows of findings_partial.csv: Spearman of score and measure given a third variable, mean over models.

    It is the headroom for gains, the number of classes for the probe's error and its accuracy above the majority.
    """
    pairs = [(measure, "headroom") for measure in known(cells, GAINS)]
    if known(cells, ("num_classes",)):
        pairs += [(measure, "num_classes") for measure in known(cells, ("probe_skill", "probe_mse"))]
    for (measure, given), name in itertools.product(pairs, known(cells, scores)):
        interval = bootstrap_interval(mean_partial_spearman, *tables_of(cells, name, measure, given), draws=draws)
        yield {"measure": measure, "score": name, "given": given, **interval._asdict()}


# ------------------------------------------------------------------ question 3: V beside its controls
def control_rows(cells: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_controls.csv: mean over tasks of each score for each V, and its lead over a random V.

    `random_z` is z against random V, if K_sweep.py drew several.
    """
    for (model, rows), score in itertools.product(cells.groupby("model"), SCORES):
        for v in ("", "_smallest", "_pca", "_random"):
            lead = (rows[score + v] - rows[f"{score}_random"]).dropna().to_numpy()
            if not len(lead):
                continue
            interval = bootstrap_interval(mean_cell, lead, draws=draws)
            row = {"model": model, "score": score, "v": v.removeprefix("_") or "autoregression",
                   "value": rows[score + v].mean(), **interval.columns("lead_over_random"),
                   "tasks": len(lead)}  # fmt: skip
            if not v and known(rows, (f"{score}_random_z",)):
                z = rows[f"{score}_random_z"]
                row["tasks_above_2_random_z"] = int((z > 2).sum())
                row["tasks_below_minus_2_random_z"] = int((z < -2).sum())
            yield row


def random_weights_rows(seeds: pd.DataFrame, after: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_random_weights.csv: a trained model beside its twin of random weights, at the seeds of both.

    A row has means over tasks, the mean difference, and Spearman's correlation of the two over tasks, for a score, an
    outcome or, as `<score>_change`, the change by LoRA (`after` comes from `tables.load_after_lora`).
    """
    changes = changes_by_lora(after)
    changed = [name for name in changes if name.endswith("_change")]
    seeds = seeds.merge(changes[[*SEED_KEYS, *changed]], on=SEED_KEYS, how="left")
    names = (*SCORES, *FEATURE_SCORES, *MEASURES, "lora_accuracy", *changed)
    for model in models_with_twins(seeds):
        both = (seeds[seeds["model"] == name].set_index(["dataset", "seed"]) for name in (model, model + RANDOM))
        trained, random = (table.dropna(axis=1, how="all") for table in both)
        for name in [name for name in names if name in trained and name in random]:
            pairs = pd.concat({"trained": trained[name], "random": random[name]}, axis=1, join="inner").dropna()
            x, y = pairs.groupby("dataset").mean().to_numpy(float).T
            if len(x) < 3:
                continue
            lead = bootstrap_interval(mean_cell, x - y, draws=draws)
            order = bootstrap_interval(mean_spearman, x, y, draws=draws)
            yield {"model": model, "name": name, "trained": x.mean(), "random_weights": y.mean(),
                   **lead.columns("lead"), **order.columns("spearman", "spearman_"), "tasks": len(x)}  # fmt: skip


# ------------------------------------------------------------------ question 4: after LoRA
def changes_by_lora(after: pd.DataFrame) -> pd.DataFrame:
    """`after` with the change of each known score by LoRA as `<score>_change`."""
    return after.assign(
        **{f"{name}_change": after[name] - after[f"{name}_before"] for name in known(after, AFTER_LORA)}
    )


def after_lora_rows(after: pd.DataFrame, seeds: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_after_lora.csv: the change of each score, and whether it follows LoRA's gain at the same seeds.

    The row `all` averages several trained models: each over its tasks, then over models.
    """
    after = changes_by_lora(after).merge(seeds[[*SEED_KEYS, "lora_gain"]], on=SEED_KEYS, how="left")
    after = average_seeds(after)
    trained = without_random_weights(after)
    together = [("all", trained)] if trained["model"].nunique() != 1 else []
    for model, rows in (*after.groupby("model"), *together):
        for name in [name for name in AFTER_LORA if f"{name}_change" in after]:
            of_score = rows.assign(change=rows[f"{name}_change"]).dropna(subset="change")
            change, gain = (of_score.pivot(index="dataset", columns="model", values=v) for v in ("change", "lora_gain"))
            tables = [table.to_numpy(float).T for table in (change, gain)]
            mean = bootstrap_interval(mean_cell, tables[0], draws=draws)
            follows = bootstrap_interval(mean_spearman, *tables, draws=draws)
            yield {"model": model, "score": name, "before": of_score[f"{name}_before"].mean(),
                   "after": of_score[name].mean(), **mean.columns("change"),
                   "raised": int((of_score["change"] > 0).sum()), "cells": len(of_score),
                   "tasks": of_score["dataset"].nunique(),
                   **follows.columns("spearman_with_gain", "spearman_")}  # fmt: skip


# ------------------------------------------------------------------ question 5: LoRA's gain on a task left out
def mean_auc(counts: np.ndarray, score: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """AUC of "the gain is above two points" over the tasks of a model, mean over models: a statistic.

    It compares pairs within a model: pooling the models would compare the levels of their scores, not tasks. A model
    with all gains on one side does not count.
    """
    of_each = []
    for x, y in zip(score, gain, strict=True):
        measured = np.isfinite(y)
        of_each.append(drawn_auc(counts[:, measured], x[measured], y[measured] > WORTHWHILE_GAIN))
    return mean_over_models(of_each)


def decision_rows(cells: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_decision.csv: `mean_auc` of each candidate, with its interval over tasks.

    Above .5 a higher value goes with a gain; the paper claims the opposite for NTPS.
    """
    for measure, name in itertools.product(known(cells, GAINS), known(cells, (*CANDIDATES, *RUN_SCORES))):
        rows = cells.dropna(subset=[measure, name])
        tables = tables_of(rows, name, measure)
        interval = bootstrap_interval(mean_auc, *tables, draws=draws)
        if np.isfinite(interval.value):
            yield {"measure": measure, "score": name, **interval.columns("auc"), "cells": len(rows),
                   "tasks": tables[0].shape[1], "above": int((rows[measure] > WORTHWHILE_GAIN).sum())}  # fmt: skip


def without_each_task(rows: pd.DataFrame, columns: list[str], measure: str) -> np.ndarray:
    """The gain predicted by least squares on the other tasks (`columns`, an intercept per model) minus the gain."""
    models = pd.get_dummies(rows["model"]).to_numpy(float)
    design, target = np.hstack([models, rows[columns].to_numpy(float)]), rows[measure].to_numpy(float)
    errors = np.empty(len(rows))
    for dataset in rows["dataset"].unique():
        out = (rows["dataset"] == dataset).to_numpy()
        errors[out] = design[out] @ np.linalg.lstsq(design[~out], target[~out])[0] - target[out]
    return errors


def calibration_rows(cells: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_calibration.csv: error of a gain predicted for a task left out, in points of accuracy.

    `nothing` predicts the mean gain of the other tasks. `lead` is its mean absolute error minus the predictor's, on the
    same cells, with an interval over tasks: a predictor is better than nothing if the interval is above 0.
    """
    predictors = {"nothing": [], **{name: [name] for name in known(cells, (*CANDIDATES, *RUN_SCORES))}}
    for measure, (name, columns) in itertools.product(known(cells, GAINS), predictors.items()):
        rows = cells.dropna(subset=[measure, *columns])
        if rows["dataset"].nunique() < 4:
            continue
        errors, of_mean = (100 * without_each_task(rows, used, measure) for used in (columns, []))
        lead = pd.Series(np.abs(of_mean) - np.abs(errors)).groupby(rows["dataset"].to_numpy()).mean().to_numpy()
        interval = bootstrap_interval(mean_cell, lead, draws=draws)
        yield {"measure": measure, "predictors": name, "error_points": np.abs(errors).mean(),
               **interval.columns("lead"), "within_95_percent_points": np.quantile(np.abs(errors), 0.95),
               "cells": len(rows), "tasks": rows["dataset"].nunique()}  # fmt: skip


# ------------------------------------------------------------------ question 6: spread between seeds
def seed_rows(seeds: pd.DataFrame) -> Rows:
    """Rows of findings_seeds.csv: spread between seeds (sample, initial weights, order), beside that over tasks.

    The interval of their ratio assumes normal numbers: the F distribution of a ratio of two variances.
    """
    names = (*RUN_SCORES, "retained_lead", *FEATURE_SCORES, *MEASURES)
    for model, rows in seeds.groupby("model"):
        for name in known(rows, names):
            table = rows.pivot(index="dataset", columns="seed", values=name).dropna(axis=1, how="all").dropna()
            if table.shape[1] > 1 and len(table) > 1:
                between, over = float(np.sqrt(table.var(axis=1).mean())), table.mean(axis=1).std()
                freedom = (len(table) * (table.shape[1] - 1), len(table) - 1)
                low, high = between / over / np.sqrt(f.ppf([0.975, 0.025], *freedom))
                yield {"model": model, "name": name, "sd_between_seeds": between, "seeds": table.shape[1],
                       "sd_over_tasks": over, "share": between / over, "low": low, "high": high,
                       "tasks": len(table)}  # fmt: skip


# ------------------------------------------------------------------ question 8: the layer that a score chooses
def scores_by_layer(
    layers: pd.DataFrame, features: pd.DataFrame, probes: pd.DataFrame, screened: pd.DataFrame
) -> pd.DataFrame:
    """Every score of training rows and the probe's test accuracy, a row per model, dataset, seed and layer.

    The first three arguments are tables of collect.py; scores of `layers` become means over K. Ridge R2 is that of
    `screened_layers`, because K_sweep.py takes it from test rows at all layers but the last.
    """
    keys = [*SEED_KEYS, "layer"]
    swept = layers[layers["eigenvectors"] == "largest"].groupby(keys, as_index=False)[list(SCORES)].mean()
    scores = [name for name in FEATURE_SCORES if name in features and name != "ridge_r2"]
    accuracy = without_random_weights(probes)[[*keys, "test_accuracy"]].dropna()
    table = accuracy.merge(swept, on=keys).merge(features[[*keys, *scores]], on=keys)
    return table.merge(screened, on=keys, how="left")


def layer_choice_rows(table: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_layer_choice.csv: test accuracy of the layer that each score chooses, its lead over the last.

    Other rows need no score: the last layer, the middle one, any (the mean over layers), the best one on the other
    datasets, and the best one on test rows, which nobody knows beforehand. `over_middle` and `over_others` are leads
    over two of these. Values are means over tasks, after the mean over seeds of each; intervals are over tasks.
    """
    beside = {"lead": "last layer", "over_middle": "middle layer", "over_others": "best on the others"}
    for model, rows in table.groupby("model"):
        accuracy = rows.pivot(index=["dataset", "seed"], columns="layer", values="test_accuracy")
        if accuracy.shape[1] < 3 or rows["dataset"].nunique() < 2:
            continue
        chosen = {"last layer": accuracy.iloc[:, -1], "middle layer": accuracy.iloc[:, accuracy.shape[1] // 2],
                  "any layer": accuracy.mean(axis=1), "best on test rows": accuracy.max(axis=1)}  # fmt: skip
        for name in known(rows, LAYER_CHOOSERS):
            at = rows.loc[rows.dropna(subset=name).groupby(["dataset", "seed"])[name].idxmax()]
            chosen[name] = at.set_index(["dataset", "seed"])["test_accuracy"]
        of_layer = accuracy.groupby("dataset").mean()
        elsewhere = {task: of_layer.drop(index=task).mean().idxmax() for task in of_layer.index}
        best_elsewhere = [accuracy.loc[(task, seed), elsewhere[task]] for task, seed in accuracy.index]
        by_seed = pd.DataFrame({**chosen, "best on the others": best_elsewhere})
        for name in by_seed:
            of_task = by_seed[name].groupby("dataset").mean()
            row = {"model": model, "chosen_by": name, "accuracy": of_task.mean()}
            for lead, other in beside.items():  # at the same seeds
                values = (by_seed[name] - by_seed[other]).groupby("dataset").mean()
                interval = bootstrap_interval(mean_cell, values, draws=draws)
                row |= interval.columns(lead, "" if lead == "lead" else f"{lead}_")
            yield row | {"tasks": int(of_task.notna().sum())}
