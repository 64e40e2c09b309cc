"""Scores from moments against TransformerRanker, LogME, scikit-learn (golden values), and against real permutations."""

import numpy as np
import pytest
from sklearn import datasets
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import utils.algebra.ridge
from tests.method.toy import make_data, moments_of
from utils.algebra.features import feature_scores
from utils.algebra.moments import LayerMoments, PooledMoments
from utils.algebra.ridge import fit_ridge, fold_pairs, ridge

# Made with TLL (H-score), thuml/LogME, scikit-learn (shrinkage, least squares) on data sets of scikit-learn.
# digits50: the first 50 rows, fewer than features. iris32: the features rounded to float32, as TransformerRanker's own
# test has them; its H-score with Ledoit-Wolf shrinkage, which takes a root in float32, is 1.177842480406727.
DATA = ("iris", "wine", "digits", "digits50", "iris32")
GOLDEN = {
    "h_ledoit_wolf": (1.177842499331, 0.766097564722, 5.851432997954, 7.330381635520, 1.177842480392),
    "h_oas": (1.149033469042, 0.759006542205, 5.846727566302, 7.167939083889, 1.149033453826),
    "logme": (-0.160060243662, -0.004461018099, 0.270277455465, 0.08193108089, -0.160060256521),
    "probe_r2": (0.595949412521, 0.848168490508, 0.657744838439, 1, 0.595949401030),
    "cka": (0.663314246345, 0.523207499031, 0.509623117228, 0.694359533650, 0.663314247957),
}


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    features, labels = getattr(datasets, f"load_{name.rstrip('0123456789')}")(return_X_y=True)
    rows = slice(50 if name == "digits50" else None)
    return features[rows].astype(np.float32 if name == "iris32" else float).astype(float), labels[rows]


def of_classes(features: np.ndarray, labels: np.ndarray, num_classes: int | None = None) -> LayerMoments:
    one_hot = np.eye(num_classes or labels.max() + 1)[labels]
    return moments_of(features, one_hot, class_counts=one_hot.sum(0).tolist())


def folds_of(features: np.ndarray, labels: np.ndarray, num_folds: int = 5) -> list[PooledMoments]:
    """The moments of each fold, rows i mod 5."""
    num_classes = labels.max() + 1
    rows = [slice(i, None, num_folds) for i in range(num_folds)]
    return [of_classes(features[fold], labels[fold], num_classes) for fold in rows]


@pytest.mark.parametrize("name", DATA)
def test_golden_values(name):
    features, labels = load(name)
    moments = of_classes(features, labels)
    scores, _ = feature_scores(moments)
    at = DATA.index(name)
    for score, values in GOLDEN.items():
        assert scores[score]["value"] == pytest.approx(values[at], rel=1e-10, abs=1e-10), score
    meaningless = [score for score, entry in scores.items() if entry["meaningless"]]
    assert meaningless == (["probe_r2"] if name == "digits50" else [])


@pytest.mark.parametrize("alpha", [1.0, 10.0])
@pytest.mark.parametrize("name", DATA)
def test_ridge_over_folds_is_scikit_learns(name, alpha, monkeypatch):
    """A fit on the rows themselves, and its error on those of each fold."""
    monkeypatch.setattr(utils.algebra.ridge, "ALPHAS", (alpha,))
    features, labels = load(name)
    one_hot, folds = np.eye(labels.max() + 1)[labels], np.arange(len(labels)) % 5
    for fold, (train, test) in enumerate(fold_pairs(folds_of(features, labels))):
        inside = folds == fold
        model = make_pipeline(StandardScaler(), Ridge(alpha)).fit(features[~inside], one_hot[~inside])
        direct = np.square(one_hot[inside] - model.predict(features[inside])).sum()
        found, mean = fit_ridge(train, test), one_hot[~inside].mean(0)
        assert found.error == pytest.approx(direct, rel=1e-9)
        assert found.baseline == pytest.approx(np.square(one_hot[inside] - mean).sum(), rel=1e-9)


def test_alpha_is_that_of_generalised_cross_validation(monkeypatch):
    """Computes it by definition, with the hat matrix of the training rows; the judging rows take no part."""
    features, labels = load("digits")
    train, test = fold_pairs(folds_of(features, labels))[0]
    chosen = fit_ridge(train, test).error
    rows = np.arange(len(labels)) % 5 != 0
    one_hot = np.eye(10)[labels[rows]]
    left, values, _ = np.linalg.svd(StandardScaler().fit_transform(features[rows]), full_matrices=False)
    errors, found = {}, {}
    for alpha in 10.0 ** np.arange(-1, 6):
        hat = (left * (values**2 / (values**2 + alpha))) @ left.T + 1 / len(left)
        errors[alpha] = ((one_hot - hat @ one_hot) ** 2).sum() / (1 - np.trace(hat) / len(left)) ** 2
        monkeypatch.setattr(utils.algebra.ridge, "ALPHAS", (alpha,))
        found[alpha] = fit_ridge(train, test).error
    best = min(errors, key=lambda alpha: errors[alpha])
    assert chosen == pytest.approx(found[best], rel=1e-12) and chosen != pytest.approx(found[1e5], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("over_folds", [True, False])
def test_null_of_ridge_at_one_alpha(over_folds, monkeypatch):
    monkeypatch.setattr(utils.algebra.ridge, "ALPHAS", (10.0,))
    random = np.random.default_rng(0)
    features, others = (make_data(num, 12, 3, seed=1, signal=0, decades=1.5)[0] for num in (200, 150))
    labels, other_labels = random.choice(3, 200), random.choice(3, 150)

    def value() -> dict[str, float]:
        moments = of_classes(features, random.permutation(labels))
        pairs = [(moments, of_classes(others, random.permutation(other_labels)))]
        pairs = fold_pairs(folds_of(features, random.permutation(labels))) if over_folds else pairs
        return ridge(pairs, moments.label_covariance)[0]

    told, values = value(), [value()["value"] for _ in range(300)]
    mean, std = np.mean(values), np.std(values)
    assert abs(told["null_mean"] - mean) < 4 * std / np.sqrt(300)
    assert abs(told["null_std"] / std - 1) < 0.2
    assert told["z"] == pytest.approx((told["value"] - told["null_mean"]) / told["null_std"])
