"""Question 1 of docs/findings.md: layer and K chosen on the outcome, as in the paper, and step by step without that.

A study's maps are its scores at every layer and fraction; the published numbers come chosen already.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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
from fig_plot.findings.questions import is_known
from fig_plot.findings.selection import joint_p_value, leave_one_out_selection, selection_null
from fig_plot.tables import CLAIMED, RANDOM_MODELS, matrix
from utils.algebra.scores import SCORES

# measures of the layer that the score is taken at, as in probes.csv, and the same on test rows
SAME_ON_TEST = {"train_accuracy": "test_accuracy", "train_mse": "test_mse"}
OF_THE_PROCEDURE = (*SAME_ON_TEST, "lora_gain_paper", "lora_gain")
SELECTED_ON_TEST = ("probe_accuracy", "probe_mse", "lora_gain_paper", "lora_gain")
VECTORS = ("x", "y", "given", "null")  # of a row of `step_rows`
STEPS = ("layer and K chosen", "last layer, K chosen", "last layer, mean over K", "the same on test rows")


@dataclass(frozen=True)
class Sweep:
    """One score of one model at every configuration, with the outcomes: all (configurations, tasks) and aligned."""

    maps: np.ndarray
    layers: np.ndarray  # (configurations,)
    fractions: np.ndarray  # (configurations,)
    tasks: list[str]

    @property
    def last(self) -> np.ndarray:
        """Which configurations are of the last layer."""
        return self.layers == self.layers.max()

    def outcome(self, probes: pd.DataFrame, column: str) -> np.ndarray:
        """A probe's number at the layer of each configuration, (configurations, tasks)."""
        table = probes.pivot_table(index="layer", columns="dataset", values=column)
        return table.reindex(index=self.layers, columns=self.tasks).to_numpy(float)


def score_sweep(layers: pd.DataFrame, model: str, order: str, score: str) -> Sweep:
    """The sweep of one score, averaged over seeds; tasks sorted by name."""
    rows = layers[(layers["model"] == model) & (layers["eigenvectors"] == order)]
    table = rows.pivot_table(index=["layer", "fraction"], columns="dataset", values=score)
    index = table.index.to_frame(index=False)
    return Sweep(table.to_numpy(), index["layer"].to_numpy(), index["fraction"].to_numpy(), list(table.columns))


def outcomes(sweep: Sweep, cells: pd.DataFrame, probes: pd.DataFrame, measure: str) -> np.ndarray | None:
    """(configurations, tasks) of a measure, each configuration's own where it is one of a layer; None: not measured."""
    if measure in SAME_ON_TEST:
        return sweep.outcome(probes, measure) if measure in probes else None
    if not is_known(cells, measure):
        return None
    values = cells.set_index("dataset")[measure].reindex(sweep.tasks).to_numpy(float)
    return np.broadcast_to(values, sweep.maps.shape)


# ------------------------------------------------------------------ one model
def step_rows(
    sweep: Sweep, cells: pd.DataFrame, probes: pd.DataFrame, measure: str, draws: Draws
) -> Iterator[dict[str, Any]]:
    """The steps of one model and measure. With `x`, `y` and `given`, (tasks,) each, and where it is chosen `null`."""
    target, direction = outcomes(sweep, cells, probes, measure), CLAIMED[measure]
    if target is None or np.isfinite(target[-1]).sum() < 4:
        return
    classes = cells.set_index("dataset")["num_classes"].reindex(sweep.tasks).to_numpy(float)
    known = np.isfinite(target[-1])

    def row(step: str, x: np.ndarray, y: np.ndarray, **more: Any) -> dict[str, Any]:
        return {"measure": measure, "step": step, "spearman": spearman(x, y), "tasks": int(known.sum()), **more,
                "x": x, "y": y, "given": classes}  # fmt: skip

    for step, which in zip(STEPS[:2], (np.ones(len(sweep.maps), bool), sweep.last), strict=True):
        maps, outcome = sweep.maps[which], target[which]
        found = selection_null(maps, outcome, draws.num_permutations, draws.seed, direction)
        place = np.flatnonzero(which)[found.configuration]
        yield row(
            step, sweep.maps[place], target[place], noise=found.null_mean, noise_quantile=found.null_quantile,
            p=found.p_value, layer=int(sweep.layers[place]), fraction=sweep.fractions[place], configurations=len(maps),
            null=found.null,
        )  # fmt: skip
    mean = sweep.maps[sweep.last].mean(0)
    yield row(STEPS[2], mean, target[-1], layer=int(sweep.layers.max()), configurations=1)
    if measure in SAME_ON_TEST:
        on_test = sweep.outcome(probes, SAME_ON_TEST[measure])[-1]
        yield row(STEPS[3], mean, on_test, layer=int(sweep.layers.max()), configurations=1)


