"""Answer questions 7, 9 and 10 of docs/findings.md, and test prescreen.py, over the models of all studies.

Each function returns the rows of one CSV file; `cells` has a row per model and dataset of every study; `draws` give
the intervals over datasets.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from fig_plot.findings.correlations import Draws, bootstrap_interval, mean_cell, mean_spearman
from fig_plot.findings.questions import CONTROLS, RUN_SCORES, Rows, known, matrix, mean_of_others
from fig_plot.tables import (
    CELL_KEYS,
    FEATURE_SCORES,
    MEASURES,
    SEED_KEYS,
    without_random_weights,
)
from utils.algebra.scores import SCORES

ORDERED = ("best_test_accuracy", "lora_accuracy")  # the outcomes of question 7
LARGER, BETTER_ELSEWHERE = "num_parameters", "better on the others"


def screened_layers(results: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Ridge R2 of every layer, cross-validated over training rows, from results of prescreen.py."""
    rows = [(model["model"], result["config"]["dataset_name"], result["config"]["seed"], layer,
             scores["ridge_r2"]["value"])
            for result in results for model in result["models"]
            for layer, scores in enumerate(model["layers"])]  # fmt: skip
    return pd.DataFrame(rows, columns=[*SEED_KEYS, "layer", "ridge_r2"])


def first_choice_rows(results: Iterable[dict[str, Any]], probes: pd.DataFrame, datasets: pd.DataFrame) -> Rows:
    """Rows of findings_first_choice.csv: what prescreen.py recommends on each dataset, and what that costs.

    Points lost are test accuracy of the most accurate probe of any screened model and layer, which nobody knows
    beforehand, minus that of the chosen probe. `recommended` is a bag of words if no model is shown to beat it.
    """
    accuracy = probes.groupby(["dataset", "seed", "model", "layer"])["test_accuracy"].first().dropna()
    words_of = datasets.groupby(["dataset", "seed"])["bag_of_words_accuracy"].first()
    for result in results:
        dataset, seed, models = result["config"]["dataset_name"], result["config"]["seed"], result["models"]
        above_words = [model for model in models if model["above_words"]]
        first = (above_words or models)[0]
        key = dataset, seed, first["model"], first["best_layer"]
        if key not in accuracy.index:
            continue  # a regression, or no probe of this model
        candidates = accuracy[dataset, seed].loc[[model["model"] for model in models]]
        (best_model, best_layer), best, chosen = candidates.idxmax(), candidates.max(), accuracy[key]
        yield {"dataset": dataset, "model": first["model"], "layer": first["best_layer"], "r2": first["r2"],
               "test_accuracy": chosen, "best_model": best_model, "best_layer": best_layer, "best_test_accuracy": best,
               "bag_of_words": words_of[dataset, seed], "points_lost": 100 * (best - chosen),
               "over_words": 100 * (chosen - words_of[dataset, seed]),
               "recommended": "probe" if above_words else "bag of words"}  # fmt: skip


def agreement(score: pd.Series, outcome: pd.Series) -> pd.Series:
    """1 for each dataset on which a score orders two models as the outcome does, 0 if not, 0.5 if the score ties.

    Both are differences between the models by dataset; the result is nan if the outcome ties or if either is missing.
    """
    return (np.sign(score) * np.sign(outcome) / 2 + 0.5).where(outcome != 0)


def which_model_rows(cells: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_which_model.csv: share of datasets on which a score orders two models as the outcome does.

    A row is of a pair of models with a dataset in common or of `all` pairs: the mean over the pairs of each dataset,
    then over datasets. `lead` is the lead over the better of the two baselines.
    """
    scores = {name: matrix(cells, name) for name in known(cells, (LARGER, *RUN_SCORES, *CONTROLS, *FEATURE_SCORES))}
    for outcome in known(cells, ORDERED):
        target, of_pairs = matrix(cells, outcome), dict[str, pd.DataFrame]()
        for first, second in itertools.combinations(target.index, 2):
            difference = target.loc[first] - target.loc[second]
            if not difference.abs().sum():
                continue
            of_scores = {name: table.loc[first] - table.loc[second] for name, table in scores.items()}
            guesses = {BETTER_ELSEWHERE: mean_of_others(difference), **of_scores}
            right = {name: agreement(guess, difference) for name, guess in guesses.items()}
            of_pairs[f"{first}, {second}"] = pd.DataFrame(right)
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


def special_rows(leads: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_special.csv: `retained` minus that of random V, per model and for each pair of models.

    A model's row has the mean lead over datasets and the number of positive leads; a pair's row the share of datasets
    with leads of the same sign, and Spearman's correlation of the leads over datasets. `leads` has columns model,
    dataset, place (last or middle layer) and lead.
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
    """Table (model, dataset, place, lead) of the lead, `retained` minus that of random V.

    `cells` give the last layer, for which K_sweep.py draws many random V; `layers` the middle one, if it has random V.
    """
    last = cells[[*CELL_KEYS, "retained_lead"]].rename(columns={"retained_lead": "lead"}).assign(place="last")
    layers = without_random_weights(layers[layers["coordinates"] == "as_is"])
    middle = layers.groupby("model")["layer"].transform(lambda of_model: sorted(set(of_model))[len(set(of_model)) // 2])
    at_middle = layers[layers["layer"] == middle].groupby([*CELL_KEYS, "subspace"])["retained"].mean().unstack()
    if "random" not in at_middle:
        return last
    lead = (at_middle["autoregression"] - at_middle["random"]).rename("lead").reset_index()
    return pd.concat([last, lead.assign(place="middle")], ignore_index=True)


def coordinate_rows(layers: pd.DataFrame, cells: pd.DataFrame, draws: Draws) -> Rows:
    """Rows of findings_coordinates.csv: each score in every scaling of the coordinates, at the last two layers.

    A row has, over the datasets with all scalings: mean and spread in one scaling, the spread over scalings (mean over
    datasets), and as `<measure>` Spearman's correlation with the accuracies and the error of question 2.
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
