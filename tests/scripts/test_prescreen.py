"""prescreen.py as a user runs it: the ranking, the advice, failures, and files."""

import json
import shutil
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cache
import K_sweep
import prescreen
import utils.algebra.ridge
from tests.conftest import configure, make_texts, run_command, write_rows
from tests.method.test_K_sweep import make_data, moments_of
from utils.algebra.moments import load_pooled
from utils.data.load import load_splits
from utils.script import UserError

pytestmark = pytest.mark.slow


def config_for(rows_path, folder, *models, **values):
    values |= {"models": tuple(map(str, models))} if models else {}
    return configure(prescreen, dataset_name=str(rows_path), results_dir=folder, **values)


def result_at(folder, name="rows"):
    return json.loads((folder / "prescreen" / f"{name}.json").read_text())


@pytest.fixture(autouse=True)
def without_picture_and_with_an_installed_model(monkeypatch):
    monkeypatch.setattr(prescreen, "installed_models", lambda: ["micro", "smollm2"])
    monkeypatch.setattr(prescreen, "save_figure", lambda *_: None)


def test_the_page_is_complete_and_a_second_run_reuses_the_pass(tmp_path, model_dirs, rows_path):
    config = config_for(rows_path, tmp_path, *(model_dirs[name] for name in ("qwen2", "llama")), num_random_draws=2)
    prescreen.main(config)
    result = result_at(tmp_path)
    for model in result["models"]:
        assert len(model["fold_r2"]) == 5 and len(model["layers"]) == model["num_layers"]
        assert {"value", "null_mean", "z", "random_mean"} <= set(model["last_layer"]["retained"])
        assert model["z"] == model["layers"][model["best_layer"]]["ridge_r2"]["z"]
    table = pd.read_csv(tmp_path / "prescreen" / "rows.csv")
    assert set(table["model"]) == set(config.models)
    assert {"ridge_r2", "h_oas", "logme", "cka", "ntps"} <= set(table["score"])
    options = ["--dataset_name", config.data.dataset_name, "--results_dir", tmp_path, "--num_random_draws", "2"]
    run = run_command("prescreen.py", "--models", *config.models, *options)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and lines[-1] == str(tmp_path / "prescreen" / "rows.json"), run.stderr
    assert sum("reused" in line for line in lines) == 2
    [start] = [i for i, line in enumerate(lines) if line.split()[:2] == ["model", "best"]]
    assert [line.split()[0] for line in lines[start + 1 : start + 3]] == ["1", "2"]
    assert all(len(line) <= 100 for line in lines[start - 1 : start + 3])
    assert [model["r2"] for model in result_at(tmp_path)["models"]] == [model["r2"] for model in result["models"]]
    assert all((tmp_path / "prescreen" / f"rows{suffix}").stat().st_size > 500 for suffix in (".png", ".pdf"))


def test_r2_is_that_of_scikit_learn_on_the_pooled_states(names, tmp_path, monkeypatch):
    """Compares them at one alpha, on every layer, over the folds of the texts."""
    monkeypatch.setattr(utils.algebra.ridge, "ALPHAS", (10.0,))
    config = config_for(names["dataset_name"], tmp_path, names["model_name"])
    pass_config = configure(cache, **names, results_dir=tmp_path, save_pooled="all", max_samples=2000)
    cache.main(pass_config)
    before = cache.config_path(pass_config).read_bytes()
    prescreen.main(config)
    assert cache.config_path(pass_config).read_bytes() == before  # with the pooled states that belong to it
    [_] = tmp_path.glob("prescreen/moments/*/rows/train.safetensors")  # its own moments lie apart
    train = load_splits(config.data, config.run)["train"]
    folds, targets = cache.assign_folds(train.texts, 5), cache.one_hot_targets(train).numpy()
    for layer, scores in enumerate(result_at(tmp_path)["models"][0]["layers"]):
        features = load_pooled(cache.config_path(pass_config), layer).double().numpy()
        error, baseline = (
            np.square(targets - cross_val_predict(model, features, targets, cv=PredefinedSplit(folds))).sum()
            for model in (make_pipeline(StandardScaler(), Ridge(10)), DummyRegressor())
        )
        assert scores["ridge_r2"]["value"] == pytest.approx(1 - error / baseline, abs=1e-5)


