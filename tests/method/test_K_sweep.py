"""K_sweep.py: eigenproblems against scipy and mpmath, scores against their definitions on the data."""

import dataclasses

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

import K_sweep
from tests.method.toy import FRACTIONS, make_data, moments_of, solve, sweep, tensor
from utils.algebra.linalg import Noise
from utils.algebra.scores import EXCESS, SCORES

SOME = (0.05, 0.3, 0.6, 0.95)


def projector(vectors) -> np.ndarray:
    basis = scipy.linalg.orth(np.asarray(vectors), rcond=1e-13)
    return basis @ basis.T


# ------------------------------------------------------------------ the eigenproblem
def solution(factor, denominator):
    solved = K_sweep.solve_generalized_eigenproblem(tensor(factor), tensor(denominator))
    return solved.vectors, solved.eigenvalues, solved.whitener


def autoregression(moments) -> torch.Tensor:
    """The eigenvectors of the autoregression problem with positive eigenvalues."""
    return solution(moments.prefix_next_cross_moment, moments.prefix_second_moment)[0]


@pytest.mark.parametrize(("rank", "num_columns"), [(20, 3), (20, 30), (1, 3), (7, 3), (19, 3)])
def test_solver_equals_scipy(rank, num_columns):
    """Compares them on the range of C; with fewer samples than dimensions C is singular, and the rank is found."""
    random = np.random.default_rng(rank)
    samples = random.normal(size=(max(rank, 2 * rank * (rank == 20)), 20))
    denominator, factor = samples.T @ samples, samples.T @ random.normal(size=(len(samples), num_columns))
    vectors, eigenvalues, whitener = solution(factor, denominator)
    assert whitener.shape[1] == rank
    basis = scipy.linalg.orth(samples.T)
    projected = basis.T @ factor @ factor.T @ basis, basis.T @ denominator @ basis
    expected, expected_vectors = (found[..., ::-1] for found in scipy.linalg.eigh(*projected))
    count = min(rank, num_columns)
    np.testing.assert_allclose(eigenvalues, expected[:count], rtol=1e-8)
    np.testing.assert_allclose(vectors.T @ denominator @ vectors.numpy(), np.eye(count), atol=1e-8)
    if rank == 20:
        signs = np.sign((vectors.numpy() * (denominator @ basis @ expected_vectors[:, :count])).sum(0))
        np.testing.assert_allclose(vectors * signs, basis @ expected_vectors[:, :count], atol=1e-9)


def test_solver_against_forty_digits():
    """Hilbert matrix of order 6 (condition 1.5e7), factor of two columns."""
    with mpmath.workdps(40):
        hilbert = mpmath.hilbert(6)
        factor = mpmath.matrix([[1, 2], [0, 1], [3, -1], [1, 1], [-2, 0], [1, 4]])
        small = factor.T * hilbert**-1 * factor  # same non-zero eigenvalues as C^-1 F F'
        expected, columns = mpmath.eigsy(small)
        vectors = hilbert**-1 * factor * columns  # C^-1 F q, to be scaled to C-norm 1
        norms = [mpmath.sqrt((vectors[:, j].T * hilbert * vectors[:, j])[0]) for j in range(2)]
        expected_vectors = np.array([[float(vectors[i, j] / norms[j]) for j in (1, 0)] for i in range(6)])
        expected_values = [float(expected[1]), float(expected[0])]
    denominator = scipy.linalg.hilbert(6)
    found, eigenvalues, _ = solution([[float(v) for v in row] for row in factor.tolist()], denominator)
    np.testing.assert_allclose(eigenvalues, expected_values, rtol=1e-8)
    signs = np.sign((found.numpy() * expected_vectors).sum(0))
    np.testing.assert_allclose(found * signs, expected_vectors, rtol=1e-6, atol=1e-6 * np.abs(expected_vectors).max())


def test_autoregression_is_the_reduced_rank_regression():
    """span V_k gives the least loss that any k-dimensional bottleneck of the prefixes can reach (Eckart-Young)."""
    _, _, states = make_data(50, 12, 2)
    prefix, following = states.cumsum(0)[:-1] / np.arange(1, len(states))[:, None], states[1:]
    v, _, _ = solution(prefix.T @ following, prefix.T @ prefix)
    fitted = prefix @ np.linalg.lstsq(prefix, following, rcond=None)[0]
    singular_values = np.linalg.svd(fitted, compute_uv=False)
    for k in (1, 4, 9):
        inside = prefix @ v[:, :k].numpy()
        loss = np.square(following - inside @ np.linalg.lstsq(inside, following, rcond=None)[0]).sum()
        best = np.square(following - fitted).sum() + np.square(singular_values[k:]).sum()
        assert loss == pytest.approx(best, rel=1e-9)