# ------------------------------------------------------------------ a study
def like_for_like_rows(
    cells: pd.DataFrame, layers: pd.DataFrame, probes: pd.DataFrame, draws: Draws
) -> Iterator[dict[str, Any]]:
    """Rows of findings_like_for_like.csv: each model, and `mean` over them.

    `given_classes` is the partial Spearman with the number of classes held fixed. `p` of the mean is that of all models
    at once. Intervals of the mean are over tasks; where the configuration was chosen they would have to know of the
    choice, so that there is none but that of `given_classes`, for the configuration as it was chosen.
    """
    models = list(dict.fromkeys(cells["model"]))
    for measure in OF_THE_PROCEDURE:
        found = []
        for model in models:
            sweep = score_sweep(layers, model, "largest", "ntps")
            if len(sweep.maps):
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

    The outcomes are those of the trained model in both, over the tasks that both have. `weights` says whose scores.
    """
    for twin, model in RANDOM_MODELS.items():
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
    """A row of `step_rows` with the partial Spearman of its vectors in their place."""
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
        known = np.isfinite(y)
        if (known == known[0]).all():  # the same tasks, and so the same permutations
            row["p"] = joint_p_value([each["spearman"] for each in rows], [each["null"] for each in rows],
                                     CLAIMED[measure])  # fmt: skip
    else:
        interval = bootstrap_interval(mean_spearman, x, y, draws=draws)
        row |= {"low": interval.low, "high": interval.high}
    names = ("given_classes", "given_classes_low", "given_classes_high")
    return row | dict(zip(names, partial, strict=True))


def published_steps(tables: dict[str, pd.DataFrame], draws: Draws) -> Iterator[dict[str, Any]]:
    """The same first step of the published numbers: chosen already, over maps that were not published.

    Args:
        tables: measure -> a row per model and dataset with `ntps` and the measure.
    """
    for measure, cells in tables.items():
        score, target = matrix(cells, "ntps"), matrix(cells, measure)
        for model in score.index:
            r = spearman(score.loc[model], target.loc[model])
            yield {"model": model, "measure": measure, "step": STEPS[0], "spearman": r, "tasks": score.shape[1]}
        tables_of_models = score.to_numpy(), target.to_numpy()
        interval = bootstrap_interval(mean_spearman, *tables_of_models, draws=draws)
        yield {"model": "mean", "measure": measure, "step": STEPS[0], "spearman": interval.value, "low": interval.low,
               "high": interval.high, "tasks": score.shape[1], "models": len(score)}  # fmt: skip


# ------------------------------------------------------------------ on test rows
def selection_rows(cells: pd.DataFrame, layers: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of findings_selection.csv, one per model, measure on test rows, order and score."""
    for model in sorted(cells["model"].unique()):
        target_of = cells[cells["model"] == model].set_index("dataset")
        for order in ("largest", "smallest"):
            for score in ("ntps", "retained"):
                sweep = score_sweep(layers, model, order, score)
                for measure in [name for name in SELECTED_ON_TEST if is_known(target_of, name) and len(sweep.maps)]:
                    target = target_of[measure].reindex(sweep.tasks).to_numpy(float)
                    if np.isfinite(target).sum() < 4:
                        continue
                    options = (draws.num_permutations, draws.seed, CLAIMED[measure])
                    best = selection_null(sweep.maps, target, *options)
                    without = leave_one_out_selection(sweep.maps, target, *options)
                    yield {"model": model, "measure": measure, "eigenvectors": order, "score": score,
                           "claimed": "+" if CLAIMED[measure] > 0 else "-",
                           "fixed_rule": spearman(sweep.maps[sweep.last].mean(0), target), "best": best.best,
                           "layer": int(sweep.layers[best.configuration]),
                           "fraction": sweep.fractions[best.configuration],
                           "null_mean": best.null_mean, "null_quantile": best.null_quantile, "p": best.p_value,
                           "leave_one_out": without.correlation, "leave_one_out_p": without.p_value,
                           "configurations": len(sweep.maps), "tasks": int(np.isfinite(target).sum())}  # fmt: skip


def sensitivity_rows(cells: pd.DataFrame, layers: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of findings_sensitivity.csv: Spearman across tasks at every layer and fraction, per model."""
    for model in sorted(cells["model"].unique()):
        targets = cells[cells["model"] == model].set_index("dataset")
        for score in SCORES:
            sweep = score_sweep(layers, model, "largest", score)
            for measure in [name for name in ("probe_accuracy", "lora_gain") if is_known(targets, name)]:
                target = targets[measure].reindex(sweep.tasks).to_numpy(float)
                if not len(sweep.maps) or np.isfinite(target).sum() < 3:
                    continue
                values = spearman_rows(sweep.maps, target)
                for layer, fraction, value in zip(sweep.layers, sweep.fractions, values, strict=True):
                    yield {"model": model, "score": score, "measure": measure, "layer": int(layer),
                           "fraction": fraction, "spearman": value}  # fmt: skip
