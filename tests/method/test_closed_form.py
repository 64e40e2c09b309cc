"""Scores from moments against TransformerRanker, LogME, scikit-learn (golden values), and against real permutations."""

import dataclasses
import json
import string
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2Tokenizer

import cache
import utils.algebra.ridge
from tests.conftest import configure, write_rows
from utils.algebra.features import SHRINKAGES, feature_scores
from utils.algebra.moments import LayerMoments, load_layer
from utils.algebra.ridge import eigenbasis, fit_ridge, fold_moments, load_folds, ridge, whole_split
from utils.results import open_tensors

# Made with TLL (H-score), thuml/LogME, scikit-learn (shrinkage, ridge, least squares) on data sets of scikit-learn.
# digits50: the first 50 rows, fewer than features. iris32: the features rounded to float32.
GOLDEN = {
    "h_ledoit_wolf": (1.177842499331, 0.766097564722, 5.851432997954, 7.330381635520),
    "h_oas": (1.149033469042, 0.759006542205, 5.846727566302, 7.167939083889),
    "logme": (-0.160060243662, -0.004461018099, 0.270277455465, 0.08193108089),
    "probe_r2": (0.595949412521, 0.848168490508, 0.657744838439, 1),
    "cka": (0.663314246345, 0.523207499031, 0.509623117228, 0.694359533650),
}
DATA = ("iris", "wine", "digits", "digits50")
INTENSITIES = {
    "h_ledoit_wolf": (0.007578801454, 0.010511181856, 0.008928469809, 0.223970250208),
    "h_oas": (0.020236645005, 0.012131302517, 0.009921599071, 0.259423035261),
}
RIDGE_ERRORS = (43.0985721843, 20.8440829584, 612.4269652315, 57.9174791844)
RIDGE_R2 = (0.569014278157, 0.822181914262, 0.622643176634, -0.173903809160)
IRIS32 = {
    "h_ledoit_wolf": 1.177842480392,
    "h_oas": 1.149033453826,
    "logme": -0.160060256521,
    "probe_r2": 0.595949401030,
    "cka": 0.663314247957,
}
TRANSFORMER_RANKER = {"h_ledoit_wolf": 1.177842480406727}  # its own test's value; takes a root in float32


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    features, labels = getattr(datasets, f"load_{name.removesuffix('50')}")(return_X_y=True)
    return (features[:50], labels[:50]) if name == "digits50" else (features, labels)


def moments_of(features: np.ndarray, targets: np.ndarray, counts: np.ndarray | None = None) -> LayerMoments:
    """Moments of pooled features (n, d) and targets (n, c); the token moments are left empty."""
    x, y, empty = torch.from_numpy(features), torch.from_numpy(targets), torch.zeros(0)
    norms, n = x.square().sum(1), len(x)
    return LayerMoments(
        *(x.T @ x / n, x.T @ y / n, x.mean(0), empty, empty, empty, empty, y.mean(0), y.T @ y / n, n, 0),
        class_counts=None if counts is None else torch.from_numpy(counts),
        pooled_norm_fourth_power=norms.square().mean(),
        pooled_norm_squared_pooled=norms @ x / n,
    )


def of_classes(features: np.ndarray, labels: np.ndarray, num_classes: int | None = None) -> LayerMoments:
    one_hot = np.eye(num_classes or labels.max() + 1)[labels]
    return moments_of(features, one_hot, one_hot.sum(0))


