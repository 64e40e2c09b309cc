"""Questions 7, 9 and 10 of docs/findings.md, of any number of models; question 8 is `layer_choice_rows`.

Each function yields the rows of one CSV file beside the tables of all studies; `cells` has a row per model and dataset
of every study; `draws` give the intervals over datasets.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from fig_plot.findings.correlations import Draws, bootstrap_interval, mean_cell, mean_spearman
from fig_plot.findings.questions import known
from fig_plot.tables import CELL_KEYS, CONTROLS, FEATURE_SCORES, MEASURES, RUN_SCORES, matrix, without_random_weights
from utils.algebra.scores import SCORES

ORDERED = ("best_test_accuracy", "lora_accuracy")  # the outcomes of question 7
LARGER, BETTER_ELSEWHERE = "num_parameters", "better on the others"
Rows = Iterator[dict[str, Any]]


def best_test_accuracy(probes: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy of the best layer's probe, a row per model and dataset; seeds averaged at each layer first."""
    accuracy = probes.groupby([*CELL_KEYS, "layer"])["test_accuracy"].mean()
    return accuracy.groupby(CELL_KEYS).max().rename("best_test_accuracy").reset_index()


# ------------------------------------------------------------------ question 7: which model?
def is_right(score: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """1 if the score orders two models as the outcome does, 0 if not, 0.5 if the score ties; (datasets,).

    Args:
        score: difference between the models on each dataset, (datasets,).
        outcome: difference on each dataset; the result is nan if the outcome ties or if either is missing.
    """
    agreement = np.sign(score) * np.sign(outcome) / 2 + 0.5
    return np.where(np.isfinite(agreement) & (outcome != 0), agreement, np.nan)


def elsewhere(difference: np.ndarray) -> np.ndarray:
    """For each dataset the mean difference over the other datasets; nan without any other."""
    present = np.isfinite(difference)
    others = present.sum() - present
    total = np.nansum(difference) - np.where(present, difference, 0)
    return np.divide(total, others, where=others > 0, out=np.full(len(difference), np.nan))


def which_model_rows(cells: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_which_model.csv: share of datasets on which a score orders two models as the outcome does.

    For each pair of models with a dataset in common, and over all pairs (`all`): the mean over the pairs of a dataset,
    then over datasets. `lead` is over the better of the two baselines.
    """
    cells = without_random_weights(cells)
    scores = {name: matrix(cells, name) for name in known(cells, (LARGER, *RUN_SCORES, *CONTROLS, *FEATURE_SCORES))}
    for outcome in known(cells, ORDERED):
        target, of_pairs = matrix(cells, outcome), dict[str, pd.DataFrame]()
        for first, second in itertools.combinations(target.index, 2):
            difference = (target.loc[first] - target.loc[second]).to_numpy(float)
            if not np.nansum(np.abs(difference)):
                continue
            of_scores = {name: table.loc[first] - table.loc[second] for name, table in scores.items()}
            guesses = {BETTER_ELSEWHERE: elsewhere(difference), **of_scores}
            right = {name: is_right(np.asarray(guess, float), difference) for name, guess in guesses.items()}
            of_pairs[f"{first}, {second}"] = pd.DataFrame(right, index=target.columns)
        if len(of_pairs) > 1:
            of_pairs["all"] = pd.concat(of_pairs).groupby(level=1).mean()[[*scores, BETTER_ELSEWHERE]]
        for models, right in of_pairs.items():
            baselines = right[[name for name in (LARGER, BETTER_ELSEWHERE) if name in right]].mean()
            best = str(baselines.fillna(0).idxmax())
            for name, share in right.dropna(axis=1, how="all").items():
                value = bootstrap_interval(mean_cell, share, draws=draws)
                lead = bootstrap_interval(mean_cell, share - right[best], draws=draws)
                yield {"outcome": outcome, "models": models, "score": name, **value.columns("share"),
                       "best_baseline": best, **lead.columns("lead", "lead_"),
                       "datasets": int(share.notna().sum())}  # fmt: skip


# ------------------------------------------------------------------ question 9: is V special?
def special_rows(leads: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_special.csv: `retained` minus that of random V, per model and for each pair of models.

    A model's row has the mean lead over datasets and the number of positive leads; a pair's row the share of datasets
    with leads of the same sign, and Spearman's correlation of the leads over datasets.

    Args:
        leads: model, dataset, place (last or middle layer) and lead.
        draws: bootstrap samples for the intervals over datasets.
    """
    for place, rows in leads.groupby("place", sort=False):
        table = matrix(rows, "lead")
        for model, of_model in table.iterrows():
            found = bootstrap_interval(mean_cell, of_model, draws=draws)
            yield {"place": place, "models": model, "statistic": "mean lead", **found._asdict(),
                   "positive": int((of_model > 0).sum()), "datasets": int(of_model.notna().sum())}  # fmt: skip
        for first, second in itertools.combinations(table.index, 2):
            both = table.loc[[first, second]].dropna(axis=1).to_numpy(float)
            if both.shape[1] < 3:
                continue
            same = bootstrap_interval(mean_cell, np.sign(both[0]) == np.sign(both[1]), draws=draws)
            order = bootstrap_interval(mean_spearman, both[:1], both[1:], draws=draws)
            for statistic, found in (("same sign", same), ("Spearman", order)):
                yield {"place": place, "models": f"{first}, {second}", "statistic": statistic, **found._asdict(),
                       "datasets": both.shape[1]}  # fmt: skip


def lead_of_layers(cells: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """`retained` minus that of random V: model, dataset, place, lead.

    Args:
        cells: gives the last layer, for which K_sweep.py draws many random V.
        layers: rows of layers.csv.gz; the middle layer also needs rows with `subspace` random.
    """
    last = cells[[*CELL_KEYS, "retained_lead"]].rename(columns={"retained_lead": "lead"}).assign(place="last")
    layers = without_random_weights(layers[layers["coordinates"] == "as_is"])
    middle = layers.groupby("model")["layer"].transform(lambda of_model: sorted(set(of_model))[len(set(of_model)) // 2])
    at_middle = layers[layers["layer"] == middle].groupby([*CELL_KEYS, "subspace"])["retained"].mean().unstack()
    if "random" not in at_middle:
        return last
    lead = (at_middle["autoregression"] - at_middle["random"]).rename("lead").reset_index()
    return pd.concat([last, lead.assign(place="middle")], ignore_index=True)


# ------------------------------------------------------------------ question 10: the scale of the coordinates
def coordinate_rows(layers: pd.DataFrame, cells: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_coordinates.csv: each score in every scaling of the coordinates, at the last two layers.

    Over the datasets that have all scalings: mean and spread in one scaling, the spread over scalings (mean over
    datasets), and as `<measure>` Spearman's correlation with the accuracies and the error of question 2.

    Args:
        layers: rows of layers.csv.gz.
        cells: a row per model and dataset, for the measures.
        draws: bootstrap samples for the intervals over datasets.
    """
    layers = without_random_weights(layers[layers["subspace"] == "autoregression"])
    for model, rows in layers.groupby("model"):
        outcomes = cells[cells["model"] == model].set_index("dataset")
        for layer, score in itertools.product(sorted(set(rows["layer"]))[-2:], SCORES):
            at_layer = rows[rows["layer"] == layer]
            table = at_layer.groupby(["dataset", "coordinates"])[score].mean().unstack().dropna()
            if table.shape[1] < 2 or len(table) < 2:
                continue
            for coordinates, values in table.items():
                row = {"model": model, "layer": layer, "score": score, "coordinates": coordinates,
                       "mean": values.mean(), "sd_over_datasets": values.std(),
                       "sd_over_scalings": table.std(axis=1).mean(), "datasets": len(table)}  # fmt: skip
                for measure in known(outcomes, MEASURES[:3]):
                    target = outcomes[measure].reindex(table.index).to_numpy(float)
                    found = bootstrap_interval(mean_spearman, values.to_numpy()[None], target[None], draws=draws)
                    row |= found.columns(measure, f"{measure}_")
                yield row
