"""What two studies say about the tasks they share: whether a score or an outcome is of the task or of the model."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from fig_plot.findings.correlations import Draws, bootstrap_interval, mean_correlation, mean_spearman
from fig_plot.findings.fixed_rule import is_known
from fig_plot.tables import FEATURE_SCORES, MEASURES, SCORES, matrix


def shared_task_rows(cells: pd.DataFrame, others: pd.DataFrame, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of findings_shared_tasks.csv, one per score and measure; none where the studies share no task.

    `value` is Spearman's correlation over the shared tasks of a model here with one of the other study, averaged over
    all such pairs; `between_others` the same of the pairs within the other study.

    Args:
        cells: a row per model and task (tables.py).
        others: of the other study; models of both are left out.
        draws: of the bootstrap.
    """
    others = others[~others["model"].isin(cells["model"])]
    shared = sorted(set(cells["dataset"]) & set(others["dataset"]))
    for name in (*MEASURES, *SCORES, *FEATURE_SCORES):
        if len(shared) < 3 or not (is_known(cells, name) and is_known(others, name)):
            continue
        here, there = (matrix(table, name).reindex(columns=shared).to_numpy(float) for table in (cells, others))
        here, there = (table[np.isfinite(table).any(1)] for table in (here, there))
        x, y = (np.array(side) for side in zip(*itertools.product(here, there), strict=True))
        first, second = np.array(list(itertools.combinations(range(len(there)), 2)), int).reshape(-1, 2).T
        interval = bootstrap_interval(mean_spearman, x, y, draws=draws)
        yield {"name": name, **interval._asdict(),
               "between_others": mean_correlation(there[first], there[second]),
               "pairs": len(x), "tasks": len(shared)}  # fmt: skip