def test_ties_of_the_autoregressive_problem_are_ordered_by_variance():
    random = np.random.default_rng(2)
    root = random.normal(size=(10, 10)) * np.logspace(0, -1, 10)
    denominator, factor = tensor(root.T @ root), tensor(random.normal(size=(10, 3)) @ random.normal(size=(3, 10)))
    complete = K_sweep.complete_by_variance(K_sweep.solve_generalized_eigenproblem(factor, denominator))
    np.testing.assert_allclose(complete.T @ denominator @ complete, np.eye(10), atol=1e-9)
    np.testing.assert_allclose(factor.T @ complete[:, 3:], 0, atol=1e-9)
    assert torch.all(complete[:, 3:].norm(dim=0).diff() > 0)  # C-norm 1: shorter means more variance


# ------------------------------------------------------------------ the reference
def generalized_eigenvectors(factor, denominator) -> np.ndarray:
    """All of F F' u = lambda C u by scipy, the largest first; u is in the range of C scaled to unit diagonal."""
    factor, denominator = factor.numpy(), denominator.numpy()
    scale = 1 / np.sqrt(np.diag(denominator))
    basis = scale[:, None] * scipy.linalg.orth(denominator * scale * scale[:, None], rcond=1e-12)
    projected = basis.T @ factor @ factor.T @ basis, basis.T @ denominator @ basis
    return basis @ scipy.linalg.eigh(*projected)[1][:, ::-1]


@pytest.mark.parametrize("num_samples", [300, 9])  # more and fewer texts than dimensions
@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5, 1.0])
def test_score_is_the_projection_ratio_of_scipy_s_eigenvectors(num_samples, fraction):
    """Covers cases without ties, as many label directions as dimensions or texts: U is unique."""
    random = np.random.default_rng(3)
    features, _, states = make_data(num_samples, 12, 3)
    moments = moments_of(features, random.normal(size=(num_samples, 12)), states)
    u = generalized_eigenvectors(moments.pooled_label_cross_moment, moments.pooled_second_moment)
    v = generalized_eigenvectors(moments.prefix_next_cross_moment, moments.prefix_second_moment)
    assert u.shape[1] == min(num_samples, 12)
    k_u, k_v = (max(1, int(fraction * vectors.shape[1])) for vectors in (u, v))
    for order, step in (("smallest", -1), ("largest", 1)):
        first_u, first_v = u[:, ::step][:, :k_u], v[:, ::step][:, :k_v]
        expected = np.square(projector(first_v) @ first_u).sum() / np.square(first_u).sum()
        found = solve(moments, fractions=(fraction,), eigenvectors=order)["ntps"].item()
        assert found == pytest.approx(expected, abs=1e-8), order
    assert K_sweep.ntps_reference(moments, fraction) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("num_samples", "num_classes"), [(300, 3), (300, 20), (10, 3), (15, 2)])
def test_fast_score_equals_the_reference(num_samples, num_classes):
    """Full rank and fewer texts than dimensions, few label directions (most of U is tied) and many."""
    features, targets, states = make_data(num_samples, 16, min(num_classes, num_samples), seed=num_samples)
    fast = sweep(features, targets, states, fractions=SOME, num_null_draws=2)["ntps"]
    moments = moments_of(features, targets, states)
    expected = [K_sweep.ntps_reference(moments, fraction) for fraction in SOME]
    np.testing.assert_allclose(fast, expected, atol=1e-8)


# ------------------------------------------------------------------ the score
@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=100, deadline=None)
def test_tie_weights_are_the_shares_of_an_average_over_the_bases_of_each_eigenspace(seed, largest):
    """Equal eigenvalues, some of them zero, share the columns that U_k takes of their space in equal parts."""
    random = np.random.default_rng(seed)
    sizes, num_tied = random.integers(1, 4, random.integers(1, 5)), int(random.integers(0, 6))
    distinct = np.sort(random.uniform(0.1, 1, len(sizes)))[::-1]
    eigenvalues = np.repeat(distinct, sizes) * (1 + 1e-14 * random.standard_normal(sizes.sum()))
    space = np.append(np.repeat(np.arange(len(sizes)), sizes), np.full(num_tied, len(sizes)))
    order, ks = space if largest else space[::-1], range(1, len(space) + 1)
    expected = np.array([[(order[:k] == own).sum() / (space == own).sum() for own in space] for k in ks])
    weights = K_sweep.tie_weights(list(ks), tensor(eigenvalues), num_tied, largest).numpy()
    np.testing.assert_allclose(weights[:, :-1], expected[:, : len(eigenvalues)], atol=3e-16)
    np.testing.assert_allclose(weights[:, -1], expected[:, -1] if num_tied else 0, atol=3e-16)


