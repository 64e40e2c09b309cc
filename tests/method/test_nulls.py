"""utils/algebra/nulls.py: against real permutations of the labels, and regressions on dense random projections."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.linear_model import LinearRegression

import cache
import K_sweep
from tests.conftest import configure
from tests.method.toy import make_data, moments_of, sweep, tensor
from utils.algebra.nulls import draw_permuted_factors
from utils.algebra.scores import NULL_SCORES

NUM_DRAWS = 400


@pytest.mark.slow
@pytest.mark.parametrize(("n", "d", "c"), [(400, 30, 5), (60, 40, 3), (25, 40, 3)])
def test_closed_form_null_agrees_with_real_permutations(n, d, c):
    features, targets, states = make_data(n, d, c, seed=7)
    drawn = sweep(features, targets, states, num_null_draws=1000)["null_draws"]
    random = np.random.default_rng(0)
    real = [sweep(features, random.permutation(targets), states, num_null_draws=2) for _ in range(200)]
    for name in NULL_SCORES:
        permutations, draws = np.stack([found[name] for found in real]), drawn[name].numpy()
        standard_error = permutations.std(0) / np.sqrt(200) + draws.std(0) / np.sqrt(1000) + 1e-9
        assert np.all(np.abs(permutations.mean(0) - draws.mean(0)) < 5 * standard_error), name
        spread, drawn_spread = (np.diff(np.quantile(of.mean(1), [0.1, 0.9])) for of in (permutations, draws))
        assert spread == pytest.approx(drawn_spread, rel=0.25, abs=1e-9), name  # quantiles: some tails are long


def test_draws_have_the_known_mean():
    """E tr(S' Sigma^-1 S) = rank tr(label covariance) / (n - 1), exactly, under permuted labels."""
    p = np.array([0.5, 0.3, 0.2])
    label_covariance = tensor(np.diag(p) - np.outer(p, p))
    for n, rank in ((200, 30), (40, 30), (31, 30), (33, 30)):
        factors, bases = draw_permuted_factors(rank, n, label_covariance, 4000, np.random.default_rng(0))
        totals = factors.square().sum((1, 2))
        expected = rank * label_covariance.trace() / (n - 1)
        assert abs(totals.mean() - expected) < 5 * totals.std() / 4000**0.5 + 1e-12
        np.testing.assert_allclose(bases.mT @ bases, torch.eye(2).expand(4000, 2, 2), atol=1e-9)


@pytest.mark.parametrize("center", [False, True])
def test_null_of_states_with_a_mean_is_that_of_real_permutations(center):
    """B contains mu p' for any labels, here along the one column of V; centred, it does not."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(120, 8)), random.integers(0, 3, 120)
    features[:, 0] = 1.5 * features[:, 0] + 1.5
    targets, states = np.eye(3)[labels], make_data(120, 8, 3)[2]
    options = {"center": center, "subspace": "pca", "fractions": (0.125, 0.5), "num_null_draws": 400}
    drawn = sweep(features, targets, states, **options)["null_draws"]["ntps_label"].numpy()
    options["num_null_draws"] = 2
    real = np.stack([sweep(features, random.permutation(targets), states, **options)["ntps_label"] for _ in range(100)])
    error = real.std(0) / 10 + drawn.std(0) / 20
    assert np.all(np.abs(real.mean(0) - drawn.mean(0)) < 4 * error)
    assert np.all(np.abs(real.std(0) / drawn.std(0) - 1) < 0.3)


def test_random_subspaces_equal_dense_projections():
    """Means and deviations of scores of random V by their definition, within four standard errors of the draws."""
    features, targets, states = make_data(80, 12, 3, decades=1.0)
    moments = moments_of(features, targets, states)
    config = configure(K_sweep, fractions=(0.25, 0.5, 0.75), num_null_draws=2)
    found = K_sweep.sweep_layer(moments, None, config, 0, num_random_draws=NUM_DRAWS).random
    ks = K_sweep.num_directions(config.fractions, 12)
    second, cross = features.T @ features / 80, features.T @ targets / 80
    u = scipy.linalg.eigh(cross @ cross.T, second)[1][:, -3:]
    whole = LinearRegression().fit(features, targets)
    explained = np.square(whole.predict(features) - targets.mean(0)).sum()
    random, draws = np.random.default_rng(5), dict[str, list]({"ntps_label": [], "retained": []})
    for _ in range(NUM_DRAWS):
        v = random.normal(size=(12, 12))
        inside, euclidean = [], []
        for k in ks:
            part = features @ v[:, :k]
            predicted = LinearRegression().fit(part, targets).predict(part)
            inside.append(np.square(predicted - targets.mean(0)).sum() / explained)
            euclidean.append(np.square(scipy.linalg.orth(v[:, :k]).T @ u).sum() / np.square(u).sum())
        draws["retained"].append(inside)
        draws["ntps_label"].append(euclidean)
    for name, rows in draws.items():
        expected, whole = np.mean(rows, axis=0), np.mean(rows, axis=1)
        error = 4 * np.sqrt(2 / NUM_DRAWS)
        assert (np.abs(np.array(found[name]["fractions"]) - expected) < error * np.std(rows, axis=0) + 1e-12).all()
        assert found[name]["mean"] == pytest.approx(whole.mean(), abs=error * whole.std())
        assert found[name]["std"] == pytest.approx(whole.std(), rel=4 / np.sqrt(NUM_DRAWS))


def test_a_run_says_how_far_v_is_from_random_subspaces(names, tmp_path):
    """The comparison exists at the last layer only, not for a control of V, and not without random draws."""
    names = {**names, "results_dir": tmp_path}
    cache.main(configure(cache, **names))

    def run(**options) -> dict:
        return K_sweep.main(configure(K_sweep, **names, picture=False, overwrite=True, **options))

    result = run()
    assert [("random" in layer) for layer in result["layers"]] == [False, False, True]
    for name in NULL_SCORES:
        score = result["score"][name]
        assert score["random_z"] == pytest.approx((score["value"] - score["random_mean"]) / score["random_std"])
        assert score["random_mean"] == pytest.approx(np.mean(result["layers"][-1]["random"][name]["fractions"]))
    assert run()["score"] == result["score"]  # the same for a seed
    assert run(fractions=(1.0,))["score"]["retained"]["random_z"] is None  # no spread: V spans everything
    for options in ({"subspace": "pca"}, {"num_random_draws": 0}):
        assert "random_z" not in run(**options)["score"]["retained"]
    with pytest.raises(ValueError, match="at least 2"):
        K_sweep.Config(num_random_draws=1)
