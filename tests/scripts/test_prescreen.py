"""prescreen.py as a user runs it: the ranking, the sentences, what goes wrong, and what is kept."""

import dataclasses
import json
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from huggingface_hub.errors import GatedRepoError
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig

import cache
import K_sweep
import prescreen
import utils.algebra.ridge
import utils.prescreen_page
from tests.conftest import ROOT, configure, make_texts, run_in_process, write_rows
from tests.method.test_K_sweep import make_data, moments_of
from utils import calibration
from utils.algebra.moments import load_pooled
from utils.calibration import Line, expected_gain
from utils.data.load import load_splits
from utils.results import read_identity
from utils.script import UserError

pytestmark = pytest.mark.slow

LINE = Line(
    source="made-up", predictor="ridge_r2", intercept=8.0, slope=-10.0, lowest=0.1, highest=0.9, error=1.0,
    error_of_mean=2.0, error_new_model=1.1, error_of_mean_new_model=1.9, lead_low_new_model=0.2,
    lead=1.0, lead_low=0.4, lead_high=1.6, residual_low=-1.0, residual_high=1.0,
    mean_gain=3.0, cells=40, tasks=10, models=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch, tmp_path):
    """The committed lines may change; the tests bring their own."""
    monkeypatch.setattr(prescreen, "read_lines", list)


def config_for(rows_path, folder, *models, **values):
    names = tuple(map(str, models))
    return configure(prescreen, models=names, dataset_name=str(rows_path), results_dir=folder, **values)


