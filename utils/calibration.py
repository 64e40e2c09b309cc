"""The expected gain of LoRA over the linear probe: straight lines through finished studies, and when to trust them.

The lines are the rows of fig_plot/data/prescreen_calibration.csv, made by `python -m fig_plot.calibration`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from utils.script import ROOT

PATH = ROOT / "fig_plot" / "data" / "prescreen_calibration.csv"


@dataclass(frozen=True)
class Line:
    """gain = intercept + slope * predictor, in points of accuracy; a row of the CSV file."""

    source: str  # the study it was fitted to
    predictor: str
    intercept: float
    slope: float
    lowest: float  # range of the predictor in the study
    highest: float
    error: float  # mean |gain - prediction| with the task, over all models, left out of the fit
    error_of_mean: float  # the same, predicting the mean gain of the other tasks
    error_new_model: float  # mean |gain - prediction| with the model, over all tasks, left out; nan with one model
    error_of_mean_new_model: float  # the same, predicting the mean gain of the other models
    lead_low_new_model: float  # lower end of the 95 % bootstrap interval of that lead, over models; nan with one model
    lead: float  # error_of_mean - error
    lead_low: float  # 95 % bootstrap interval of it, over tasks
    lead_high: float
    residual_low: float  # 5 % and 95 % quantile of gain - prediction, task left out
    residual_high: float
    mean_gain: float
    cells: int  # models x tasks
    tasks: int
    models: int

    @property
    def is_better(self) -> bool:
        """Whether it predicts better than the mean gain does, for a new task and for a new model, beyond chance."""
        return self.lead_low > 0 and self.lead_low_new_model > 0


@dataclass(frozen=True)
class Gain:
    """The expected gain, or why there is none to give."""

    low: float | None  # points of accuracy
    high: float | None
    reason: str


def read_lines(path: Path = PATH) -> list[Line]:
    """The lines of the file; none where it is not there."""
    if not path.is_file():
        return []
    return [Line(**{str(name): value for name, value in row.items()}) for row in pd.read_csv(path).to_dict("records")]


def expected_gain(values: Mapping[str, float | None], lines: list[Line]) -> Gain:
    """The 90 % range of the gain by the best line whose predictor is known here and inside the range of its study.

    Args:
        values: of the predictors, by name.
        lines: of `read_lines`.
    """
    known = [line for line in lines if values.get(line.predictor) is not None]
    if not known:
        return Gain(None, None, "no calibration: run python -m fig_plot.calibration")
    better = sorted((line for line in known if line.is_better), key=lambda line: line.error)
    if not better:
        line = max(known, key=lambda line: line.cells)
        told = f"{line.cells} runs of the {line.source} study gained {line.mean_gain:+.1f} points on average"
        return Gain(None, None, f"no score predicts LoRA's gain better than its mean does ({told})")
    for line in better:
        value = values[line.predictor]
        if value is not None and line.lowest <= value <= line.highest:
            middle = line.intercept + line.slope * value
            by = f"by {line.predictor}, {line.source} study, off by {line.error:.1f} points on a task left out"
            return Gain(middle + line.residual_low, middle + line.residual_high, by)
    line = better[0]
    seen = f"{line.predictor} from {line.lowest:.3g} to {line.highest:.3g}"
    value = values[line.predictor]
    here = "nothing" if value is None or math.isnan(value) else f"{value:.3g}"
    return Gain(None, None, f"outside the calibration's range ({seen}; here {here})")