# ------------------------------------------------------------------ planted answers
def test_layer_of_a_fold_is_chosen_on_the_others():
    errors = np.array([[1.0, 9.0, 1.0], [2.0, 2.0, 2.0]])  # layer 0 is best but for the middle fold
    judged = prescreen.judge_layers(errors, np.full(3, 10.0))
    assert judged["best_layer"] == 1 and judged["fold_r2"] == pytest.approx([1 - 0.2, 1 - 0.9, 1 - 0.2])
    assert judged["r2"] == pytest.approx(1 - (2 + 9 + 2) / 30)


def test_models_are_compared_fold_by_fold():
    level = np.array([0.1, 0.5, 0.2, 0.6, 0.3])  # folds differ far more than the two models
    assert prescreen.is_significantly_better(level + np.array([0.05, 0.06, 0.04, 0.05, 0.05]), level)
    assert not prescreen.is_significantly_better(level + np.array([0.2, -0.2, 0.1, -0.1, 0.01]), level)
    # Student's t of five values, from a printed table: t(.95, 4) = 2.132
    assert prescreen.interval(np.array([1.0, 2, 3, 4, 5])) == pytest.approx(2.132 * np.sqrt(2.5) / np.sqrt(5), rel=1e-3)


def screened_model(name: str, fold_r2: list[float], **changes: Any) -> dict[str, Any]:
    """A model as `screen_model` returns it, as far as `rank_models` reads it."""
    return {"model": name, "r2": float(np.mean(fold_r2)), "fold_r2": fold_r2, "best_layer": 1, "z": 9.0} | changes


FIRST, NEAR, FAR = [0.50, 0.52, 0.48, 0.51, 0.49], [0.53, 0.46, 0.51, 0.47, 0.50], [0.20, 0.22, 0.18, 0.21, 0.19]


def test_models_are_ordered_by_r2_and_ties_are_with_the_first():
    """`near` is behind the first on every other fold only; `far` on all of them."""
    models = [screened_model("far", FAR), screened_model("first", FIRST), screened_model("near", NEAR)]
    ranked = prescreen.rank_models(models, np.full(5, 0.3))
    assert [model["model"] for model in ranked] == ["first", "near", "far"]
    assert [model["rank"] for model in ranked] == [1, 2, 3]
    assert [model["as_good_as_first"] for model in ranked] == [True, True, False]
    assert [model["above_words"] for model in ranked] == [True, True, False]
    assert [model["lead_over_words"] for model in ranked] == pytest.approx([0.2, 0.194, -0.1])
    assert [model["verdict"] for model in ranked] == ["first choice", "as good as the first", "no better than words"]
    start = "Start with a linear probe on layer 1 of first: it explains 50% of the label variance, "
    said = prescreen.recommendation({"models": ranked, "baselines": {"fold_r2": [0.3] * 5}})
    assert said == f"{start}bag of words 30%. The folds do not separate it from near."
    assert prescreen.rank_models(models, np.full(5, 0.1))[2]["verdict"] == "behind the first"


@pytest.mark.parametrize("changes", [{"z": 1.9}, {"z": None}, {"r2": -0.1}])
def test_a_model_no_better_than_permuted_labels_finds_nothing(changes):
    [model] = prescreen.rank_models([screened_model("a", FIRST, **changes)], np.full(5, 0.3))
    said = prescreen.recommendation({"models": [model], "baselines": {"fold_r2": [0.3] * 5}})
    assert model["verdict"] == "finds nothing" and said.startswith("No model beats permuted labels")


def test_the_first_model_above_the_words_is_recommended_even_behind_another():
    wavering = screened_model("wavering", [0.9, 0.1, 0.9, 0.1, 0.6])  # the highest R2, on some folds below the words
    ranked = prescreen.rank_models([screened_model("lucky", [0.6] * 5, z=0.0), wavering, screened_model("a", NEAR)],
                                   np.full(5, 0.3))  # fmt: skip
    assert [model["verdict"] for model in ranked] == ["finds nothing", "no better than words", "behind the first"]
    for models, start in ((ranked, "Start with a linear probe on layer 1 of a: "), (ranked[:2], "Start with a bag of")):
        assert prescreen.recommendation({"models": models, "baselines": {"fold_r2": [0.3] * 5}}).startswith(start)