def result_at(folder, name="rows"):
    return json.loads((folder / "prescreen" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dirs, rows_path):
    """A run over two models and its folder."""
    folder = tmp_path_factory.mktemp("prescreen")
    config = config_for(rows_path, folder, *(model_dirs[name] for name in ("qwen2", "llama")), num_random=2)
    prescreen.main(config)
    return config, folder


def test_the_page_is_complete(finished, capsys):
    config, folder = finished
    result = result_at(folder)
    assert [model["rank"] for model in result["models"]] == [1, 2]
    assert result["models"][0]["r2"] >= result["models"][1]["r2"]
    for suffix in (".png", ".pdf", ".csv"):
        assert (folder / "prescreen" / f"rows{suffix}").stat().st_size > 500
    for model in result["models"]:
        assert len(model["fold_r2"]) == 5 and len(model["layers"]) == model["num_layers"]
        assert model["sentence"] and model["gain"]["reason"] and model["seconds_of_pass"] > 0
        assert {"value", "null_mean", "z", "random_mean"} <= set(model["last_layer"]["retained"])
    table = pd.read_csv(folder / "prescreen" / "rows.csv")
    assert set(table["model"]) == set(config.models) and {"ridge_r2", "h_oas", "logme", "cka", "ntps"} <= set(
        table["score"]
    )
    prescreen.main(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(folder / "prescreen" / "rows.json")
    assert sum("reused" in line for line in lines) == 2  # the pass is not run again
    assert any(line.startswith("without a model, test accuracy: majority") for line in lines)
    second = result_at(folder)
    assert [model["r2"] for model in second["models"]] == [model["r2"] for model in result["models"]]


def test_r2_is_that_of_scikit_learn_on_the_pooled_states(model_dirs, rows_path, tmp_path, monkeypatch):
    """At one alpha, on every layer, over the folds of the texts."""
    monkeypatch.setattr(utils.algebra.ridge, "ALPHAS", (10.0,))
    config = config_for(rows_path, tmp_path, model_dirs["qwen2"], picture=False)
    prescreen.main(config)
    pass_config = configure(
        cache, model_name=str(model_dirs["qwen2"]), dataset_name=str(rows_path), max_samples=2000, save_pooled="all",
        results_dir=tmp_path / "direct",
    )  # fmt: skip
    cache.main(pass_config)
    train = load_splits(config.data, config.run)["train"]
    folds, targets = cache.assign_folds(train.texts, 5), cache.one_hot_targets(train).numpy()
    pooled = [load_pooled(cache.config_path(pass_config), layer).double().numpy() for layer in range(3)]
    for layer, features in enumerate(pooled):
        error = baseline = 0.0
        for fold in range(5):
            outside, inside = folds != fold, folds == fold
            fit = make_pipeline(StandardScaler(), Ridge(10)).fit(features[outside], targets[outside])
            error += np.square(targets[inside] - fit.predict(features[inside])).sum()
            baseline += np.square(targets[inside] - targets[outside].mean(0)).sum()
        stored = result_at(tmp_path)["models"][0]["layers"][layer]["ridge_r2"]["value"]
        assert stored == pytest.approx(1 - error / baseline, abs=1e-5)


def test_layer_of_a_fold_is_chosen_on_the_others():
    errors = np.array([[1.0, 9.0, 1.0], [2.0, 2.0, 2.0]])  # layer 0 is best but for the middle fold
    found = prescreen.Errors(errors, np.full(3, 10.0))
    assert found.chosen().tolist() == [1, 0, 1]
    assert found.best_layer == 1
    assert found.r2() == pytest.approx(1 - (2 + 9 + 2) / 30)


def test_models_are_told_apart_fold_by_fold():
    level = np.array([0.1, 0.5, 0.2, 0.6, 0.3])  # folds differ far more than the two models
    assert prescreen.told_apart(level + np.array([0.05, 0.06, 0.04, 0.05, 0.05]), level)
    assert not prescreen.told_apart(level + np.array([0.2, -0.2, 0.1, -0.1, 0.01]), level)
    # Student's t of five values, from a printed table: t(.95, 4) = 2.132
    assert prescreen.interval(np.array([1.0, 2, 3, 4, 5])) == pytest.approx(2.132 * np.sqrt(2.5) / np.sqrt(5), rel=1e-3)


# ------------------------------------------------------------------ planted answers
def screened_model(name: str, fold_r2: list[float], **changes: Any) -> dict[str, Any]:
    """A model as `screen_model` returns it, as far as `rank_models` reads it."""
    model = {"model": name, "r2": float(np.mean(fold_r2)), "fold_r2": fold_r2, "best_layer": 1, "z": 9.0}
    return model | {"predictors": {"ridge_r2": 0.5}} | changes


def test_models_are_ordered_by_r2_and_ties_are_with_the_first():
    """`near` is behind the first on every other fold only; `far` on all of them, and told apart from `near` too."""
    first, near, far = [0.50, 0.52, 0.48, 0.51, 0.49], [0.53, 0.46, 0.51, 0.47, 0.50], [0.20, 0.22, 0.18, 0.21, 0.19]
    models = [screened_model("far", far), screened_model("first", first), screened_model("near", near)]
    ranked = prescreen.rank_models(models, np.full(5, 0.3))
    assert [model["model"] for model in ranked] == ["first", "near", "far"]
    assert [model["rank"] for model in ranked] == [1, 2, 3]
    assert [model["as_good_as_first"] for model in ranked] == [True, True, False]
    assert [model["above_words"] for model in ranked] == [True, True, False]


def test_random_v_has_the_rank_of_the_next_token_subspace():
    """C0 of rank 4 in 12 dimensions: a random V of the share f of it holds about floor(4 f) / 12 of any direction."""
    features, targets, states = make_data(400, 12, 3, decades=0.5)
    states[:, 4:] = 0
    moments = moments_of(features, targets, states)
    scores = prescreen.ntps_scores(moments, configure(prescreen, num_random=40), 0)
    fractions = K_sweep.Config().fractions
    expected = np.mean([max(1, int(4 * fraction + 1e-9)) for fraction in fractions]) / 12
    for name in ("ntps", "ntps_label"):
        assert scores[name]["random_mean"] == pytest.approx(expected, abs=0.05), name


def test_z_is_that_of_the_best_layer(finished):
    for model in result_at(finished[1])["models"]:
        best = model["layers"][model["best_layer"]]["ridge_r2"]
        others = [
            layer["ridge_r2"]["z"] for layer in model["layers"] if layer is not model["layers"][model["best_layer"]]
        ]
        assert model["z"] == best["z"] and model["z"] not in others
        assert model["layer_lead"] == pytest.approx(best["value"] - model["layers"][-1]["ridge_r2"]["value"])
    assert any(model["layer_lead"] > 0 for model in result_at(finished[1])["models"])


# ------------------------------------------------------------------ the sentence
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"z": 0.5}, "nothing above permuted labels"),
        ({"r2": -0.1}, "nothing above permuted labels"),
        ({"above_words": False}, "bag of words does as well"),
        ({}, "LoRA is likely to gain 2 to 4 points"),
        ({"r2": 0.85, "predictor": 0.85}, "a linear probe is enough"),
        ({"predictor": 0.95}, "outside the calibration's range"),
    ],
)
def test_sentence(changes, told):
    model = {"r2": 0.5, "z": 9.0, "best_layer": 3, "above_words": True, "predictor": 0.5} | changes
    gain = expected_gain({"ridge_r2": model["predictor"]}, [LINE])
    assert told in prescreen.sentence(model, 0.3, gain)


