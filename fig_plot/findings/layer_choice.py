"""Which score finds the layer that is read best? The probe of the layer with the highest score, asked later."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from fig_plot.findings.correlations import Draws, bootstrap_interval, mean_cell
from fig_plot.tables import FEATURE_SCORES, KEYS, NAMES, without_random_weights

CELL = [*KEYS, "seed"]
CHOOSERS = (*FEATURE_SCORES, *NAMES)  # of training rows alone


def of_every_layer(layers: pd.DataFrame, features: pd.DataFrame, probes: pd.DataFrame) -> pd.DataFrame:
    """Every score of training rows and the probe's test accuracy, a row per model, dataset, seed and layer.

    Args:
        layers: of layers.csv; its scores are averaged over K.
        features: of features.csv.
        probes: of probes.csv.
    """
    rows = layers[(layers["eigenvectors"] == "largest") & ~layers["center"]]
    keys = [*CELL, "layer"]
    swept = rows.groupby(keys, as_index=False)[list(NAMES)].mean()
    known = [name for name in FEATURE_SCORES if name in features]
    accuracy = without_random_weights(probes)[[*keys, "test_accuracy"]].dropna()
    return accuracy.merge(swept, on=keys).merge(features[[*keys, *known]], on=keys)


def layer_choice_rows(table: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of findings_layer_choice.csv: test accuracy of the layer that each score chooses, its lead over the last.

    Beside them layers that need no score: the last, the middle one, any (the mean over layers), and the best one on
    test rows, which nobody knows beforehand. Means over tasks, seeds of a task averaged first; intervals over tasks.

    Args:
        table: of `of_every_layer`.
        draws: of the bootstrap.
    """
    for model, rows in table.groupby("model"):
        accuracy = rows.pivot(index=["dataset", "seed"], columns="layer", values="test_accuracy")
        if accuracy.shape[1] < 3:
            continue
        middle = accuracy.columns[len(accuracy.columns) // 2]
        chosen = {"last layer": accuracy.iloc[:, -1], "middle layer": accuracy[middle],
                  "any layer": accuracy.mean(axis=1), "best on test rows": accuracy.max(axis=1)}  # fmt: skip
        for name in [name for name in CHOOSERS if name in rows and rows[name].notna().any()]:
            at = rows.loc[rows.dropna(subset=name).groupby(["dataset", "seed"])[name].idxmax()]
            chosen[name] = at.set_index(["dataset", "seed"])["test_accuracy"]
        of_task = pd.DataFrame(chosen).groupby("dataset").mean()
        for name, values in of_task.items():
            lead = values - of_task["last layer"]
            interval = bootstrap_interval(mean_cell, lead, draws=draws)
            yield {"model": model, "chosen_by": name, "accuracy": values.mean(), "lead": interval.value,
                   "low": interval.low, "high": interval.high, "tasks": int(values.notna().sum())}  # fmt: skip
