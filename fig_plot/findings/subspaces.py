"""Questions 3 and 4 of findings.py: V beside its controls, a model beside random weights, scores after LoRA."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from fig_plot.findings.correlations import Draws, bootstrap_interval, mean_cell, mean_spearman
from fig_plot.findings.fixed_rule import is_known
from fig_plot.tables import FEATURE_SCORES, HELD_OUT, KEYS, MEASURES, NAMES, RANDOM_MODELS, without_random_weights

ALL = "all"  # of the rows over all trained models
AFTER_LORA = (*NAMES, "retained_lead", HELD_OUT)  # what is compared before and after LoRA


def control_rows(cells: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of findings_controls.csv: mean over tasks of each score for each V, and its lead over a random V.

    z against permuted labels and, where K_sweep.py drew several random V, `random_z` against these.
    """
    for model, rows in cells.groupby("model"):
        for score in NAMES:
            for v in ("", "_smallest", "_pca", "_random"):
                lead = (rows[score + v] - rows[f"{score}_random"]).dropna().to_numpy()
                if not len(lead):
                    continue
                interval = bootstrap_interval(mean_cell, lead, draws=draws)
                row = {"model": model, "score": score, "v": v.removeprefix("_") or "autoregression"}
                row |= {"value": rows[score + v].mean(), "lead_over_random": interval.value}
                row |= {"low": interval.low, "high": interval.high, "tasks": len(lead)}
                yield row | ({} if v else z_columns(rows, score))


def z_columns(rows: pd.DataFrame, score: str) -> dict[str, Any]:
    """How far a score is from that of permuted labels and from that of random V, over the tasks of a model."""
    columns: dict[str, Any] = {}
    if f"{score}_z" in rows:
        z = rows[f"{score}_z"].dropna()
        columns |= {"permuted_labels": rows[f"{score}_null_mean"].mean(), "mean_z": z.mean()}
        columns |= {"tasks_above_2_z": int((z > 2).sum())}
    if is_known(rows, f"{score}_random_z"):
        z = rows[f"{score}_random_z"].dropna()
        columns |= {"mean_random_z": z.mean(), "tasks_above_2_random_z": int((z > 2).sum())}
        columns |= {"tasks_below_minus_2_random_z": int((z < -2).sum())}
    return columns


def random_weights_rows(cells: pd.DataFrame, after: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of findings_random_weights.csv: a trained model beside its twin of random weights, over the tasks of both.

    Means over tasks, the mean difference, and Spearman's correlation of the two over tasks; of scores, of outcomes, and
    as `<score>_change` of what LoRA adds to a score.

    Args:
        cells: of `tables.load_cells`.
        after: of `tables.load_after_lora`.
        draws: of the intervals, over tasks.
    """
    changes = changes_by_lora(after)
    changed = [name for name in changes if name.endswith("_change")]
    cells = cells.merge(changes[[*KEYS, *changed]], on=KEYS, how="left")
    names = (*NAMES, *FEATURE_SCORES, *MEASURES, "lora_accuracy", *changed)
    for twin, model in RANDOM_MODELS.items():
        both = (cells[cells["model"] == name].set_index("dataset") for name in (model, twin))
        trained, random = (table.dropna(axis=1, how="all") for table in both)
        for name in [name for name in names if name in trained and name in random]:
            pairs = pd.concat([trained[name], random[name]], axis=1, join="inner").dropna().to_numpy(float)
            if len(pairs) < 3:
                continue
            x, y = pairs.T
            lead = bootstrap_interval(mean_cell, x - y, draws=draws)
            order = bootstrap_interval(mean_spearman, x, y, draws=draws)
            yield {"model": model, "name": name, "trained": x.mean(), "random_weights": y.mean(), "lead": lead.value,
                   "low": lead.low, "high": lead.high, "spearman": order.value, "spearman_low": order.low,
                   "spearman_high": order.high, "tasks": len(pairs)}  # fmt: skip


def changes_by_lora(after: pd.DataFrame) -> pd.DataFrame:
    """`after` averaged over seeds, and as `<score>_change` what LoRA adds to each score that is known."""
    means = after.groupby(KEYS, as_index=False).mean(numeric_only=True)
    names = [name for name in AFTER_LORA if is_known(means, name)]
    return means.assign(**{f"{name}_change": means[name] - means[f"{name}_before"] for name in names})


def after_lora_rows(after: pd.DataFrame, cells: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of findings_after_lora.csv: the change of each score, and whether it follows LoRA's gain.

    Args:
        after: of `tables.load_after_lora`.
        cells: of `tables.load_cells`, for the gain.
        draws: of the intervals, over tasks; where there are several models the mean over them is taken first, without
            those of random weights.
    """
    after = changes_by_lora(after).merge(cells[[*KEYS, "lora_gain"]], on=KEYS, how="left")
    trained = without_random_weights(after)
    for model, rows in (*after.groupby("model"), (ALL, trained)):
        if model == ALL and trained["model"].nunique() == 1:
            continue
        for name in [name for name in AFTER_LORA if f"{name}_change" in after]:
            known = rows.assign(change=rows[f"{name}_change"]).dropna(subset="change")
            change, gain = (known.pivot(index="dataset", columns="model", values=v) for v in ("change", "lora_gain"))
            tables = [table.to_numpy(float).T for table in (change, gain)]
            mean = bootstrap_interval(mean_cell, tables[0], draws=draws)
            follows = bootstrap_interval(mean_spearman, *tables, draws=draws)
            yield {"model": model, "score": name, "before": known[f"{name}_before"].mean(), "after": known[name].mean(),
                   "change": mean.value, "low": mean.low, "high": mean.high, "raised": int((known["change"] > 0).sum()),
                   "cells": len(known), "tasks": known["dataset"].nunique(), "spearman_with_gain": follows.value,
                   "spearman_low": follows.low, "spearman_high": follows.high}  # fmt: skip
