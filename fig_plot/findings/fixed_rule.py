"""Questions 2 and 6 of findings.py: scores under the fixed rule with each measure, and their spread.

Each function yields the rows of one table of findings.py. `cells` has a row per model and task (tables.py).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import f

from fig_plot.findings.correlations import (
    CORRELATIONS,
    Draws,
    Interval,
    bootstrap_interval,
    mean_cell,
    mean_correlation,
    mean_partial_spearman,
    mean_spearman,
    spearman_lead,
    spearman_rows,
)
from fig_plot.tables import CONTROLS, FEATURE_SCORES, MEASURES, SCORES, matrix, mean_of_others

GAINS = ("lora_gain", "lora_gain_paper", "full_gain")
TASK_BASELINES = ("majority_accuracy", "num_classes", "headroom", "bag_of_words_accuracy", "best_layer_accuracy")
MODEL_BASELINES = ("num_parameters", "held_out_loss", "headroom")
RIVALS = ("num_classes", "bag_of_words_accuracy", "headroom", "best_layer_accuracy")  # of question 2, beside random V
OF_THE_OUTCOME = ("headroom", "best_layer_accuracy")  # made of the probe's accuracy: rivals for gains only


def is_known(cells: pd.DataFrame, name: str) -> bool:
    """Whether a column is there with any value."""
    return name in cells and bool(cells[name].notna().any())


def known_gains(cells: pd.DataFrame) -> list[str]:
    """The gains that were measured anywhere."""
    return [name for name in GAINS if is_known(cells, name)]


# ------------------------------------------------------------------ correlations
def correlation_rows(cells: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of findings_correlations.csv: direction, score, measure, correlation, value, low, high, number of groups."""
    for measure in [name for name in MEASURES if is_known(cells, name)]:
        target = matrix(cells, measure)
        names = (*SCORES, *CONTROLS, *FEATURE_SCORES, *TASK_BASELINES, *MODEL_BASELINES, "probe_accuracy")
        for name in [name for name in dict.fromkeys(names) if is_known(cells, name) and name != measure]:
            score = matrix(cells, name)
            yield from direction_rows("tasks", name, measure, score, target, draws)
            yield from direction_rows("models", name, measure, score.T, target.T, draws)
        yield from others_rows(measure, target, draws)


def direction_rows(
    direction: str, name: str, measure: str, score: pd.DataFrame, target: pd.DataFrame, draws: Draws
) -> Iterator[dict[str, Any]]:
    """One row per kind of correlation; `score` and `target` are (groups, members), correlated within each group.

    Spearman's has an interval, the others are values.
    """
    score, target = score.align(target, join="inner")
    x, y = score.to_numpy(float), target.to_numpy(float)
    groups = int(np.isfinite(spearman_rows(x, y)).sum())
    if not groups:
        return
    for kind, correlation in CORRELATIONS.items():
        if kind != "spearman":
            interval = Interval(mean_correlation(x, y, correlation), np.nan, np.nan)
        elif direction == "tasks":
            interval = bootstrap_interval(mean_spearman, x, y, draws=draws)
        else:  # groups are the tasks here
            interval = bootstrap_interval(mean_cell, spearman_rows(x, y), draws=draws)
        yield {"direction": f"across {direction}", "measure": measure, "score": name, "correlation": kind,
               **interval._asdict(), "groups": groups, "members": int(np.isfinite(x * y).sum(1).max())}  # fmt: skip


def others_rows(measure: str, target: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """The baseline without a score: what the other models reach on the task, or the model on the other tasks."""
    yield from direction_rows("tasks", "mean of the others", measure, mean_of_others(target), target, draws)
    yield from direction_rows("models", "mean of the others", measure, mean_of_others(target.T), target.T, draws)


# ------------------------------------------------------------------ beside the best baseline
def lead_rows(cells: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of findings_leads.csv: |mean Spearman| of a score less that of the best baseline, on the same cells."""
    for measure in [name for name in MEASURES if is_known(cells, name)]:
        is_gain = measure in GAINS
        for name in [name for name in (*SCORES, *FEATURE_SCORES) if is_known(cells, name)]:
            rivals = [rival for rival in RIVALS if is_gain or rival not in OF_THE_OUTCOME]
            rivals = [rival for rival in (*rivals, f"{name}_random") if is_known(cells, rival)]
            rows = cells.dropna(subset=[measure, name])
            tables = {column: matrix(rows, column).to_numpy(float) for column in (measure, name, *rivals)}
            target = tables[measure]
            sizes = {rival: abs(mean_correlation(tables[rival], target)) for rival in rivals}
            sizes = {rival: size for rival, size in sizes.items() if np.isfinite(size)}
            if not sizes or not np.isfinite(mean_correlation(tables[name], target)):
                continue
            best = max(sizes, key=lambda rival: sizes[rival])
            interval = bootstrap_interval(spearman_lead, tables[name], tables[best], target, draws=draws)
            yield {"measure": measure, "score": name, "best_baseline": best, "baseline_size": sizes[best],
                   "lead": interval.value, "low": interval.low, "high": interval.high,
                   "tasks": target.shape[1]}  # fmt: skip


def partial_rows(cells: pd.DataFrame, draws: Draws, scores: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of findings_partial.csv: Spearman of score and measure with one thing held fixed, mean over models.

    The headroom for gains; the number of classes for the probe's accuracy above the majority class and its error.
    """
    pairs = [(measure, "headroom") for measure in known_gains(cells)]
    if is_known(cells, "num_classes"):
        pairs += [(measure, "num_classes") for measure in ("probe_skill", "probe_mse") if is_known(cells, measure)]
    for measure, given in pairs:
        for name in [name for name in scores if is_known(cells, name)]:
            tables = [matrix(cells, column).to_numpy(float) for column in (name, measure, given)]
            interval = bootstrap_interval(mean_partial_spearman, *tables, draws=draws)
            yield {"measure": measure, "score": name, "given": given, **interval._asdict()}


# ------------------------------------------------------------------ spread
def seed_rows(seeds: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of findings_seeds.csv: spread between seeds (sample, initial weights, order), beside that over tasks.

    The interval of their share is that of a ratio of two variances of normal numbers, by F.
    """
    for model, rows in seeds.groupby("model"):
        for name in [name for name in (*SCORES, "retained_lead", *FEATURE_SCORES, *MEASURES) if is_known(rows, name)]:
            table = rows.pivot(index="dataset", columns="seed", values=name).dropna(axis=1, how="all").dropna()
            if table.shape[1] > 1 and len(table) > 1:
                between, over = float(np.sqrt(table.var(axis=1).mean())), table.mean(axis=1).std()
                freedom = (len(table) * (table.shape[1] - 1), len(table) - 1)
                low, high = between / over / np.sqrt(f.ppf([0.975, 0.025], *freedom))
                yield {"model": model, "name": name, "sd_between_seeds": between, "seeds": table.shape[1],
                       "sd_over_tasks": over, "share": between / over, "low": low, "high": high,
                       "tasks": len(table)}  # fmt: skip
