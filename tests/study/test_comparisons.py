"""Questions 7, 9 and 10 on planted answers."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from fig_plot.findings import comparisons
from fig_plot.findings.correlations import Draws
from fig_plot.findings.questions import mean_of_others
from utils.algebra.scores import SCORES

DRAWS = Draws(200, 0)
DATASETS = [f"data{i}" for i in range(8)]


def made_up_cells(num_models: int) -> pd.DataFrame:
    """`retained` orders the models on six of eight datasets, `ntps` on none; a larger model is better on five."""
    rows = []
    for i, dataset in enumerate(DATASETS):
        for model in range(num_models):
            better = model if i < 5 else -model
            rows.append({"model": f"m{model}", "dataset": dataset, "best_test_accuracy": 0.5 + better / 10,
                         "retained": better if i < 6 else -better, "ntps": -better,
                         "num_parameters": 10.0**model})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("num_models", [2, 3])
def test_share_of_datasets_on_which_a_score_orders_the_models(num_models):
    rows = pd.DataFrame(comparisons.which_model_rows(made_up_cells(num_models), DRAWS))
    pairs = {2: {"m0, m1"}, 3: {"m0, m1", "m0, m2", "m1, m2", "all"}}[num_models]
    assert set(rows.models) == pairs and set(rows.outcome) == {"best_test_accuracy"}
    for models in pairs:
        found = rows[rows.models == models].set_index("score")
        assert found.share[["retained", "ntps", "num_parameters"]].tolist() == pytest.approx([6 / 8, 0, 5 / 8])
        # without itself the other datasets are better by 4 to 3 for five of them, and by 5 to 2 for the rest
        assert found.share["better on the others"] == pytest.approx(5 / 8)
        assert found.lead["retained"] == pytest.approx(1 / 8) and found.lead["ntps"] == pytest.approx(-5 / 8)
        assert found.low["retained"] <= 6 / 8 <= found.high["retained"] and (found.datasets == 8).all()


def test_ties_of_a_score_count_one_half_and_those_of_the_outcome_nothing():
    cells = made_up_cells(2)
    cells.loc[cells.dataset == "data0", "retained"] = 1.0
    cells.loc[cells.dataset == "data7", "best_test_accuracy"] = 0.5
    found = pd.DataFrame(comparisons.which_model_rows(cells, DRAWS)).set_index("score")
    assert found.share["retained"] == pytest.approx((0.5 + 5) / 7) and found.datasets["retained"] == 7


def test_the_mean_of_the_others_leaves_the_value_itself_out():
    assert mean_of_others(pd.Series([1.0, 2, np.nan, 6])).tolist() == [4, 3.5, 3, 1.5]
    assert np.isnan(mean_of_others(pd.Series([1.0, np.nan]))[0])


def test_a_recommendation_of_prescreen_loses_points_against_the_best_probe():
    """The first model above the bag of words is chosen, else the first; the best probe may be of another."""
    columns = ["model", "dataset", "seed", "layer", "test_accuracy"]
    rows = [
        *[("a", "x", seed, 1, accuracy) for seed, accuracy in ((0, 0.70), (1, 0.72))],  # prescreen.py ran with seed 1
        *[("a", "x", 1, 0, 0.80), ("b", "x", 1, 2, 0.92), ("c", "x", 1, 1, 0.99)],  # c is not screened
        *[("a", "y", 1, 1, 0.50), ("b", "y", 1, 1, 0.40), ("a", "z", 1, 1, None)],
    ]
    words = pd.DataFrame({"dataset": ["x", "x", "y"], "seed": [0, 1, 1], "bag_of_words_accuracy": [0.6, 0.7, 0.7]})
    layers = [{"ridge_r2": {"value": value}} for value in (0.1, 0.2)]
    models = [{"model": name, "best_layer": 1, "r2": 0.5, "layers": layers} for name in ("b", "a")]
    results = [{"config": {"dataset_name": dataset, "seed": 1},
                "models": [model | {"above_words": (model["model"], dataset) == ("a", "x")} for model in models]}
               for dataset in ("x", "y", "z")]  # fmt: skip
    found = comparisons.first_choice_rows(results, pd.DataFrame(rows, columns=columns), words)
    x, y = pd.DataFrame(found).round(6).itertuples()  # z is a regression
    assert (x.model, x.layer, x.best_model, x.best_layer, x.recommended) == ("a", 1, "b", 2, "probe")
    assert (x.test_accuracy, x.points_lost, x.over_words) == (0.72, 20, 2)
    assert (y.model, y.recommended, y.points_lost, y.over_words) == ("b", "bag of words", 10, -30)
    assert comparisons.screened_layers(results).ridge_r2.tolist() == [0.1, 0.2] * 6


def test_leads_over_random_subspaces_and_their_sign_in_two_models():
    """The leads are at the last layer of the cells and the middle one of the layers; two datasets change sign."""
    random = np.random.default_rng(0)
    first = random.uniform(0.1, 1, 8) * np.array([1, 1, 1, 1, -1, -1, -1, 1])
    second = np.abs(first) * np.array([1, 1, 1, 1, -1, -1, 1, -1])
    cells = pd.DataFrame([{"model": model, "dataset": dataset, "retained_lead": lead}
                          for model, of in (("one", first), ("two", second))
                          for dataset, lead in zip(DATASETS, of, strict=True)])  # fmt: skip
    layers = pd.DataFrame([{"model": "one", "dataset": dataset, "layer": layer, "subspace": v, "fraction": fraction,
                            "coordinates": "as_is",
                            "retained": 0.5 + (v == "autoregression") * lead * (layer == 1)}
                           for dataset, lead in zip(DATASETS, first, strict=True) for layer in (0, 1, 2)
                           for v in ("autoregression", "random") for fraction in (0.2, 0.8)])  # fmt: skip
    rows = pd.DataFrame(comparisons.special_rows(comparisons.lead_of_layers(cells, layers), DRAWS))
    rows = rows.set_index(["place", "models", "statistic"])
    for place in ("last", "middle"):
        assert rows.value[(place, "one", "mean lead")] == pytest.approx(first.mean())
        assert rows.positive[(place, "one", "mean lead")] == 5
    assert rows.value[("last", "one, two", "same sign")] == pytest.approx(6 / 8)
    assert rows.value[("last", "one, two", "Spearman")] == pytest.approx(spearmanr(first, second).statistic)
    assert ("middle", "one, two", "Spearman") not in rows.index


def test_a_score_in_every_scaling_at_the_last_two_layers():
    """`ntps` follows accuracy standardized and not as it is; the first layer takes no part."""
    accuracy = np.arange(8) / 10
    layers, means = [], {"as_is": 0.9 - accuracy / 10, "standardized": 0.6 + accuracy / 5}
    for layer in (0, 1, 2):
        for coordinates, values in means.items():
            for dataset, value in zip(DATASETS, values, strict=True):
                for shift in (-0.1, 0.1):
                    layers.append({"model": "one", "dataset": dataset, "layer": layer, "coordinates": coordinates,
                                   "subspace": "autoregression", **dict.fromkeys(SCORES, value + shift)})  # fmt: skip
    cells = pd.DataFrame({"model": "one", "dataset": DATASETS, "probe_accuracy": accuracy})
    rows = pd.DataFrame(comparisons.coordinate_rows(pd.DataFrame(layers), cells, DRAWS))
    assert set(rows.layer) == {1, 2} and set(rows.score) == set(SCORES) and (rows.datasets == 8).all()
    of = rows[(rows.layer == 2) & (rows.score == "ntps")].set_index("coordinates")
    assert of.probe_accuracy.to_dict() == pytest.approx({"as_is": -1, "standardized": 1})
    spread = pd.DataFrame(means).std(axis=1).mean()
    for coordinates, values in means.items():
        assert of["mean"][coordinates] == pytest.approx(values.mean())
        assert of.sd_over_datasets[coordinates] == pytest.approx(np.std(values, ddof=1))
        assert of.sd_over_scalings[coordinates] == pytest.approx(spread)
    assert not list(comparisons.coordinate_rows(pd.DataFrame(layers).query("coordinates == 'as_is'"), cells, DRAWS))
