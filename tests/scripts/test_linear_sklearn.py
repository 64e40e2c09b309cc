"""linear_sklearn.py: its solvers equal scikit-learn's and the moments', its scores the formulas; its command line."""

import shutil

import joblib
import numpy as np
import pytest
import sklearn
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cache
import K_sweep
import linear_sklearn
from tests.conftest import configure, flags, make_texts, only_result, run_in_process, write_rows
from utils.script import UserError
from utils.settings import with_values

pytestmark = pytest.mark.slow


def make_features(num: int, width: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Standardised float32 features with strong correlations, and labels that they predict in part."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(width, width)) * np.logspace(0, -2, width)[:, None]
    features = random.normal(size=(num, width)) @ mixing
    logits = features @ random.normal(size=(width, num_classes)) + random.gumbel(size=(num, num_classes)) * 8
    return torch.tensor(StandardScaler().fit_transform(features)).float(), logits.argmax(1)


def fit(features, labels, solver="lbfgs", max_iter=10_000, tolerance=1e-4, inverse_penalty=1.0):
    config = linear_sklearn.Config(
        solver=solver, inverse_penalty=inverse_penalty, max_iter=max_iter, tolerance=tolerance
    )
    return linear_sklearn.fit_logistic(with_values(config, seed=3), features, labels)


@pytest.mark.parametrize(("num_classes", "inverse_penalty"), [(2, 1.0), (4, 100.0)])
def test_lbfgs_finds_what_scikit_learn_finds_from_zero_in_fewer_iterations(num_classes, inverse_penalty):
    """On a GPU scikit-learn's array API does the same; here it gets CPU tensors."""
    features, labels = make_features(500, 30, num_classes)
    model, solver = fit(features, labels, inverse_penalty=inverse_penalty)
    exact = LogisticRegression(C=inverse_penalty, tol=1e-9, max_iter=10_000).fit(features.double().numpy(), labels)
    cold = LogisticRegression(C=inverse_penalty, max_iter=10_000).fit(features.numpy(), labels)
    assert solver["converged"] and solver["num_iterations"] < cold.n_iter_[0] / 2
    found = model.predict_proba(features.numpy())
    np.testing.assert_allclose(found, exact.predict_proba(features.double().numpy()), atol=5e-3)
    with sklearn.config_context(array_api_dispatch=True):
        model, solver = fit(features, labels, inverse_penalty=inverse_penalty)
        assert isinstance(model.coef_, torch.Tensor) and solver["converged"] and model.coef_.shape == exact.coef_.shape
        np.testing.assert_allclose(model.predict_proba(features).numpy(), found, atol=1e-3)


def test_saga_equals_scikit_learn_and_is_never_silently_capped():
    features, labels = make_features(200, 10, 3)
    model, solver = fit(features, labels, "saga", 1000, 0.01)
    paper = LogisticRegression(max_iter=1000, solver="saga", tol=0.01, random_state=3).fit(features.numpy(), labels)
    np.testing.assert_array_equal(model.coef_, paper.coef_)
    assert solver == {"num_iterations": paper.n_iter_[0], "converged": True}
    assert fit(features, labels, max_iter=2, tolerance=1e-9)[1]["converged"] is False


@pytest.mark.parametrize(("num", "width"), [(300, 20), (60, 80)])
def test_least_squares_equals_scikit_learn(num, width):
    features, labels = make_features(2 * num, width, 3)
    features = features * torch.logspace(-2, 3, width) + 5 * (torch.arange(width) == 3)
    features[:, 2] += 100 * features[:, 2].std()  # a massive coordinate
    features[:, 5] = 7.7
    train, targets = features[:num].double().numpy(), np.eye(3)[labels[:num]]
    weights, intercept = linear_sklearn.least_squares(features[:num], torch.from_numpy(targets))
    reference = make_pipeline(StandardScaler(), LinearRegression()).fit(train, targets)
    for part in (features[:num], features[num:]):
        predictions = part.double() @ weights + intercept
        np.testing.assert_allclose(predictions, reference.predict(part.double().numpy()), atol=1e-6)


@pytest.fixture(scope="module")
def made(names, tmp_path_factory):
    """Settings of a folder with moments and features of both splits, and those of K_sweep.py; tests work on copies."""
    base = names | {"results_dir": tmp_path_factory.mktemp("made")}
    for split in ("train", "test"):
        cache.main(configure(cache, **base, split=split, save_pooled="all"))
    K_sweep.main(configure(K_sweep, **base, picture=False))
    return base


@pytest.fixture
def config(made, tmp_path):
    shutil.copytree(made["results_dir"], tmp_path / "results")
    return configure(linear_sklearn, **made | {"results_dir": tmp_path / "results"}, picture=False)


def result_of(config) -> dict:
    return only_result(config.run.results_dir, "linear_sklearn/*/rows.json")[1]


def states_and_labels(config, layer: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The stored pooled states (n, d) of a layer and the labels (n,), by split."""
    paths = {path.stem: path for path in config.run.results_dir.glob("moments/*/*/*.safetensors")}
    x = {split: np.load(path.with_suffix(".pooled.npy"))[layer].astype(np.float64) for split, path in paths.items()}
    return x, {split: load_file(path)["labels"].numpy() for split, path in paths.items()}


def test_result_equals_scikit_learn_and_k_sweep(config):
    linear_sklearn.main(config)
    result = result_of(config)
    _, swept_layers = only_result(config.run.results_dir, "ntps/*/rows.json")
    for entry, swept in zip(result["layers"], swept_layers["layers"], strict=True):
        x, y = states_and_labels(config, entry["layer"])
        logistic, linear = LogisticRegression(tol=1e-9, max_iter=10_000), LinearRegression()
        logistic = make_pipeline(StandardScaler(), logistic).fit(x["train"], y["train"])
        linear = make_pipeline(StandardScaler(), linear).fit(x["train"], np.eye(3)[y["train"]])
        for split in ("train", "test"):
            shares = logistic.predict_proba(x[split])
            log_loss = -np.log(shares[np.arange(len(shares)), y[split]]).mean()
            assert entry[split]["log_loss"] == pytest.approx(log_loss, abs=2e-3)
            assert entry[split]["accuracy"] == pytest.approx(logistic.score(x[split], y[split]), abs=1.5 / len(shares))
            error = np.square(linear.predict(x[split]) - np.eye(3)[y[split]]).mean()
            assert entry[split]["mse"] == pytest.approx(error, abs=1e-6)
        assert entry["train"]["mse"] == pytest.approx(swept["probe_mse"], abs=1e-6)
        assert entry["train"]["r2"] == pytest.approx(swept["probe_r2"], abs=1e-5)
        assert entry["test"]["mse"] == pytest.approx(swept["probe_mse_held_out"], abs=1e-6)
        assert entry["solver"]["converged"]
    assert result["num_samples"] == {"train": 168, "test": 72}
    assert 0.3 < result["baselines"]["majority"]["accuracy"] < 0.4 < result["baselines"]["bag_of_words"]["accuracy"]


def test_command_line_writes_and_shows_a_result_again(made, config, monkeypatch, capsys):
    options = flags(made | {"results_dir": config.run.results_dir})
    assert run_in_process(monkeypatch, "linear_sklearn.py", *options) == 0
    path, first = only_result(config.run.results_dir, "linear_sklearn/*/rows.json")
    printed = capsys.readouterr().out
    assert printed.strip().splitlines()[-1] == str(path) and "1 at a time" in printed and "bag_of_words" in printed
    assert "scores on train" in printed and "scores on test" in printed
    assert sorted(file.name for file in path.parent.iterdir()) == ["rows.json", "rows.pdf", "rows.png"]
    with joblib.parallel_config("threading"):  # new processes would import torch first
        linear_sklearn.main(with_values(config, num_workers=2, overwrite=True))
    assert "2 at a time" in capsys.readouterr().out and result_of(config)["layers"] == first["layers"]


def test_a_solver_that_has_not_converged_is_told_also_of_a_reused_result(config, capsys):
    for _ in range(2):
        linear_sklearn.main(with_values(config, solver="saga", max_iter=1))
        assert "warning: saga has not converged at layer 0, 1, 2" in capsys.readouterr().out


def test_a_class_without_training_texts_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"No train text of class class .*Add some"):
        linear_sklearn.main(with_values(config, max_samples=2, results_dir=tmp_path / "few"))
    assert not list(tmp_path.rglob("linear_sklearn"))


def test_regression(names, tmp_path, capsys):
    rows = [{"text": text, "label": len(text) / 7} for text in make_texts(150)]
    names = names | {"dataset_name": str(write_rows(tmp_path / "rows.jsonl", rows))}
    config = configure(linear_sklearn, **names, results_dir=tmp_path / "results", picture=False)
    linear_sklearn.main(config)
    entry = result_of(config)["layers"][2]
    scores, (x, y) = entry["test"], states_and_labels(config, 2)
    reference = LinearRegression().fit(x["train"], y["train"])
    assert set(scores) == {"mse", "mse_over_variance", "r2", "pearson"}
    assert scores["r2"] == pytest.approx(reference.score(x["test"], y["test"]), abs=1e-3)
    correlation = np.corrcoef(reference.predict(x["test"]), y["test"])[0, 1]
    assert scores["pearson"] == pytest.approx(correlation, abs=1e-4)
    assert "pearson" in capsys.readouterr().out