def folds_of(
    features: np.ndarray, labels: np.ndarray, num_folds: int = 5
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Averages of each fold, rows i mod 5, as cache.py stores them."""
    parts = [of_classes(features[i::num_folds], labels[i::num_folds], labels.max() + 1) for i in range(num_folds)]
    names = [field.name for field in dataclasses.fields(LayerMoments) if field.name.startswith(("pooled", "label"))]
    counts = torch.tensor([part.num_samples for part in parts], dtype=torch.float64)
    return {f"fold_{name}": torch.stack([getattr(part, name) for part in parts]) for name in names}, counts


@pytest.mark.parametrize("name", DATA)
def test_golden_values(name):
    features, labels = load(name)
    moments = of_classes(features, labels)
    scores = feature_scores(moments).scores
    at = DATA.index(name)
    for score, values in GOLDEN.items():
        assert scores[score]["value"] == pytest.approx(values[at], rel=1e-10, abs=1e-10), score
    for score, values in INTENSITIES.items():
        assert SHRINKAGES[score](moments, moments.pooled_covariance) == pytest.approx(values[at], abs=1e-10), score
    assert {score for score, entry in scores.items() if entry["meaningless"]} == (
        {"probe_r2"} if name == "digits50" else set()
    )


def test_cka_is_that_of_the_gram_matrices():
    """By its definition, over pairs of texts."""
    features, labels = load("wine")
    centring = np.eye(len(labels)) - 1 / len(labels)
    x, y = (centring @ array @ array.T @ centring for array in (features, np.eye(3)[labels]))
    found = feature_scores(of_classes(features, labels)).scores["cka"]["value"]
    assert found == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)


@pytest.mark.parametrize("name", DATA)
def test_ridge_over_folds_is_scikit_learns(name):
    """At alpha = 1 without scaling the golden values; scaled, with alpha chosen, a fit on the rows themselves."""
    features, labels = load(name)
    pairs, at = fold_moments(*folds_of(features, labels)), DATA.index(name)
    judged = [fit_ridge(train, test, eigenbasis(train, scaled=False), (1.0,)) for train, test in pairs]
    error, baseline = sum(part.error for part in judged), sum(part.baseline for part in judged)
    assert error == pytest.approx(RIDGE_ERRORS[at], rel=1e-10)
    assert 1 - error / baseline == pytest.approx(RIDGE_R2[at], abs=1e-10)
    inside = np.arange(len(labels)) % 5 == 0
    one_hot = np.eye(labels.max() + 1)[labels]
    model = make_pipeline(StandardScaler(), Ridge(10)).fit(features[~inside], one_hot[~inside])
    direct = np.square(one_hot[inside] - model.predict(features[inside])).sum()
    assert fit_ridge(*pairs[0], eigenbasis(pairs[0][0]), (10.0,)).error == pytest.approx(direct, rel=1e-9)


def test_alpha_is_that_of_generalised_cross_validation():
    """scikit-learn's leave-one-out search agrees where the rows are many, and the judging rows have no say."""
    features, labels = load("digits")
    train, test = fold_moments(*folds_of(features, labels))[0]
    chosen = fit_ridge(train, test, eigenbasis(train))
    rows = np.arange(len(labels)) % 5 != 0
    one_hot = np.eye(10)[labels[rows]]
    centred = StandardScaler().fit_transform(features[rows])
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    errors: dict[float, float] = {}
    for alpha in 10.0 ** np.arange(-1, 6):
        hat = (left * (values**2 / (values**2 + alpha))) @ left.T + 1 / len(centred)
        residual = one_hot - hat @ one_hot
        errors[alpha] = (residual**2).sum() / (1 - np.trace(hat) / len(centred)) ** 2
    best = min(errors, key=lambda alpha: errors[alpha])
    assert chosen.error == pytest.approx(fit_ridge(train, test, eigenbasis(train), (best,)).error, rel=1e-12)


# ------------------------------------------------------------------ through cache.py
@pytest.fixture(scope="module")
def iris_model(tmp_path_factory):
    """A model whose embeddings are the flowers of iris, one word each, and the labelled words."""
    features, labels = load("iris")
    folder = tmp_path_factory.mktemp("iris")
    pairs = [(first, second) for first in string.ascii_lowercase for second in string.ascii_lowercase][: len(features)]
    words = ["".join(pair) for pair in pairs]
    vocabulary = {token: i for i, token in enumerate([*words, *sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"])}
    merges: Any = pairs  # the annotation is narrower than what it takes
    Qwen2Tokenizer(vocabulary, merges=merges, eos_token="<end>").save_pretrained(folder / "model")
    config = Qwen2Config(
        vocab_size=512, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[: len(features)] = torch.from_numpy(features).float()
    model.save_pretrained(folder / "model")
    rows = [{"text": word, "label": f"class {label}"} for word, label in zip(words, labels, strict=True)]
    return folder, write_rows(folder / "flowers.jsonl", rows)


def test_golden_values_from_moments_of_the_pass(iris_model):
    """TransformerRanker's own test feeds iris in float32; here it goes through a model, layer 0, and cache.py."""
    folder, rows = iris_model
    config = configure(
        cache,
        **{"model_name": str(folder / "model"), "dataset_name": str(rows), "split": "all", "folds": "all"},
        results_dir=folder / "results",
    )
    cache.main(config)
    path = cache.config_path(config)
    with open_tensors(path) as (file, metadata):
        moments = load_layer(file, metadata, 0, torch.device("cpu"))
    assert moments.class_counts is not None and moments.class_counts.tolist() == [50, 50, 50]
    scores = feature_scores(moments, None, load_folds(path, 0, torch.device("cpu"))).scores
    for name, value in {**IRIS32, **TRANSFORMER_RANKER}.items():
        assert scores[name]["value"] == pytest.approx(value, abs=1e-10), name
    assert 0.4 < scores["ridge_r2"]["value"] < 0.6  # other folds than the golden value's
    assert json.dumps(scores, allow_nan=False)


# ------------------------------------------------------------------ under permuted labels
def made_up(num: int, width: int, seed: int) -> np.ndarray:
    """Correlated features of unequal scale with a mean."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((width, width)) * np.logspace(0, -1.5, width)
    return random.standard_normal((num, width)) @ mix + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("over_folds", [True, False])
def test_null_of_ridge_at_one_alpha(over_folds, monkeypatch):
    monkeypatch.setattr(utils.algebra.ridge, "ALPHAS", (10.0,))
    random = np.random.default_rng(0)
    features, others = made_up(200, 12, 1), made_up(150, 12, 1)
    labels, other_labels = random.choice(3, 200), random.choice(3, 150)

    def value() -> dict[str, float]:
        moments = of_classes(features, random.permutation(labels))
        pairs = [(whole_split(moments), whole_split(of_classes(others, random.permutation(other_labels))))]
        pairs = fold_moments(*folds_of(features, random.permutation(labels))) if over_folds else pairs
        return ridge(pairs, moments.label_covariance)[0]

    told, values = value(), [value()["value"] for _ in range(300)]
    mean, std = np.mean(values), np.std(values)
    assert abs(told["null_mean"] - mean) < 4 * std / np.sqrt(300)
    assert abs(told["null_std"] / std - 1) < 0.2
    assert told["z"] == pytest.approx((told["value"] - told["null_mean"]) / told["null_std"])