def test_fractions_are_floors_of_the_rank():
    """Includes a product of floats just below a whole number: .7 * 90 is 62.99999999999999."""
    assert len(FRACTIONS) == 19
    for rank in (1, 19, 20, 90, 100, 180, 896, 4096):
        assert K_sweep.num_directions(FRACTIONS, rank) == [max(1, i * rank // 20) for i in range(1, 20)]
    features, targets, states = make_data(400, 90, 90, decades=1.0)  # 63 columns of U, none of them tied
    moments = moments_of(features, targets, states)
    found = solve(moments, fractions=(0.7,))
    assert K_sweep.ntps_reference(moments, 0.7) == pytest.approx(found["ntps"].item(), abs=1e-8)
    assert found["chance"].item() == pytest.approx(63 / 90)


# ------------------------------------------------------------------ coordinates
@pytest.mark.parametrize("coordinates", ["standardized", "prefix_standardized"])
def test_standardized_coordinates_are_those_of_scaled_data(coordinates):
    """In any units; a coordinate without variance, or always zero, keeps its scale, and so do all probes."""
    units = 10 ** np.random.default_rng(3).uniform(-3, 3, 12)
    splits = make_data(300, 12, 3), make_data(100, 12, 3, seed=1)
    own, held_out = ((features * units, targets, states * units) for features, targets, states in splits)
    features, targets, states = own
    features[:, 5], states[:, 5] = 2.0, 0.0
    moments = moments_of(*own)
    variances = moments.prefix_second_moment.diagonal()
    error = 1e-9 * variances.sqrt()[:, None] * variances.sum().sqrt()  # of products, and of rounded states
    moments = dataclasses.replace(
        moments,
        pooled_rounding=Noise(1e-12 * moments.pooled_second_moment.diagonal(), max_rank=300),
        prefix_rounding=Noise(1e-12 * variances, error, 600),
        next_rounding=Noise(error=error),
    )
    size = features.std(0) if coordinates == "standardized" else variances.sqrt().numpy()
    scale = np.where(np.arange(12) == 5, 1, 1 / np.maximum(size, 1e-9))
    for options in ({}, {"center": True}, {"subspace": "pca"}, {"subspace": "random"}, {"eigenvectors": "smallest"}):
        found, plain = (
            solve(moments, moments_of(*held_out), coordinates=name, **options) for name in (coordinates, "as_is")
        )
        expected = sweep(features * scale, targets, states * scale, **options)
        assert (found["rank_u"], found["rank_v"]) == (plain["rank_u"], plain["rank_v"])
        for name in (*SCORES, *EXCESS, "rank_u", "rank_v"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-8, atol=1e-8, err_msg=name)
        for name in ("probe_mse", "probe_r2", "probe_mse_held_out", "probe_r2_held_out"):
            assert found[name] == pytest.approx(plain[name], rel=1e-8)
        assert (plain["ntps_label"] - found["ntps_label"]).abs().max() > 0.01


# ------------------------------------------------------------------ excess loss, bounds, probe
def least_squares_loss(features, targets) -> float:
    """Mean over texts of the squared error, summed over labels, of a probe with intercept."""
    residual = targets - LinearRegression().fit(features, targets).predict(features)
    return np.square(residual).sum(1).mean()


def excess_and_retained(features, targets, v) -> tuple[float, float]:
    """The loss that a probe with intercept adds within the span of V, and the share of explained variance it keeps."""
    best = least_squares_loss(features, targets)
    excess = least_squares_loss(features @ np.asarray(v), targets) - best
    return excess, 1 - excess / (np.square(targets - targets.mean(0)).sum(1).mean() - best)


@pytest.mark.parametrize("num_samples", [300, 20])  # more and fewer texts than dimensions
def test_excess_is_the_difference_of_two_least_squares_losses(num_samples):
    features, targets, states = make_data(num_samples, 24, 4)
    result, v = sweep(features, targets, states), autoregression(moments_of(features, targets, states))
    for i, k in enumerate(K_sweep.num_directions(FRACTIONS, 24)):
        excess, retained = excess_and_retained(features, targets, v[:, :k])
        assert result["excess_loss"][i].item() == pytest.approx(excess, abs=1e-7)
        assert result["retained"][i].item() == pytest.approx(retained, abs=1e-7)


@pytest.mark.parametrize("num_samples", [300, 10])
def test_euclidean_bounds_are_those_of_the_extreme_eigenvalues(num_samples):
    """s^2 times an extreme eigenvalue of Sigma times |U - P U|^2, all dense; the smallest is 0 with fewer texts."""
    features, targets, states = make_data(num_samples, 16, 4, decades=1.0)
    found, moments = sweep(features, targets, states), moments_of(features, targets, states)
    assert torch.all(found["excess_lower_euclidean"] <= found["excess_loss"] + 1e-12)
    assert torch.all(found["excess_loss"] <= found["excess_upper_euclidean"] + 1e-12)
    if num_samples < 16:  # U depends on the axes in which a singular Sigma is whitened
        assert not found["excess_lower_euclidean"].any()
        return
    sigma, cross, v = np.cov(features.T, bias=True), moments.pooled_label_covariance.numpy(), autoregression(moments)
    values, u = scipy.linalg.eigh(cross @ cross.T, sigma)
    outside = [u[:, -3:] - projector(v[:, :k]) @ u[:, -3:] for k in K_sweep.num_directions(FRACTIONS, 16)]
    missing, (smallest, *_, largest) = np.square(outside).sum((1, 2)), np.linalg.eigvalsh(sigma)
    np.testing.assert_allclose(found["excess_upper_euclidean"], values[-1] * largest * missing, rtol=1e-7)
    np.testing.assert_allclose(found["excess_lower_euclidean"], values[-3] * smallest * missing, rtol=1e-7)
    assert smallest > 0


@pytest.mark.parametrize("targets_are", ["classes", "numbers"])
def test_probe_equals_scikit_learn_on_both_splits(targets_are):
    features, targets, states = make_data(400, 12, 4, seed=3)
    if targets_are == "numbers":
        targets = features[:, :1] - 2 * features[:, 1:2] + np.random.default_rng(0).normal(size=(400, 1))
    train, test = slice(0, 250), slice(250, None)
    result = solve(*(moments_of(features[rows], targets[rows], states) for rows in (train, test)))
    probe = LinearRegression().fit(features[train], targets[train])
    for suffix, rows in (("", train), ("_held_out", test)):
        error = np.square(targets[rows] - probe.predict(features[rows])).mean()
        assert result[f"probe_mse{suffix}"] == pytest.approx(error, rel=1e-6)
        variance = np.square(targets[rows] - targets[rows].mean(0)).mean()
        assert result[f"probe_r2{suffix}"] == pytest.approx(1 - error / variance, rel=1e-6)


# ------------------------------------------------------------------ other subspaces than V
@pytest.mark.parametrize("center", [False, True])
def test_pca_is_the_paper_score_and_the_probe_within_the_first_principal_directions(center):
    features, targets, states = make_data(300, 16, 4, seed=2)
    result = sweep(features, targets, states, subspace="pca", center=center)
    shifted, labels = features - center * features.mean(0), targets - center * targets.mean(0)
    directions = np.linalg.eigh(shifted.T @ shifted)[1][:, ::-1]
    cross = shifted.T @ labels
    u = scipy.linalg.eigh(cross @ cross.T, shifted.T @ shifted)[1][:, -3 if center else -4 :]  # c - 1 once centred
    for i, k in enumerate(K_sweep.num_directions(FRACTIONS, 16)):
        inside = np.square(projector(directions[:, :k]) @ u).sum() / np.square(u).sum()
        assert result["ntps_label"][i].item() == pytest.approx(inside, abs=1e-8)
        _, retained = excess_and_retained(features, targets, directions[:, :k])
        assert result["retained"][i].item() == pytest.approx(retained, abs=1e-8)


def test_a_random_subspace_is_at_chance_and_the_same_for_a_seed():
    features, targets, states = make_data(300, 16, 4, seed=2)
    moments = moments_of(features, targets, states)

    def of_seed(seed, layer=0):
        return solve(moments, layer=layer, subspace="random", seed=seed, num_null_draws=2)

    scores = torch.stack([of_seed(seed)["ntps_label"] for seed in range(200)])
    found = of_seed(0)
    assert torch.all((scores.mean(0) - found["chance"]).abs() < 5 * scores.std(0) / 200**0.5)
    assert torch.equal(found["ntps_label"], scores[0])
    few = moments_of(features, targets, states[:8])  # seven prefixes: as many directions as autoregression has
    assert {solve(few, subspace=of)["rank_v"] for of in ("autoregression", "pca", "random")} == {7}
    assert not torch.allclose(of_seed(0, layer=1)["ntps_label"], scores[0], atol=1e-3)
