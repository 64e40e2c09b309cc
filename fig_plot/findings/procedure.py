"""Answer question 1 of docs/findings.md: choose layer and K on the outcome, as in the paper; drop that step by step.

A study's maps are its scores at every layer and fraction; the published numbers come chosen already.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fig_plot.findings.correlations import (
    Draws,
    bootstrap_interval,
    mean_partial_spearman,
    mean_spearman,
    spearman,
    value_of,
)
from fig_plot.findings.questions import Rows, known, models_with_twins
from fig_plot.findings.selection import joint_p_value, selection_null
from fig_plot.tables import CLAIMED, RANDOM

# measures in probes.csv of the layer of the score -> the same on test rows
SAME_ON_TEST = {"train_accuracy": "test_accuracy", "train_mse": "test_mse"}
OF_THE_PROCEDURE = (*SAME_ON_TEST, "lora_gain_paper", "lora_gain")
STEPS = ("layer and K chosen", "last layer, K chosen", "last layer, mean over K", "the same on test rows")


class Step(NamedTuple):
    """One step of one model and measure."""

    row: dict[str, Any]  # its columns in the CSV file
    score: np.ndarray  # (tasks,)
    outcome: np.ndarray  # (tasks,)
    classes: np.ndarray  # (tasks,)
    null: np.ndarray | None = None  # (draws,) the best correlation in noise, if the step chose a configuration


def score_sweep(layers: pd.DataFrame, model: str) -> pd.DataFrame:
    """`ntps` of one model, averaged over seeds: a row per configuration (layer, fraction), a column per task."""
    rows = layers[(layers["model"] == model) & (layers["eigenvectors"] == "largest")]
    return rows.pivot_table(index=["layer", "fraction"], columns="dataset", values="ntps")


def outcomes(sweep: pd.DataFrame, cells: pd.DataFrame, probes: pd.DataFrame, measure: str) -> np.ndarray:
    """A measure as (configurations, tasks); a probe's measure comes from the layer of each configuration."""
    if measure in (*SAME_ON_TEST, *SAME_ON_TEST.values()):
        table = probes.pivot_table(index="layer", columns="dataset", values=measure)
        return table.reindex(index=sweep.index.get_level_values("layer"), columns=sweep.columns).to_numpy(float)
    values = cells.set_index("dataset")[measure].reindex(sweep.columns).to_numpy(float)
    return np.broadcast_to(values, sweep.shape)


def find_steps(
    sweep: pd.DataFrame, cells: pd.DataFrame, probes: pd.DataFrame, measure: str, draws: Draws
) -> Iterator[Step]:
    """Yields the steps of one model and measure; none for fewer than four tasks, or if all have the same outcome."""
    if not (measure in probes or known(cells, (measure,))):
        return
    target = outcomes(sweep, cells, probes, measure)
    tasks = np.isfinite(target[-1])
    if tasks.sum() < 4 or not np.ptp(target[:, tasks], axis=1).any():
        return
    classes = cells.set_index("dataset")["num_classes"].reindex(sweep.columns).to_numpy(float)
    layer_of_each = sweep.index.get_level_values("layer")
    last, maps = layer_of_each == layer_of_each.max(), sweep.to_numpy()

    def make_step(name: str, score: np.ndarray, outcome: np.ndarray, null: Any = None, **more: Any) -> Step:
        row = {"measure": measure, "step": name, "spearman": spearman(score, outcome), "tasks": int(tasks.sum()),
               **more, "given_classes": value_of(mean_partial_spearman, score, outcome, classes)}  # fmt: skip
        return Step(row, score, outcome, classes, null)

    for name, which in zip(STEPS[:2], (np.ones(len(sweep), bool), last), strict=True):
        found = selection_null(maps[which], target[which], draws.num_permutations, draws.seed, CLAIMED[measure])
        index = np.flatnonzero(which)[found.configuration]
        layer, fraction = sweep.index[index]
        yield make_step(name, maps[index], target[index], found.null, noise=found.null_mean, p=found.p_value,
                        layer=layer, fraction=fraction)  # fmt: skip
    mean, layer = maps[last].mean(0), layer_of_each.max()
    yield make_step(STEPS[2], mean, target[-1], layer=layer)
    if measure in SAME_ON_TEST:
        on_test = outcomes(sweep, cells, probes, SAME_ON_TEST[measure])[-1]
        yield make_step(STEPS[3], mean, on_test, layer=layer)


def like_for_like_rows(cells: pd.DataFrame, layers: pd.DataFrame, probes: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_like_for_like.csv: each model, and `mean` over them.

    `given_classes` is the partial Spearman with the number of classes held fixed. `p` of the mean is joint over all
    models, its intervals are over tasks. A step that chose its configuration has no interval, because a
    bootstrap would have to repeat the choice; its `given_classes` has one, for the configuration that was chosen.
    """
    tasks = sorted(set(cells["dataset"]))
    for measure in OF_THE_PROCEDURE:
        found = []
        for model in dict.fromkeys(cells["model"]):
            sweep = score_sweep(layers, model).reindex(columns=tasks)
            if len(sweep):
                of_model, its_probes = (table[table["model"] == model] for table in (cells, probes))
                found += [(model, step) for step in find_steps(sweep, of_model, its_probes, measure, draws)]
        for name in STEPS:
            of_step = [(model, step) for model, step in found if step.row["step"] == name]
            yield from ({"model": model, **step.row} for model, step in of_step)
            if of_step:
                yield mean_row([step for _, step in of_step], draws)


def mean_row(steps: list[Step], draws: Draws) -> dict[str, Any]:
    """The row of one step that has the means over models."""
    score, outcome, classes = (
        np.array([getattr(step, name) for step in steps]) for name in ("score", "outcome", "classes")
    )
    measure = steps[0].row["measure"]
    row = {"model": "mean", "measure": measure, "step": steps[0].row["step"], "spearman": spearman(score, outcome),
           "tasks": max(step.row["tasks"] for step in steps), "models": len(steps)}  # fmt: skip
    nulls = [step.null for step in steps if step.null is not None]
    if nulls:
        row["noise"] = float(np.mean([step.row["noise"] for step in steps]))
        present = np.isfinite(outcome)
        if (present == present[0]).all():  # the same tasks, and so the same permutations
            row["p"] = joint_p_value([step.row["spearman"] for step in steps], nulls, CLAIMED[measure])
    else:
        interval = bootstrap_interval(mean_spearman, score, outcome, draws=draws)
        row |= {"low": interval.low, "high": interval.high}
    partial = bootstrap_interval(mean_partial_spearman, score, outcome, classes, draws=draws)
    return row | partial.columns("given_classes", "given_classes_")


def twin_rows(cells: pd.DataFrame, layers: pd.DataFrame, probes: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_twin.csv: the steps of a model by its own scores, and by those of its twin of random weights.

    The outcomes are those of the trained model in both, over the tasks that both have. `weights` tells the two apart.
    """
    for model in models_with_twins(layers):
        twin = model + RANDOM
        of_each = [set(layers.loc[layers["model"] == name, "dataset"]) for name in (model, twin)]
        of_both, of_model, its_probes = (
            table[table["dataset"].isin(set.intersection(*of_each))]
            for table in (layers, cells[cells["model"] == model], probes[probes["model"] == model])
        )
        for weights, name in (("trained", model), ("random", twin)) if len(of_both) else ():
            for measure in OF_THE_PROCEDURE:
                for step in find_steps(score_sweep(of_both, name), of_model, its_probes, measure, draws):
                    yield {"model": model, "weights": weights, **step.row}