def test_no_gain_is_given_where_the_line_is_no_better_than_the_mean():
    changes: tuple[dict[str, Any], ...] = ({"lead_low": -0.1}, {"lead_low_new_model": -0.1})
    changes += ({"lead_low_new_model": float("nan"), "models": 1},)
    for change in changes:
        gain = expected_gain({"ridge_r2": 0.5}, [dataclasses.replace(LINE, **change)])
        assert gain.low is None and "no score predicts LoRA's gain better than its mean" in gain.reason
    assert expected_gain({"ridge_r2": 0.5}, []).reason.startswith("no calibration")


def test_committed_calibration_reads_back():
    lines = calibration.read_lines()
    assert {line.source for line in lines} >= {"docstring"}
    for line in lines:
        assert line.lowest <= line.highest and line.residual_low <= line.residual_high and line.tasks >= 3
        assert line.lead == pytest.approx(line.error_of_mean - line.error, abs=1e-3)


# ------------------------------------------------------------------ what goes wrong
def test_a_model_that_fails_is_named_and_the_others_go_on(model_dirs, rows_path, tmp_path, monkeypatch):
    shutil.copytree(model_dirs["qwen2"], tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights")
    arguments = ["--models", model_dirs["qwen2"], tmp_path / "broken", "no-such-model"]
    arguments += ["--dataset_name", rows_path, "--results_dir", tmp_path / "results", "--no-picture"]
    message = run_in_process(monkeypatch, "prescreen.py", *arguments)
    assert isinstance(message, str) and "2 of 3 models failed" in message  # exit code 1
    result = result_at(tmp_path / "results")
    assert [model["model"] for model in result["models"]] == [str(model_dirs["qwen2"])]
    assert set(result["failed"]) == {str(tmp_path / "broken"), "no-such-model"}
    assert "no-such-model" in result["failed"]["no-such-model"]


def test_a_model_too_large_for_the_machine_is_refused_before_it_is_loaded(model_dirs, rows_path, tmp_path, monkeypatch):
    monkeypatch.setattr(utils.prescreen_page.os, "sysconf", lambda name: 100)
    with pytest.raises(UserError, match=r"needs about .* GiB for weights and moments.*--dtype bfloat16"):
        prescreen.main(config_for(rows_path, tmp_path, model_dirs["qwen2"]))


def test_interrupted_keeps_finished_models(model_dirs, rows_path, tmp_path, monkeypatch):
    screen, calls = prescreen.screen_model, []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return screen(*arguments)

    monkeypatch.setattr(prescreen, "screen_model", once)
    with pytest.raises(KeyboardInterrupt):
        prescreen.main(
            config_for(rows_path, tmp_path, *(model_dirs[name] for name in ("qwen2", "llama")), picture=False)
        )
    assert len(result_at(tmp_path)["models"]) == 1


def test_moments_of_other_settings_stay(model_dirs, rows_path, tmp_path):
    other = configure(cache, model_name=str(model_dirs["qwen2"]), dataset_name=str(rows_path), max_samples=100,
                      results_dir=tmp_path)  # fmt: skip
    cache.main(other)
    prescreen.main(config_for(rows_path, tmp_path, model_dirs["qwen2"], picture=False))
    assert read_identity(cache.config_path(other))["config"]["max_samples"] == 100
    own = cache.config_path(configure(cache, model_name=str(model_dirs["qwen2"]), dataset_name=str(rows_path),
                                      results_dir=tmp_path / "prescreen"))  # fmt: skip
    assert read_identity(own)["config"]["max_samples"] == 2000


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": f"word {i}", "label": "one"} for i in range(20)], "at least two classes"),
        ([{"text": f"word {i}"} for i in range(20)], "label"),
    ],
)
def test_labels_that_cannot_be_used(model_dirs, tmp_path, rows, told):
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=told):
        prescreen.main(config_for(path, tmp_path, model_dirs["qwen2"]))


@pytest.mark.parametrize("text", ["red", "the red house"])
def test_texts_that_are_all_equal_cannot_be_cross_validated(text, model_dirs, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "equal.jsonl", [{"text": text, "label": "ab"[i % 2]} for i in range(40)])
    arguments = ["--models", model_dirs["qwen2"], "--dataset_name", path, "--results_dir", tmp_path / "results"]
    message = run_in_process(monkeypatch, "prescreen.py", *arguments)
    expected = "All texts fall into one fold (are they all equal?): prescreen.py cannot cross-validate."
    assert message == f"error: {expected}" and not (tmp_path / "results").exists()


