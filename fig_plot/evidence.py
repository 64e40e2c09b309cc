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

with a 95 % bootstrap interval over tasks, and the lowest and highest value with one task, or one model, left out; for
an AUC also how many cells gain that much. `cells` is "all" or, where closed_form.csv has fewer models than the study,
"closed form": the same cells for every score. Signs are as they are: no score is turned round to look better. Among the
baselines, `mean_of_others` is what the other models reached on the task.

Another study goes the same way: collect its tables into a folder, then name that folder with --data_dir.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fig_plot.collect import dataset_of, result_files, save_csv, shown_name
from fig_plot.findings.correlations import (
    Draws,
    Statistic,
    bootstrap_interval,
    drawn_auc,
    mean_cell,
    mean_correlation,
    mean_spearman,
    spearman_rows,
    value_of,
    weighted_tau,
)
from fig_plot.findings.gains import WORTHWHILE_GAIN
from fig_plot.tables import DATA_DIR, KEYS, SCORES, load_cells, matrix, mean_of_others, trained_models
from utils.algebra import features as closed_form
from utils.results import load_json
from utils.script import UserError, run_script
from utils.training.before_after import ADAPTED

MEASURES = ("probe_skill", "lora_gain")
BASELINES = ("headroom", "num_parameters", "bag_of_words_accuracy", "majority_accuracy", "mean_of_others")
# of a task, the same for every model but for its seeds; or in step with the measure by its making
NOT_ACROSS_MODELS = ("bag_of_words_accuracy", "majority_accuracy", "mean_of_others")
CLOSED_FORM = (*closed_form.SEEING, "layer_lead")
FILE = "closed_form.csv"


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    results_dir: Path | None = None  # results to add to closed_form.csv first
    data_dir: Path = DATA_DIR  # read and written
    num_draws: int = 10_000  # bootstrap samples of the tasks
    seed: int = 0  # of the bootstrap


# ------------------------------------------------------------------ the scores of finished runs
def closed_form_rows(results_dir: Path) -> Iterator[dict[str, Any]]:
    """A row per result of K_sweep.py on train with the closed-form scores: those of the last layer; `layer_lead` is
    the best layer's held-out R2 less the last one's.

    Models after LoRA are left out: what they are asked about is over.
    """
    for kind, path in result_files(results_dir):
        result = load_json(path) if kind == "ntps" and not path.parent.name.endswith(ADAPTED) else {"layers": [{}]}
        layers = [layer.get("closed_form") for layer in result["layers"]]
        if layers[-1] is None or result["config"]["split"] != "train":
            continue
        keys = {"model": shown_name(path.parent.name), "dataset": dataset_of(path, result["config"])}
        keys |= {"seed": result["config"]["seed"], "layer": result["layers"][-1]["layer"]}
        values = {name: entry["value"] for name, entry in layers[-1].items() if not entry["meaningless"]}
        if "probe_r2_held_out" in layers[-1]:  # of every layer; ridge over folds is of the last one alone
            held_out = [layer["probe_r2_held_out"]["value"] for layer in layers if "probe_r2_held_out" in layer]
            values["layer_lead"] = max(held_out) - held_out[-1]
        yield keys | values


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
    of_study = cells.drop(columns=[name for name in scores if name in cells and name not in KEYS])  # the same scores
    return of_study.merge(scores, on=KEYS, how="left")