def test_random_v_has_the_rank_of_the_next_token_subspace():
    """C0 of rank 4 in 12 dimensions: a random V of the share f of it holds about floor(4 f) / 12 of any direction."""
    features, targets, states = make_data(400, 12, 3, decades=0.5)
    states[:, 4:] = 0
    scores = prescreen.ntps_scores(moments_of(features, targets, states), configure(prescreen, num_random_draws=40), 0)
    expected = np.mean([max(1, int(4 * fraction + 1e-9)) for fraction in K_sweep.Config().fractions]) / 12
    assert scores["ntps_label"]["random_mean"] == pytest.approx(expected, abs=0.02)
    assert scores["retained"]["random_z"] != scores["retained"]["z"]


def test_scores_rank_the_models_that_all_have_them():
    values = ({"ridge_r2": 0.2, "cka": 0.4, "logme": None}, {"ridge_r2": 0.3, "cka": 0.4, "logme": 1.0})
    models = [{"last_layer": {name: {"value": value} for name, value in of_model.items()}} for of_model in values]
    assert prescreen.score_ranks(models) == {"ridge_r2": [2, 1], "cka": [1, 1]}
    models[0]["last_layer"]["cka"]["meaningless"] = True  # least squares that fits any labels
    assert prescreen.score_ranks(models) == {"ridge_r2": [2, 1]}


# ------------------------------------------------------------------ failures
def test_models_that_fail_are_named_and_the_others_go_on(model_dirs, rows_path, tmp_path):
    broken = shutil.copytree(model_dirs["qwen2"], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="2 of 3 models failed"):
        prescreen.main(config_for(rows_path, tmp_path / "results", model_dirs["qwen2"], broken, "no-such-model"))
    result = result_at(tmp_path / "results")
    assert [model["model"] for model in result["models"]] == [str(model_dirs["qwen2"])]
    assert set(result["failed"]) == {str(broken), "no-such-model"}
    assert "no-such-model" in result["failed"]["no-such-model"]


def test_texts_that_cannot_be_folded_are_refused_and_nothing_is_written(model_dirs, tmp_path):
    """All texts in one fold; labels of a fold that are the mean of the others up to rounding: its R2 is undefined."""
    equal = [{"text": "the red house", "label": i % 2 * 0.4 + 0.1} for i in range(40)]
    for why, more in ((r"prescreen\.py cannot cross-validate", []), ("no R2", [{"text": "fog", "label": 0.1 + 0.2}])):
        for part in ("train", "test"):
            write_rows(tmp_path / f"{part}.jsonl", equal + more)
        with pytest.raises(UserError, match=why):
            prescreen.main(config_for(tmp_path, tmp_path / "results", model_dirs["qwen2"]))
    assert not (tmp_path / "results").exists()


def test_regression(model_dirs, tmp_path, capsys):
    """A regression has no score of classes; test targets that are all equal leave the baselines without R2."""
    texts, folder = make_texts(60), tmp_path / "numbers"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"text": text, "label": 1 + text.count("red") / 4} for text in texts])
    write_rows(folder / "test.jsonl", [{"text": text, "label": 1.25} for text in texts[:9]])
    prescreen.main(config_for(folder, tmp_path, model_dirs["qwen2"], num_folds=40))
    printed, num_folds = capsys.readouterr().out, len(np.unique(cache.assign_folds(texts, 40)))
    assert f"60 texts, {num_folds} folds" in printed and num_folds < 40 and "Also installed" not in printed
    assert "Without a model, test r2: majority -, bag of words -." in printed
    result = result_at(tmp_path, "numbers")
    assert result["baselines"]["majority"]["r2"] is None and "h_oas" not in result["models"][0]["last_layer"]


def test_the_command_that_includes_an_installed_model_is_printed(rows_path, tmp_path, capsys):
    """The command appears for the default models only: `test_regression` names its model."""
    prescreen.main(config_for(rows_path, tmp_path))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Also installed: ")]
    assert line.startswith("Also installed: smollm2. ") and "prescreen.py --models tiny micro smollm2 --d" in line
