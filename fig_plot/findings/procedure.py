"""Question 1 of docs/findings.md: layer and K chosen on the outcome, as in the paper, and step by step without that.

A study's maps are its scores at every layer and fraction; the published numbers come chosen already.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from fig_plot.findings.correlations import (
    Draws,
    bootstrap_interval,
    mean_correlation,
    mean_partial_spearman,
    mean_spearman,
    spearman,
    spearman_rows,
    value_of,
)
from fig_plot.findings.questions import known
from fig_plot.findings.selection import joint_p_value, leave_one_out_selection, selection_null
from fig_plot.tables import CLAIMED, RANDOM, models_with_twins
from utils.algebra.scores import SCORES

# measures of the layer that the score is taken at, as in probes.csv, and the same on test rows
SAME_ON_TEST = {"train_accuracy": "test_accuracy", "train_mse": "test_mse"}
OF_THE_PROCEDURE = (*SAME_ON_TEST, "lora_gain_paper", "lora_gain")
SELECTED_ON_TEST = ("probe_accuracy", "probe_mse", "lora_gain_paper", "lora_gain")
VECTORS = ("x", "y", "given", "null")  # the vectors in a row of `step_rows`
STEPS = ("layer and K chosen", "last layer, K chosen", "last layer, mean over K", "the same on test rows")


def score_sweep(layers: pd.DataFrame, model: str, order: str, score: str) -> pd.DataFrame:
    """One score of one model, averaged over seeds: a row per configuration (layer, fraction), a column per task."""
    rows = layers[(layers["model"] == model) & (layers["eigenvectors"] == order)]
    return rows.pivot_table(index=["layer", "fraction"], columns="dataset", values=score)


def is_last(sweep: pd.DataFrame) -> np.ndarray:
    """True for each configuration of the last layer."""
    layers = sweep.index.get_level_values("layer")
    return layers == layers.max()


def outcomes(sweep: pd.DataFrame, cells: pd.DataFrame, probes: pd.DataFrame, measure: str) -> np.ndarray:
    """A measure as (configurations, tasks); a probe's measure comes from the layer of each configuration."""
    if measure in (*SAME_ON_TEST, *SAME_ON_TEST.values()):
        table = probes.pivot_table(index="layer", columns="dataset", values=measure)
        return table.reindex(index=sweep.index.get_level_values("layer"), columns=sweep.columns).to_numpy(float)
    values = cells.set_index("dataset")[measure].reindex(sweep.columns).to_numpy(float)
    return np.broadcast_to(values, sweep.shape)


# ------------------------------------------------------------------ one model
def step_rows(
    sweep: pd.DataFrame, cells: pd.DataFrame, probes: pd.DataFrame, measure: str, draws: Draws
) -> Iterator[dict[str, Any]]:
    """Yields the steps of one model and measure, with `x`, `y`, `given`, (tasks,) each, and, if chosen, `null`."""
    if not (measure in probes or known(cells, (measure,))):
        return
    target, direction = outcomes(sweep, cells, probes, measure), CLAIMED[measure]
    num_known = int(np.isfinite(target[-1]).sum())
    if num_known < 4:
        return
    classes = cells.set_index("dataset")["num_classes"].reindex(sweep.columns).to_numpy(float)
    last, maps = is_last(sweep), sweep.to_numpy()

    def row(step: str, x: np.ndarray, y: np.ndarray, **more: Any) -> dict[str, Any]:
        return {"measure": measure, "step": step, "spearman": spearman(x, y), "tasks": num_known, **more,
                "x": x, "y": y, "given": classes}  # fmt: skip

    for step, which in zip(STEPS[:2], (np.ones(len(sweep), bool), last), strict=True):
        found = selection_null(maps[which], target[which], draws.num_permutations, draws.seed, direction)
        place = np.flatnonzero(which)[found.configuration]
        layer, fraction = sweep.index[place]
        yield row(
            step, maps[place], target[place], noise=found.null_mean, noise_quantile=found.null_quantile,
            p=found.p_value, layer=layer, fraction=fraction, configurations=int(which.sum()), null=found.null,
        )  # fmt: skip
    mean, of_mean = maps[last].mean(0), {"layer": sweep.index[-1][0], "configurations": 1}
    yield row(STEPS[2], mean, target[-1], **of_mean)
    if measure in SAME_ON_TEST:
        yield row(STEPS[3], mean, outcomes(sweep, cells, probes, SAME_ON_TEST[measure])[-1], **of_mean)


# ------------------------------------------------------------------ a study
def like_for_like_rows(
    cells: pd.DataFrame, layers: pd.DataFrame, probes: pd.DataFrame, draws: Draws
) -> Iterator[dict[str, Any]]:
    """Rows of findings_like_for_like.csv: each model, and `mean` over them.

    `given_classes` is the partial Spearman with the number of classes held fixed. `p` of the mean is joint over all
    models. Intervals of the mean are over tasks. A step that chose its configuration has no interval, because a
    bootstrap would have to repeat the choice; its `given_classes` has one, for the configuration that was chosen.
    """
    models = list(dict.fromkeys(cells["model"]))
    for measure in OF_THE_PROCEDURE:
        found = []
        for model in models:
            sweep = score_sweep(layers, model, "largest", "ntps")
            if len(sweep):
                of_model, its_probes = (table[table["model"] == model] for table in (cells, probes))
                found += [{"model": model, **row} for row in step_rows(sweep, of_model, its_probes, measure, draws)]
        for step in STEPS:
            rows = [row for row in found if row["step"] == step]
            yield from map(without_vectors, rows)
            if rows:
                yield mean_row(rows, measure, step, draws)