# ------------------------------------------------------------------ statistics
def across_models(counts: np.ndarray, score: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean over tasks of the correlation over models."""
    return mean_cell(counts, spearman_rows(score.T, target.T)[None])


def above_two_points(counts: np.ndarray, score: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """AUC of the score for a gain above two points, all cells pooled."""
    known = np.isfinite(gain).ravel()
    cells = np.tile(counts, len(gain))[:, known]
    return drawn_auc(cells, score.ravel()[known], gain.ravel()[known] > WORTHWHILE_GAIN)


def weighted_tau_across_tasks(score: np.ndarray, target: np.ndarray) -> float:
    """Mean over models of the weighted tau over tasks."""
    return mean_correlation(score, target, weighted_tau)


def weighted_tau_across_models(score: np.ndarray, target: np.ndarray) -> float:
    """Mean over tasks of the weighted tau over models."""
    return mean_correlation(score.T, target.T, weighted_tau)


# direction, name -> the statistic of tables (models, tasks), and the same of resampled tasks where it has an interval
QUESTIONS: dict[tuple[str, str], tuple[Callable[..., float], Statistic | None]] = {
    ("across tasks", "spearman"): (partial(value_of, mean_spearman), mean_spearman),
    ("across tasks", "weighted_tau"): (weighted_tau_across_tasks, None),
    ("across models", "spearman"): (partial(value_of, across_models), across_models),
    ("across models", "weighted_tau"): (weighted_tau_across_models, None),
    ("gain > 2", "auc"): (partial(value_of, above_two_points), above_two_points),
}


def judged(question: tuple[str, str], score: pd.DataFrame, target: pd.DataFrame, draws: Draws) -> dict[str, Any]:
    """Value, interval, range with a task left out, and how much there is of each; score and target (models, tasks)."""
    statistic, of_draws = QUESTIONS[question]
    score, target = score.align(target, join="inner")
    known = np.isfinite(score.to_numpy(float) * target.to_numpy(float))
    models, tasks = known.any(1), known.any(0)
    x, y = (table.to_numpy(float)[models][:, tasks] for table in (score, target))
    if not known.any() or not np.isfinite(value := statistic(x, y)):
        return {"value": np.nan}
    ends: dict[str, float] = {"low": np.nan, "high": np.nan}
    if of_draws:
        ends = bootstrap_interval(of_draws, x, y, draws=draws)._asdict()
    for axis, name in ((1, "task"), (0, "model")):
        without = [statistic(np.delete(x, i, axis), np.delete(y, i, axis)) for i in range(x.shape[axis])]
        defined = [value for value in without if np.isfinite(value)]
        ends |= {f"without_a_{name}_low": min(defined, default=np.nan)}
        ends |= {f"without_a_{name}_high": max(defined, default=np.nan)}
    return {"value": value, **ends, "models": int(models.sum()), "tasks": int(tasks.sum())}


def all_rows(cells: pd.DataFrame, config: Config) -> Iterator[dict[str, Any]]:
    """Rows of prescreen_evidence.csv."""
    names = [name for name in (*CLOSED_FORM, *SCORES, *BASELINES) if name in cells or name == "mean_of_others"]
    everywhere = [name for name in names if name not in CLOSED_FORM]
    known = cells.dropna(subset=[CLOSED_FORM[0]])
    for row in evidence_rows(known, names, config):
        yield {"cells": "closed form", **row}
    for row in evidence_rows(cells, everywhere, config):
        yield {"cells": "all", **row}


def evidence_rows(cells: pd.DataFrame, names: list[str], config: Config) -> Iterator[dict[str, Any]]:
    """Each of the scores against each measure."""
    for measure in MEASURES:
        target = matrix(cells, measure)
        for name in names:
            score = mean_of_others(target) if name == "mean_of_others" else matrix(cells, name)
            for direction, statistic in QUESTIONS:
                says_nothing = name in NOT_ACROSS_MODELS or (name, measure) == ("headroom", "probe_skill")
                is_asked = {"across tasks": True, "across models": not says_nothing, "gain > 2": measure == "lora_gain"}
                if not is_asked[direction]:
                    continue
                row = judged((direction, statistic), score, target, Draws(config.num_draws, config.seed))
                if np.isfinite(row["value"]):
                    if statistic == "auc":
                        row["cells_above"] = int((target[score.notna()] > WORTHWHILE_GAIN).to_numpy().sum())
                    yield {"direction": direction, "measure": measure, "score": name, "statistic": statistic, **row}


def print_summary(table: pd.DataFrame) -> None:
    """For each question the three scores farthest from telling nothing, either way, and the best baseline."""
    shown = table[table["statistic"] != "weighted_tau"]
    for keys, rows in shown.groupby(["cells", "direction", "measure", "statistic"], sort=False):
        above = f" ({rows['cells_above'].max():.0f} cells gain that much)" if keys[-1] == "auc" else ""
        print(f"\n{', '.join(map(str, keys))}{above}:")
        strength = (rows["value"] - (0.5 if keys[-1] == "auc" else 0)).abs()
        rows = rows.loc[strength.sort_values(ascending=False, kind="stable").index]
        is_baseline = rows["score"].isin(BASELINES)
        for row in [*rows[~is_baseline].head(3).itertuples(), *rows[is_baseline].head(2).itertuples()]:
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
