"""Which score to trust: each score of the prescreen against what the probe and LoRA reached.

    python -m fig_plot.evidence                                    # from the committed tables
    python -m fig_plot.evidence --results_dir results/study/docstrings   # after reading new results of K_sweep.py

Reads the CSV files of collect.py in fig_plot/data/ and closed_form.csv; with --results_dir, first adds the scores at
the last layer of every result of K_sweep.py there to closed_form.csv, in place of rows of the same model, dataset and
seed.
Writes prescreen_evidence.csv, a row per question, score and statistic:

    across tasks    Spearman or weighted tau over the tasks of a model, mean over models
    across models   the same over the models on a task, mean over tasks
    gain > 2        AUC of "LoRA gains more than two points of accuracy", over all models and tasks

with a 95 % bootstrap interval over tasks, and the lowest and highest value with one task left out. `cells` is "all" or,
where closed_form.csv has fewer models than the study, "closed form": the same cells for every score.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fig_plot.collect import result_files, save_csv, shown_name
from fig_plot.correlations import Correlation, auc, bootstrap_interval, mean_correlation, spearman, weighted_tau
from fig_plot.tables import DATA_DIR, KEYS, SCORES, load_cells, matrix, trained_models
from utils import closed_form
from utils.io import UserError, load_json, run_script

MEASURES = ("probe_skill", "lora_gain")
BASELINES = ("headroom", "num_parameters", "bag_of_words_accuracy", "majority_accuracy")
CORRELATIONS: dict[str, Correlation] = {"spearman": spearman, "weighted_tau": weighted_tau}
WORTHWHILE = 0.02  # of accuracy
FILE = "closed_form.csv"


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    results_dir: Path | None = None  # results to add to closed_form.csv first
    data_dir: Path = DATA_DIR  # read and written
    num_draws: int = 200  # bootstrap samples of the tasks; weighted tau takes a quarter
    seed: int = 0  # of the bootstrap


# ------------------------------------------------------------------ the scores of finished runs
def closed_form_rows(results_dir: Path) -> Iterator[dict[str, Any]]:
    """A row per result of K_sweep.py that holds the closed-form scores: those of the last layer."""
    for kind, path in result_files(results_dir):
        last = load_json(path)["layers"][-1] if kind == "ntps" else {}
        if "closed_form" in last:
            config = load_json(path)["config"]
            keys = {"model": shown_name(path.parent.name), "dataset": shown_name(path.stem), "seed": config["seed"]}
            yield {**keys, "layer": last["layer"]} | {
                name: entry["value"] for name, entry in last["closed_form"].items() if not entry["meaningless"]
            }


def closed_form_cells(data_dir: Path) -> pd.DataFrame:
    """One row per trained model and dataset: scores of every kind, probe skill, LoRA gain, baselines.

    Raises:
        UserError: a table is not there.
    """
    cells = trained_models(load_cells(data_dir))
    path = data_dir / FILE
    if not path.is_file():
        raise UserError(f"No {path}. Run: python -m fig_plot.evidence --results_dir results/study/docstrings")
    scores = pd.read_csv(path).drop(columns=["seed", "layer"]).groupby(KEYS, as_index=False).mean()
    return cells.merge(scores, on=KEYS, how="left")


# ------------------------------------------------------------------ statistics; all take (tasks, models)
def across_tasks(score: np.ndarray, target: np.ndarray, kind: Correlation) -> float:
    """Mean over models of the correlation over tasks."""
    return mean_correlation(score.T, target.T, kind)


def across_models(score: np.ndarray, target: np.ndarray, kind: Correlation) -> float:
    """Mean over tasks of the correlation over models."""
    return mean_correlation(score, target, kind)


def above_two_points(score: np.ndarray, gain: np.ndarray) -> float:
    """AUC of the score for a gain above two points, all cells pooled."""
    known = np.isfinite(gain) & np.isfinite(score)
    return auc(score[known], gain[known] > WORTHWHILE)


def judged(
    statistic: Callable[..., float], score: pd.DataFrame, target: pd.DataFrame, num_draws: int, seed: int
) -> dict[str, Any]:
    """Value, interval, range with a task left out, and how much there is of each; score and target (models, tasks)."""
    score, target = score.align(target, join="inner")
    known = np.isfinite(score.to_numpy(float) * target.to_numpy(float))
    tasks, models = known.any(0), known.any(1)
    x, y = (table.to_numpy(float)[models][:, tasks].T for table in (score, target))
    if not np.isfinite(statistic(x, y)):
        return {"value": np.nan}
    found = bootstrap_interval(statistic, x, y, num_draws=num_draws, seed=seed)
    without = [statistic(np.delete(x, task, 0), np.delete(y, task, 0)) for task in range(len(x))]
    defined = [value for value in without if np.isfinite(value)]
    ends = {"without_a_task_low": min(defined, default=np.nan), "without_a_task_high": max(defined, default=np.nan)}
    return {**found._asdict(), **ends, "models": int(models.sum()), "tasks": int(tasks.sum())}


def all_rows(cells: pd.DataFrame, config: Config) -> Iterator[dict[str, Any]]:
    """Rows of prescreen_evidence.csv."""
    names = [name for name in (*closed_form.SEEING, *SCORES, *BASELINES) if name in cells]
    everywhere = [name for name in names if name not in closed_form.SEEING]
    known = cells.dropna(subset=[closed_form.SEEING[0]])
    for row in evidence_rows(known, names, config):
        yield {"cells": "closed form", **row}
    for row in evidence_rows(cells, everywhere, config):
        yield {"cells": "all", **row}


def evidence_rows(cells: pd.DataFrame, names: list[str], config: Config) -> Iterator[dict[str, Any]]:
    """Each of the scores against each measure."""
    for measure in MEASURES:
        target = matrix(cells, measure)
        for name in names:
            score, keys = matrix(cells, name), {"measure": measure, "score": name}
            for direction, of in (("across tasks", across_tasks), ("across models", across_models)):
                for kind, correlation in CORRELATIONS.items():
                    draws = config.num_draws // (1 if kind == "spearman" else 4)  # weighted tau is slow
                    row = judged(partial(of, kind=correlation), score, target, draws, config.seed)
                    if np.isfinite(row["value"]):
                        yield {"direction": direction, **keys, "statistic": kind, **row}
            if measure == "lora_gain":
                row = judged(above_two_points, score, target, config.num_draws, config.seed)
                if np.isfinite(row["value"]):
                    yield {"direction": "gain > 2", **keys, "statistic": "auc", **row}


def print_summary(table: pd.DataFrame) -> None:
    """For each question the three scores that do best, and the best baseline."""
    shown = table[table["statistic"] != "weighted_tau"]
    for keys, rows in shown.groupby(["cells", "direction", "measure", "statistic"], sort=False):
        print(f"\n{', '.join(map(str, keys))}:")
        rows = rows.sort_values("value", ascending=False, kind="stable")
        is_baseline = rows["score"].isin(BASELINES)
        for row in [*rows[~is_baseline].head(3).itertuples(), *rows[is_baseline].head(1).itertuples()]:
            value = f"{row.value:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
            print(f"  {row.score:<24}{value}  {row.models} models, {row.tasks} tasks")


def main(config: Config) -> None:
    """Adds new results if asked for, writes the table, and prints what does best."""
    path = config.data_dir / FILE
    if config.results_dir is not None:
        added = pd.DataFrame(closed_form_rows(config.results_dir))
        if added.empty:
            raise UserError(
                f"No result of K_sweep.py with closed-form scores under {config.results_dir}. Run K_sweep.py."
            )
        old = pd.read_csv(path) if path.is_file() else added.head(0)
        keys = [*KEYS, "seed"]
        table = pd.concat([old, added]).drop_duplicates(keys, keep="last").sort_values(keys, kind="stable")
        save_csv(path, table)
        print(path)
    evidence = pd.DataFrame(all_rows(closed_form_cells(config.data_dir), config))
    print_summary(evidence)
    save_csv(config.data_dir / "prescreen_evidence.csv", evidence)
    print(config.data_dir / "prescreen_evidence.csv")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