def twin_rows(
    cells: pd.DataFrame, layers: pd.DataFrame, probes: pd.DataFrame, draws: Draws
) -> Iterator[dict[str, Any]]:
    """Rows of findings_twin.csv: the steps of a model by its own scores, and by those of its twin of random weights.

    The outcomes are those of the trained model in both, over the tasks that both have. `weights` tells the two apart.
    """
    for model in models_with_twins(layers):
        twin = model + RANDOM
        of_each = [set(layers.loc[layers["model"] == name, "dataset"]) for name in (model, twin)]
        of_both, of_model, its_probes = (
            table[table["dataset"].isin(set.intersection(*of_each))]
            for table in (layers, cells[cells["model"] == model], probes[probes["model"] == model])
        )
        if of_both.empty:
            continue
        for weights, name in (("trained", model), ("random", twin)):
            sweep = score_sweep(of_both, name, "largest", "ntps")
            for measure in OF_THE_PROCEDURE:
                for row in step_rows(sweep, of_model, its_probes, measure, draws):
                    yield {"model": model, "weights": weights, **without_vectors(row)}


def without_vectors(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `step_rows` with its vectors replaced by their partial Spearman."""
    kept = {name: value for name, value in row.items() if name not in VECTORS}
    return kept | {"given_classes": value_of(mean_partial_spearman, row["x"], row["y"], row["given"])}


def mean_row(rows: list[dict[str, Any]], measure: str, step: str, draws: Draws) -> dict[str, Any]:
    """The mean over models of one step."""
    x, y, given = (np.array([row[name] for row in rows]) for name in ("x", "y", "given"))
    partial = bootstrap_interval(mean_partial_spearman, x, y, given, draws=draws)
    row = {"model": "mean", "measure": measure, "step": step, "spearman": mean_correlation(x, y),
           "tasks": max(row["tasks"] for row in rows), "models": len(rows)}  # fmt: skip
    if "noise" in rows[0]:
        row["noise"] = float(np.mean([each["noise"] for each in rows]))
        present = np.isfinite(y)
        if (present == present[0]).all():  # the same tasks, and so the same permutations
            row["p"] = joint_p_value([each["spearman"] for each in rows], [each["null"] for each in rows],
                                     CLAIMED[measure])  # fmt: skip
    else:
        interval = bootstrap_interval(mean_spearman, x, y, draws=draws)
        row |= {"low": interval.low, "high": interval.high}
    return row | partial.columns("given_classes", "given_classes_")


# ------------------------------------------------------------------ on test rows
def selection_rows(cells: pd.DataFrame, layers: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of findings_selection.csv, one per model, measure on test rows, order and score."""
    orders, scores = ("largest", "smallest"), ("ntps", "retained")
    for (model, of_model), order, score in itertools.product(cells.groupby("model"), orders, scores):
        sweep = score_sweep(layers, model, order, score)
        for measure in known(of_model, SELECTED_ON_TEST) if len(sweep) else ():
            target = of_model.set_index("dataset")[measure].reindex(sweep.columns).to_numpy(float)
            if np.isfinite(target).sum() < 4:
                continue
            options = (draws.num_permutations, draws.seed, CLAIMED[measure])
            best = selection_null(sweep, target, *options)
            without = leave_one_out_selection(sweep, target, *options)
            layer, fraction = sweep.index[best.configuration]
            yield {"model": model, "measure": measure, "eigenvectors": order, "score": score,
                   "claimed": "+" if CLAIMED[measure] > 0 else "-",
                   "fixed_rule": spearman(sweep[is_last(sweep)].mean(), target), "best": best.best,
                   "layer": layer, "fraction": fraction, "null_mean": best.null_mean,
                   "null_quantile": best.null_quantile, "p": best.p_value, "leave_one_out": without.correlation,
                   "leave_one_out_p": without.p_value, "configurations": len(sweep),
                   "tasks": int(np.isfinite(target).sum())}  # fmt: skip


def sensitivity_rows(cells: pd.DataFrame, layers: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of findings_sensitivity.csv: Spearman across tasks at every layer and fraction, per model."""
    for (model, of_model), score in itertools.product(cells.groupby("model"), SCORES):
        sweep = score_sweep(layers, model, "largest", score)
        for measure in known(of_model, ("probe_accuracy", "lora_gain")) if len(sweep) else ():
            target = of_model.set_index("dataset")[measure].reindex(sweep.columns).to_numpy(float)
            if np.isfinite(target).sum() >= 3:
                values = spearman_rows(sweep, target)
                for (layer, fraction), value in zip(sweep.index, values, strict=True):
                    yield {"model": model, "score": score, "measure": measure, "layer": layer, "fraction": fraction,
                           "spearman": value}  # fmt: skip
