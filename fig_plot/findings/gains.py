"""Question 5 of findings.py: what predicts the LoRA gain of a task left out."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from fig_plot.findings.correlations import Draws, bootstrap_interval, drawn_auc, mean_cell, mean_over_models
from fig_plot.findings.fixed_rule import is_known, known_gains
from fig_plot.tables import SCORES, matrix

WORTHWHILE_GAIN = 0.02  # in the go / no-go question
CANDIDATES = ("headroom", "best_layer_lead", "ridge_r2", "logme", "h_oas", "retained_z", "retained_lead", "ntps",
              "num_classes")  # fmt: skip


def candidates(cells: pd.DataFrame) -> list[str]:
    """Question 5's candidates that were measured, and the other scores behind them."""
    names = dict.fromkeys((*CANDIDATES, *SCORES))
    return [name for name in names if is_known(cells, name)]


def mean_auc(counts: np.ndarray, score: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """AUC of "the gain is above two points" over the tasks of a model, mean over models: a statistic.

    Within a model: pooled over models it would compare the levels of their scores, and not tasks. A model whose gains
    are all on one side is left out.
    """
    of_each = []
    for x, y in zip(score, gain, strict=True):
        known = np.isfinite(y)
        of_each.append(drawn_auc(counts[:, known], x[known], y[known] > WORTHWHILE_GAIN))
    return mean_over_models(of_each)


def decision_rows(cells: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of findings_decision.csv: `mean_auc` of each candidate, with its interval over tasks.

    Above .5 a higher value goes with a gain; of NTPS the paper claims the opposite.
    """
    for measure in known_gains(cells):
        for name in candidates(cells):
            known = cells.dropna(subset=[measure, name])
            tables = [matrix(known, column).to_numpy(float) for column in (name, measure)]
            interval = bootstrap_interval(mean_auc, *tables, draws=draws)
            if np.isfinite(interval.value):
                yield {"measure": measure, "score": name, "auc": interval.value, "low": interval.low,
                       "high": interval.high, "cells": len(known), "tasks": tables[0].shape[1],
                       "above": int((known[measure] > WORTHWHILE_GAIN).sum())}  # fmt: skip


def without_each_task(rows: pd.DataFrame, columns: list[str], measure: str) -> np.ndarray:
    """What least squares on the other tasks predicts less the gain, (rows,): an intercept per model and `columns`."""
    models = pd.get_dummies(rows["model"]).to_numpy(float)
    design, target = np.hstack([models, rows[columns].to_numpy(float)]), rows[measure].to_numpy(float)
    errors = np.empty(len(rows))
    for dataset in rows["dataset"].unique():
        out = (rows["dataset"] == dataset).to_numpy()
        errors[out] = design[out] @ np.linalg.lstsq(design[~out], target[~out])[0] - target[out]
    return errors


def calibration_rows(cells: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of findings_calibration.csv: error of a gain predicted for a task left out, in points of accuracy.

    `nothing` is the mean gain of the other tasks. `lead` is what the mean absolute error of `nothing`, on the same
    cells, is larger by, with an interval over tasks: a predictor is better than nothing if that is above 0.
    """
    single = {name: [name] for name in candidates(cells)}
    pairs = (("headroom", "ntps"), ("headroom", "retained_z"))
    both = {" and ".join(pair): list(pair) for pair in pairs if all(name in single for name in pair)}
    for measure in known_gains(cells):
        for name, columns in {"nothing": [], **single, **both}.items():
            rows = cells.dropna(subset=[measure, *columns])
            if rows["dataset"].nunique() < 4:
                continue
            errors, of_mean = (100 * without_each_task(rows, used, measure) for used in (columns, []))
            lead = pd.Series(np.abs(of_mean) - np.abs(errors)).groupby(rows["dataset"].to_numpy()).mean().to_numpy()
            interval = bootstrap_interval(mean_cell, lead, draws=draws)
            yield {"measure": measure, "predictors": name, "error_points": np.abs(errors).mean(),
                   "error_of_mean_points": np.abs(of_mean).mean(), "lead": interval.value, "low": interval.low,
                   "high": interval.high, "rmse_points": np.sqrt(np.mean(errors**2)),
                   "within_95_percent_points": np.quantile(np.abs(errors), 0.95), "cells": len(rows),
                   "tasks": rows["dataset"].nunique()}  # fmt: skip