def test_test_targets_that_are_all_equal_leave_the_baselines_without_r2(model_dirs, tmp_path, monkeypatch, capsys):
    texts = make_texts(60)
    rows = [{"text": text, "label": 1 + text.count("red") / 4} for text in texts]
    for part, of_part in (("train", rows), ("test", [{"text": text, "label": 1.25} for text in texts[:9]])):
        (tmp_path / "numbers").mkdir(exist_ok=True)
        write_rows(tmp_path / "numbers" / f"{part}.jsonl", of_part)
    arguments = ["--models", model_dirs["qwen2"], "--dataset_name", tmp_path / "numbers", "--results_dir", tmp_path]
    assert run_in_process(monkeypatch, "prescreen.py", *arguments) == 0
    assert (
        "without a model, test r2: majority -, bag of words -; bag of words, R2 over folds " in capsys.readouterr().out
    )
    assert result_at(tmp_path, "numbers")["baselines"]["majority"]["r2"] is None


def test_fewer_texts_than_features_is_said_and_saturated_scores_have_no_rank(model_dirs, tmp_path, capsys):
    rows = [{"text": f"the house {i} {'red' if i % 2 else 'green'}", "label": "ab"[i % 2]} for i in range(40)]
    path = write_rows(tmp_path / "few.jsonl", rows)
    prescreen.main(config_for(path, tmp_path, model_dirs["qwen2"], picture=False))
    assert "n = 28 <= d = 32" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "prescreen" / "few.csv")
    last = table[table["layer"] == 2].set_index("score")
    assert last["rank"][["h_score", "probe_r2"]].isna().all() and last["rank"][["ridge_r2", "h_oas"]].eq(1).all()


def test_regression_has_no_h_score(model_dirs, tmp_path, capsys):
    random = np.random.default_rng(0)
    rows = [{"text": "stone " * (1 + i % 7) + f"river {i}", "label": i % 7 + random.normal() / 10} for i in range(120)]
    path = write_rows(tmp_path / "numbers.jsonl", rows)
    prescreen.main(config_for(path, tmp_path, model_dirs["qwen2"]))
    told = capsys.readouterr().out
    assert "regression targets: left out, as they are of classes: H-score" in told
    result = result_at(tmp_path, "numbers")
    assert "h_oas" not in result["models"][0]["last_layer"] and result["models"][0]["r2"] > 0.5


def test_more_classes_than_texts_to_judge_by_is_answered_without_a_number(model_dirs, tmp_path):
    """Two texts of each of 30 classes: a probe has seen each class once or never, and nothing is found."""
    rows = [{"text": f"{text} {i}", "label": f"class {i % 30}"} for i, text in enumerate(make_texts(60))]
    path = write_rows(tmp_path / "classes.jsonl", rows)
    prescreen.main(config_for(path, tmp_path, model_dirs["qwen2"], picture=False))
    [model] = result_at(tmp_path, "classes")["models"]
    assert "nothing above permuted labels" in model["sentence"] and model["gain"]["low"] is None


def test_a_gated_model_is_named_with_what_to_do(model_dirs, rows_path, tmp_path, monkeypatch, capsys):
    response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
    load = AutoConfig.from_pretrained

    def gated(name, **options):
        if "gated" in str(name):
            raise GatedRepoError("403 Client Error", response=response)
        return load(name, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", gated)
    with pytest.raises(UserError, match=r"1 of 2 models failed: maker/gated.*hf auth login"):
        prescreen.main(config_for(rows_path, tmp_path, model_dirs["qwen2"], "maker/gated", picture=False))
    assert "failed: maker/gated" in capsys.readouterr().out
    assert len(result_at(tmp_path)["models"]) == 1


def test_one_bar_over_all_models_ends_full(model_dirs, rows_path, tmp_path, capsys):
    """Also where a model's moments were there already, or it fails."""
    shutil.copytree(model_dirs["llama"], tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights")
    names = (model_dirs["qwen2"], tmp_path / "broken")
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 2 models failed"):
            prescreen.main(config_for(rows_path, tmp_path, *names, picture=False))
        bars = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "%|" in line]
        assert {line.split()[0] for line in bars} <= {"prescreen", "tokenize:"}
        assert "100%" in bars[-1] and " left, " in bars[-1]


def test_default_models_are_those_installed():
    installed = [name for name in prescreen.EMBEDDED if prescreen.is_installed(name)]
    assert "tiny" in installed
    assert ("micro" in installed) == (ROOT / "demo" / "runs" / "micro" / "config.json").is_file()
