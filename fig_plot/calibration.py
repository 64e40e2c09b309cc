"""Refit what prescreen.py says of LoRA's gain: a straight line through each score, judged on tasks left out.

    python -m fig_plot.calibration
    python -m fig_plot.calibration --data_dir FOLDER --study smollm2   # adds the lines of another study's tables

Reads the CSV files of collect.py and evidence.py in fig_plot/data/ and, if NTPS_PUBLISHED names the folder of the
authors' figure files, the paper's 96 pairs. Writes fig_plot/data/prescreen_calibration.csv, whose columns
utils/calibration.py explains; rows of a study that is not there now stay.

The gain is test accuracy after LoRA less that of the linear probe, in points. A line has one intercept and one slope
for all models and tasks of a study. It is better than the mean gain only if the 95 % interval of its lead on a
task left out, by a bootstrap over tasks, is above 0, and that of its lead on a model left out, over models, too; a line
through one model cannot show that.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fig_plot.collect import parse_size, save_csv
from fig_plot.evidence import closed_form_cells
from fig_plot.findings.correlations import Draws, bootstrap_interval, mean_cell
from fig_plot.import_published import COLUMNS, published_rows
from fig_plot.tables import DATA_DIR, SCORES
from utils import calibration
from utils.algebra import features as closed_form
from utils.calibration import Line
from utils.models.table import MODELS
from utils.script import run_script

PREDICTORS = (*closed_form.SEEING, *SCORES, "log10_parameters", "headroom")
FILE = calibration.PATH.name


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    data_dir: Path = DATA_DIR  # the tables of a study
    study: str = "docstring"  # its name in the file
    output_dir: Path = DATA_DIR  # where the file is; prescreen.py reads it in fig_plot/data/
    num_draws: int = 10_000  # bootstrap samples of the tasks
    seed: int = 0  # of the bootstrap


def left_out(x: np.ndarray, gain: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Gain less what the line through the other groups predicts, (n,); without columns in x, their mean.

    Args:
        x: predictors, (n, k).
        gain: (n,).
        group: task or model of each row, (n,).

    Returns:
        nan where there is one group only.
    """
    design, residual = np.column_stack([np.ones(len(gain)), x]), np.full(len(gain), np.nan)
    for name in np.unique(group) if len(np.unique(group)) > 1 else ():
        out = group == name
        residual[out] = gain[out] - design[out] @ np.linalg.lstsq(design[~out], gain[~out])[0]
    return residual


def fit(source: str, predictor: str, cells: pd.DataFrame, config: Config) -> Line | None:
    """The line of one predictor; None with fewer than three tasks or where the predictor is constant."""
    rows = cells.dropna(subset=[predictor, "gain"])
    task, model, x, gain = (rows[name].to_numpy() for name in ("dataset", "model", predictor, "gain"))
    if len(np.unique(task)) < 3 or np.ptp(x) == 0:
        return None
    nothing = np.empty((len(x), 0))
    residual, of_mean = left_out(x[:, None], gain, task), left_out(nothing, gain, task)
    new_model, mean_new_model = (np.abs(left_out(of, gain, model)) for of in (x[:, None], nothing))
    model_lead = pd.Series(mean_new_model - new_model).groupby(model).mean().to_numpy()
    draws = Draws(config.num_draws, config.seed)
    model_bounds = bootstrap_interval(mean_cell, model_lead, draws=draws)
    lead = pd.Series(np.abs(of_mean) - np.abs(residual)).groupby(task).mean().to_numpy()
    bounds = bootstrap_interval(mean_cell, lead, draws=draws)
    slope, intercept = np.polyfit(x, gain, 1)
    low, high = np.quantile(residual, [0.05, 0.95])
    return Line(
        source=source, predictor=predictor, intercept=intercept, slope=slope, lowest=x.min(), highest=x.max(),
        error=np.abs(residual).mean(), error_of_mean=np.abs(of_mean).mean(),
        error_new_model=new_model.mean(), error_of_mean_new_model=mean_new_model.mean(),
        lead_low_new_model=model_bounds.low,
        lead=bounds.value, lead_low=bounds.low, lead_high=bounds.high,
        residual_low=low, residual_high=high, mean_gain=gain.mean(), cells=len(rows), tasks=len(np.unique(task)),
        models=len(np.unique(model)),
    )  # fmt: skip


def study_cells(data_dir: Path) -> pd.DataFrame:
    """Predictors and gain, in points, of a study."""
    cells = closed_form_cells(data_dir)
    return cells.assign(gain=100 * cells["lora_gain"], log10_parameters=np.log10(cells["num_parameters"]))


def published_cells(folder: Path) -> pd.DataFrame:
    """The paper's pairs; its NTPS is that of the best K of each model, and so has a name of its own."""
    cells = pd.DataFrame(published_rows(folder)["fig3.csv"], columns=COLUMNS["fig3.csv"])
    cells = cells.rename(columns={"ntps": "ntps_published"})
    size = {name: np.log10(parse_size(spec.parameters)) for name, spec in MODELS.items()}
    gain = 100 * (cells["lora_accuracy"] - cells["linear_accuracy"])
    return cells.assign(gain=gain, headroom=1 - cells["linear_accuracy"], log10_parameters=cells["model"].map(size))


def all_lines(config: Config) -> Iterator[Line]:
    """The lines of every study that is there."""
    studies = {config.study: (study_cells(config.data_dir), PREDICTORS)}
    if folder := os.environ.get("NTPS_PUBLISHED"):
        studies["published"] = (published_cells(Path(folder)), ("ntps_published", "headroom", "log10_parameters"))
    for source, (cells, predictors) in studies.items():
        for predictor in predictors:
            if predictor in cells and (line := fit(source, predictor, cells, config)):
                yield line


def main(config: Config) -> None:
    """Writes the lines and prints which of them beat the mean gain."""
    path = config.output_dir / FILE
    lines = list(all_lines(config))
    fresh = {line.source for line in lines}
    lines += [line for line in calibration.read_lines(path) if line.source not in fresh]
    save_csv(path, pd.DataFrame([asdict(line) for line in lines]))
    for line in lines:
        told = "better than the mean gain" if line.is_better else "no better"
        lead = f"lead {line.lead:+.2f} [{line.lead_low:+.2f}, {line.lead_high:+.2f}]"
        print(f"{line.source:<10} {line.predictor:<20} off by {line.error:.2f} points, the mean by "
              f"{line.error_of_mean:.2f}: {lead}; on a new model {line.error_new_model:.2f}, the mean "
              f"{line.error_of_mean_new_model:.2f} ({line.models} models): {told}")  # fmt: skip
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
