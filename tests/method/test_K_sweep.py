"""K_sweep.py: eigenproblems against scipy and mpmath, scores against their definitions on the data."""

import dataclasses
import math

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

import K_sweep
from tests.conftest import configure
from utils.algebra.linalg import NestedBasis
from utils.algebra.moments import LayerMoments, Rounding
from utils.algebra.scores import EXCESS, SCORES

FRACTIONS = (0.05, 0.3, 0.6, 0.95)


def tensor(array) -> torch.Tensor:
    return torch.as_tensor(np.asarray(array), dtype=torch.float64)


def make_data(num_samples, hidden_size, num_classes, seed=0, signal=1.0, decades=2.0):
    """Pooled features with an uneven spectrum and a mean, one-hot labels, and a token sequence for the prefixes."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(hidden_size, hidden_size)) * np.logspace(0, -decades, hidden_size)
    labels = random.integers(0, num_classes, num_samples)
    labels[:num_classes] = range(num_classes)
    centres = signal * random.normal(size=(num_classes, hidden_size))
    features = (random.normal(size=(num_samples, hidden_size)) + centres[labels] + 0.5) @ mixing
    states = (random.normal(size=(40 * hidden_size, hidden_size)) + 0.3) @ mixing
    return features, np.eye(num_classes)[labels], states


def moments_of(features, targets, states) -> LayerMoments:
    """The moments of one layer from the data itself, by their definition; the states are one long text."""
    prefix, following = states.cumsum(0)[:-1], states[1:]
    prefix = prefix / np.arange(1, len(states))[:, None]  # a running mean: keeps the conditioning of a toy problem sane
    n = len(features)
    return LayerMoments(
        pooled_second_moment=tensor(features.T @ features / n),
        pooled_label_cross_moment=tensor(features.T @ targets / n),
        pooled_mean=tensor(features.mean(0)),
        prefix_second_moment=tensor(prefix.T @ prefix / n),
        prefix_next_cross_moment=tensor(prefix.T @ following / n),
        prefix_mean=tensor(prefix.sum(0) / n),
        next_mean=tensor(following.sum(0) / n),
        label_mean=tensor(targets.mean(0)),
        label_second_moment=tensor(targets.T @ targets / n),
        num_samples=n,
        num_pairs=len(prefix),
    )


def solve(moments, held_out=None, layer=0, num_random_draws=0, **options) -> dict:
    """Every number of `sweep_layer` by its name."""
    found = K_sweep.sweep_layer(moments, held_out, configure(K_sweep, **options), layer, num_random_draws)
    return {**vars(found), **found.scores, **found.probe}


def sweep(features, targets, states, **options) -> dict:
    return solve(moments_of(features, targets, states), **options)


def autoregression(moments) -> torch.Tensor:
    """The eigenvectors of the autoregression problem with positive eigenvalues."""
    return K_sweep.solve_generalized_eigenproblem(
        moments.prefix_next_cross_moment, moments.prefix_second_moment
    ).vectors


def projector(vectors) -> np.ndarray:
    basis = scipy.linalg.orth(np.asarray(vectors), rcond=1e-13)
    return basis @ basis.T


# ------------------------------------------------------------------ the eigenproblem
def solution(factor, denominator):
    solved = K_sweep.solve_generalized_eigenproblem(tensor(factor), tensor(denominator))
    return solved.vectors, solved.eigenvalues, solved.whitener


@pytest.mark.parametrize("num_columns", [3, 30])
def test_solver_equals_scipy_at_full_rank(num_columns):
    random = np.random.default_rng(0)
    factor, root = random.normal(size=(30, num_columns)), random.normal(size=(30, 60))
    denominator = root @ root.T
    vectors, eigenvalues, whitener = solution(factor, denominator)
    expected, expected_vectors = scipy.linalg.eigh(factor @ factor.T, denominator)
    np.testing.assert_allclose(eigenvalues, expected[::-1][:num_columns], rtol=1e-9)
    signs = np.sign((vectors.numpy() * (denominator @ expected_vectors[:, ::-1][:, :num_columns])).sum(0))
    np.testing.assert_allclose(vectors * signs, expected_vectors[:, ::-1][:, :num_columns], atol=1e-9)
    np.testing.assert_allclose(whitener.T @ denominator @ whitener.numpy(), np.eye(30), atol=1e-10)


@pytest.mark.parametrize("rank", [1, 7, 19])
def test_rank_deficient_denominator(rank):
    """Fewer samples than dimensions: the rank is found, and the solution is scipy's on a basis of the range."""
    random = np.random.default_rng(rank)
    samples, labels = random.normal(size=(rank, 20)), random.normal(size=(rank, 3))
    denominator, factor = samples.T @ samples / rank, samples.T @ labels / rank
    vectors, eigenvalues, whitener = solution(factor, denominator)
    assert whitener.shape[1] == rank
    basis = scipy.linalg.orth(samples.T)
    expected = scipy.linalg.eigh(basis.T @ factor @ factor.T @ basis, basis.T @ denominator @ basis, eigvals_only=True)
    np.testing.assert_allclose(eigenvalues, expected[::-1][: len(eigenvalues)], rtol=1e-8)
    np.testing.assert_allclose(vectors.T @ denominator @ vectors.numpy(), np.eye(vectors.shape[1]), atol=1e-8)


def test_neither_unit_nor_one_massive_coordinate_changes_the_solution():
    features, targets, _ = make_data(100, 24, 4)
    features[:, :4] = features[:, 4:8] @ np.random.default_rng(1).normal(size=(4, 4))  # rank 20
    scale = np.full(24, 1e-3)
    scale[5] *= 1e4
    solutions = []
    for factor in (np.ones(24), scale):
        scaled = features * factor
        vectors, eigenvalues, whitener = solution(scaled.T @ targets / 100, scaled.T @ scaled / 100)
        solutions.append((vectors * factor[:, None], eigenvalues, whitener.shape[1], whitener * factor[:, None]))
    (vectors, eigenvalues, rank, whitener), (vectors_scaled, eigenvalues_scaled, rank_scaled, whitener_scaled) = (
        solutions
    )
    assert rank == rank_scaled == 20
    np.testing.assert_allclose(eigenvalues, eigenvalues_scaled, rtol=1e-9)
    signs = torch.sign((vectors * vectors_scaled).sum(0))
    np.testing.assert_allclose(vectors, vectors_scaled * signs, atol=1e-7 * vectors.abs().max())
    np.testing.assert_allclose(whitener @ whitener.T, whitener_scaled @ whitener_scaled.T, rtol=1e-6, atol=1e-6)


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
    denominator, factor = tensor(root.T @ root), tensor(random.normal(size=(10, 3)))
    complete = K_sweep.complete_by_variance(K_sweep.solve_generalized_eigenproblem(factor, denominator))
    np.testing.assert_allclose(complete.T @ denominator @ complete, np.eye(10), atol=1e-9)
    np.testing.assert_allclose(factor.T @ complete[:, 3:], 0, atol=1e-9)
    assert torch.all(complete[:, 3:].norm(dim=0).diff() > 0)  # C-norm 1: shorter means more variance


# ------------------------------------------------------------------ the reference
def generalized_eigenvectors(factor, denominator) -> np.ndarray:
    """All of F F' u = lambda C u by scipy, largest eigenvalue first.

    Where C is singular, u is unique up to the null space of C; the one in the range of C once that has a unit diagonal.
    """
    factor, denominator = factor.numpy(), denominator.numpy()
    scale = 1 / np.sqrt(np.diag(denominator))
    basis = scale[:, None] * scipy.linalg.orth(denominator * scale * scale[:, None], rcond=1e-12)
    projected = basis.T @ factor @ factor.T @ basis, basis.T @ denominator @ basis
    return basis @ scipy.linalg.eigh(*projected)[1][:, ::-1]


@pytest.mark.parametrize("num_samples", [300, 9])  # more and fewer texts than dimensions
@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5, 1.0])
def test_reference_is_the_projection_ratio_of_scipy_s_eigenvectors(num_samples, fraction):
    """With as many label directions as dimensions or texts, nothing is tied: U is unique."""
    random = np.random.default_rng(3)
    features, _, states = make_data(num_samples, 12, 3)
    moments = moments_of(features, random.normal(size=(num_samples, 12)), states)
    u = generalized_eigenvectors(moments.pooled_label_cross_moment, moments.pooled_second_moment)
    v = generalized_eigenvectors(moments.prefix_next_cross_moment, moments.prefix_second_moment)
    assert u.shape[1] == min(num_samples, 12)
    k_u, k_v = (max(1, int(fraction * vectors.shape[1])) for vectors in (u, v))
    inside = projector(v[:, :k_v]) @ u[:, :k_u]
    expected = np.square(inside).sum() / np.square(u[:, :k_u]).sum()
    assert K_sweep.ntps_reference(moments, fraction) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("num_samples", "num_classes"), [(300, 3), (300, 20), (10, 3), (15, 2)])
def test_fast_score_equals_the_reference(num_samples, num_classes):
    """Full rank and fewer texts than dimensions, few label directions (most of U is tied) and many."""
    features, targets, states = make_data(num_samples, 16, min(num_classes, num_samples), seed=num_samples)
    fast = sweep(features, targets, states, fractions=FRACTIONS, num_null_draws=2)["ntps"]
    moments = moments_of(features, targets, states)
    expected = [K_sweep.ntps_reference(moments, fraction) for fraction in FRACTIONS]
    np.testing.assert_allclose(fast, expected, atol=1e-8)


# ------------------------------------------------------------------ the score
def ntps_of(u, u_whitener, v, fractions, order="largest") -> np.ndarray:
    """`ntps` of columns U = W A, largest eigenvalue first and all of them different."""
    coordinates = tensor(np.linalg.lstsq(u_whitener, u, rcond=None)[0])
    solved = K_sweep.Eigenspace(tensor(u_whitener), coordinates, torch.arange(u.shape[1], 0, -1).double())
    basis = NestedBasis.of(tensor(v), K_sweep.num_directions(fractions, v.shape[1]))
    return K_sweep.ntps(solved, basis, fractions, order == "largest")["ntps"].numpy()


@given(st.integers(0, 10_000), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_score_is_the_projection_ratio(seed, k):
    """Against an explicit projector, at ranks where nothing is tied; and it lies in [0, 1]."""
    random = np.random.default_rng(seed)
    u, v = random.normal(size=(12, 9)) * np.logspace(0, 2, 9), random.normal(size=(12, 9)) * np.logspace(-2, 1, 9)
    score = ntps_of(u, u, v, (k / 9,))[0]
    inside = projector(v[:, :k]) @ u[:, :k]
    assert score == pytest.approx(np.square(inside).sum() / np.square(u[:, :k]).sum(), abs=1e-9)
    assert 0 <= score <= 1


@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_ties_are_the_average_over_random_bases(order):
    """The closed form of the tied space against the released way of doing it, repeated over 4,000 random bases."""
    features, targets, states = make_data(300, 10, 3)
    moments, fractions = moments_of(features, targets, states), (0.2, 0.5, 0.8, 1.0)
    solved, v = K_sweep.perception(moments, center=False), autoregression(moments).numpy()
    u, whitener = solved.vectors.numpy(), solved.whitener.numpy()
    v = v if order == "largest" else v[:, ::-1].copy()
    tied = whitener @ scipy.linalg.null_space(solved.coordinates.numpy().T)  # M-orthonormal, dimension 7
    scores, random = ntps_of(u, whitener, v, fractions, order), np.random.default_rng(0)
    rotations = [np.linalg.qr(random.normal(size=(7, 7)))[0] for _ in range(4000)]
    for score, fraction in zip(scores, fractions, strict=True):
        k = round(10 * fraction)
        bases = [
            [u, tied @ rotation] if order == "largest" else [tied @ rotation, u[:, ::-1]] for rotation in rotations
        ]
        columns = np.stack([np.concatenate(basis, axis=1)[:, :k] for basis in bases])
        numerators = np.square(projector(v[:, :k]) @ columns).sum((1, 2))
        denominator = np.square(columns).sum((1, 2)).mean()
        error = numerators.std() / denominator / np.sqrt(4000) + 1e-9
        assert score == pytest.approx(numerators.mean() / denominator, abs=5 * error)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=100, deadline=None)
def test_tie_weights_are_the_shares_of_an_average_over_the_bases_of_each_eigenspace(seed, largest):
    """Equal eigenvalues, some of them zero, share the columns that U_k takes of their space in equal parts."""
    random = np.random.default_rng(seed)
    sizes, num_tied = random.integers(1, 4, random.integers(1, 5)), int(random.integers(0, 6))
    distinct = np.sort(random.uniform(0.1, 1, len(sizes)))[::-1]
    eigenvalues = np.repeat(distinct, sizes) * (1 + 1e-14 * random.standard_normal(sizes.sum()))
    space = np.append(np.repeat(np.arange(len(sizes)), sizes), np.full(num_tied, len(sizes)))
    ks = list(range(1, len(space) + 1))
    expected = np.zeros((len(ks), len(space)))
    for k in ks:
        columns = np.arange(k) if largest else np.arange(len(space))[::-1][:k]
        for column in range(len(space)):
            same = space == space[column]
            expected[k - 1, column] = same[columns].sum() / same.sum()
    weights = K_sweep.tie_weights(ks, tensor(eigenvalues), num_tied, largest).numpy()
    np.testing.assert_allclose(weights[:, :-1], expected[:, : len(eigenvalues)], atol=3e-16)
    np.testing.assert_allclose(weights[:, -1], expected[:, -1] if num_tied else 0, atol=3e-16)


def test_rotating_the_features_changes_nothing():
    features, targets, states = make_data(200, 16, 4)
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(16, 16)))[0]
    before, after = sweep(features, targets, states), sweep(features @ rotation, targets, states @ rotation)
    for name in (*SCORES, "excess_loss", "excess_upper_euclidean"):
        np.testing.assert_allclose(before[name], after[name], atol=1e-8, err_msg=name)


def test_centring_equals_centred_data():
    features, targets, states = make_data(200, 12, 3)
    prefix_mean = sweep(features, targets, states, center=True)
    moments = moments_of(features - features.mean(0), targets - targets.mean(0), states)
    running = states.cumsum(0)[:-1] / np.arange(1, len(states))[:, None]
    a, b = running - running.mean(0), states[1:] - states[1:].mean(0)
    centred = dataclasses.replace(
        moments,
        prefix_second_moment=tensor(a.T @ a / 200),
        prefix_next_cross_moment=tensor(a.T @ b / 200),
        prefix_mean=torch.zeros(12, dtype=torch.float64),
        next_mean=torch.zeros(12, dtype=torch.float64),
    )
    expected = solve(centred)
    for name in ("ntps", "ntps_label", "ntps_whitened", "retained"):
        np.testing.assert_allclose(prefix_mean[name], expected[name], atol=1e-9, err_msg=name)


def test_fractions_are_floors_of_the_rank():
    """Also where the product of floats is just below a whole number: .7 * 90 is 62.99999999999999."""
    fractions = K_sweep.Config().fractions
    assert len(fractions) == 19 and math.floor(0.7 * 90) == 62
    for rank in (1, 19, 20, 90, 100, 180, 896, 4096):
        assert K_sweep.num_directions(fractions, rank) == [max(1, i * rank // 20) for i in range(1, 20)]
    features, targets, states = make_data(400, 90, 90, decades=1.0)  # 63 columns of U, none of them tied
    moments = moments_of(features, targets, states)
    assert K_sweep.ntps_reference(moments, 0.7) == pytest.approx(
        solve(moments, fractions=(0.7,))["ntps"].item(), abs=1e-8
    )
    assert solve(moments, fractions=(0.7,))["chance"].item() == pytest.approx(63 / 90)


# ------------------------------------------------------------------ coordinates
def test_standardized_coordinates_are_those_of_scaled_data():
    """The moments of the scaled data themselves; a coordinate without variance keeps its scale."""
    features, targets, states = make_data(300, 12, 3)
    features[:, 5] = 2.0
    scale = np.where(np.arange(12) == 5, 1, 1 / np.maximum(features.std(0), 1e-9))
    for options in ({}, {"center": True}, {"subspace": "pca"}, {"subspace": "random"}, {"eigenvectors": "smallest"}):
        found = sweep(features, targets, states, coordinates="standardized", **options)
        expected = sweep(features * scale, targets, states * scale, **options)
        for name in (*SCORES, *EXCESS):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-8, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("center", [False, True])
def test_scores_of_standardized_coordinates_do_not_depend_on_their_scale(center):
    features, targets, states = make_data(300, 16, 4)
    test = make_data(100, 16, 4, seed=1)
    random = np.random.default_rng(3)
    scale = 10 ** random.uniform(-3, 3, 16)
    errors = {"prefix_second_error": 1e-9, "prefix_next_error": 1e-9}

    def solved(scale, coordinates):
        own, other = (moments_of(x * scale, y, s * scale) for x, y, s in ((features, targets, states), test))
        variances = own.prefix_second_moment.diagonal()
        noise = {name: level * variances.sqrt()[:, None] * variances.sum().sqrt() for name, level in errors.items()}
        diagonals = {"pooled": 1e-12 * own.pooled_second_moment.diagonal(), "prefix": 1e-12 * variances}
        own = dataclasses.replace(
            own, rounding=Rounding(**diagonals, **noise, num_distinct_texts=300, num_distinct_pairs=600)
        )
        return solve(own, other, coordinates=coordinates, center=center)

    ones = np.ones(16)
    plain, found, scaled = solved(ones, "as_is"), solved(ones, "standardized"), solved(scale, "standardized")
    probes = [name for name in plain if name.startswith("probe_")]
    assert len(probes) == 4 and plain["rank_v"] == found["rank_v"] == scaled["rank_v"] == 16
    for name in ("retained", "ntps_whitened", "excess_loss", *probes):  # V itself depends on the scale of next tokens
        if name.startswith("probe"):
            np.testing.assert_allclose(found[name], plain[name], rtol=1e-8, err_msg=name)
        np.testing.assert_allclose(scaled[name], found[name], rtol=0, atol=1e-8, err_msg=name)
    for name in ("ntps", "ntps_label", "excess_upper_euclidean"):
        np.testing.assert_allclose(scaled[name], found[name], atol=1e-8, err_msg=name)
    assert (plain["ntps_label"] - solved(scale, "as_is")["ntps_label"]).abs().max() > 0.01


# ------------------------------------------------------------------ excess loss, bounds, probe
def least_squares_loss(features, targets) -> float:
    """Mean over texts of the squared error, summed over labels, of a probe with intercept."""
    residual = targets - LinearRegression().fit(features, targets).predict(features)
    return np.square(residual).sum(1).mean()


@pytest.mark.parametrize("num_samples", [300, 20])  # more and fewer texts than dimensions
def test_excess_is_the_difference_of_two_least_squares_losses(num_samples):
    features, targets, states = make_data(num_samples, 24, 4)
    result = sweep(features, targets, states)
    moments = moments_of(features, targets, states)
    v = autoregression(moments)
    best = least_squares_loss(features, targets)
    explained = np.square(targets - targets.mean(0)).sum(1).mean() - best
    for i, k in enumerate(K_sweep.num_directions(K_sweep.Config().fractions, 24)):
        excess = least_squares_loss(features @ v[:, :k].numpy(), targets) - best
        assert result["excess_loss"][i].item() == pytest.approx(excess, abs=1e-7)
        assert result["retained"][i].item() == pytest.approx(1 - excess / explained, abs=1e-7)


def test_whitened_score_is_the_overlap_of_whitened_subspaces():
    features, targets, states = make_data(500, 15, 5)
    result, moments = sweep(features, targets, states), moments_of(features, targets, states)
    root = scipy.linalg.sqrtm(moments.pooled_covariance.numpy()).real
    left = np.linalg.svd(np.linalg.inv(root) @ moments.pooled_label_covariance.numpy())[0][:, :4]  # rank c - 1
    v = autoregression(moments)
    for i, k in enumerate(K_sweep.num_directions(K_sweep.Config().fractions, 15)):
        expected = np.square(projector(root @ v[:, :k].numpy()) @ left).sum() / 4
        assert result["ntps_whitened"][i].item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("num_samples", [300, 10])
def test_euclidean_bounds_are_those_of_the_extreme_eigenvalues(num_samples):
    """s^2 times an extreme eigenvalue of Sigma times |U - P U|^2, all dense; the smallest is 0 with fewer texts."""
    features, targets, states = make_data(num_samples, 16, 4, decades=1.0)
    found, moments = sweep(features, targets, states), moments_of(features, targets, states)
    sigma = np.cov(features.T, bias=True)
    basis = scipy.linalg.orth((features - features.mean(0)).T) if num_samples < 16 else np.eye(16)
    cross = basis.T @ moments.pooled_label_covariance.numpy()
    values, u = scipy.linalg.eigh(cross @ cross.T, basis.T @ sigma @ basis)
    smallest, largest = np.linalg.eigvalsh(sigma)[[0, -1]] * (num_samples > 16, 1)
    if num_samples > 16:  # U is unique: it does not depend on the axes in which a singular Sigma is whitened
        v = autoregression(moments).numpy()
        outside = [
            u[:, -3:] - projector(v[:, :k]) @ u[:, -3:] for k in K_sweep.num_directions(K_sweep.Config().fractions, 16)
        ]
        missing = np.array([np.square(part).sum() for part in outside])
        np.testing.assert_allclose(found["excess_upper_euclidean"], values[-1] * largest * missing, rtol=1e-7)
        np.testing.assert_allclose(found["excess_lower_euclidean"], values[-3] * smallest * missing, rtol=1e-7)
        assert smallest > 0
    else:
        assert not found["excess_lower_euclidean"].any()
    slack = 1e-12
    assert torch.all(found["excess_lower_euclidean"] <= found["excess_loss"] + slack)
    assert torch.all(found["excess_loss"] <= found["excess_upper_euclidean"] + slack)


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
    shift = features.mean(0) if center else 0.0
    directions = np.linalg.eigh((features - shift).T @ (features - shift))[1][:, ::-1]
    u = scipy.linalg.eigh(
        *(root @ root.T for root in ((features - shift).T @ (targets - center * targets.mean(0)), (features - shift).T))
    )[1][:, ::-1][:, : 3 if center else 4]  # centred labels have rank c - 1
    best = least_squares_loss(features, targets)
    explained = np.square(targets - targets.mean(0)).sum(1).mean() - best
    for i, k in enumerate(K_sweep.num_directions(K_sweep.Config().fractions, 16)):
        inside = np.square(projector(directions[:, :k]) @ u).sum() / np.square(u).sum()
        assert result["ntps_label"][i].item() == pytest.approx(inside, abs=1e-8)
        design = np.column_stack([features @ directions[:, :k], np.ones(300)])
        residual = targets - design @ np.linalg.lstsq(design, targets, rcond=None)[0]
        retained = 1 - (np.square(residual).sum(1).mean() - best) / explained
        assert result["retained"][i].item() == pytest.approx(retained, abs=1e-8)


def test_a_random_subspace_is_at_chance_and_the_same_for_a_seed():
    features, targets, states = make_data(300, 16, 4, seed=2)
    moments, chance = moments_of(features, targets, states), sweep(features, targets, states)["chance"]

    def of_seed(seed, layer=0):
        return solve(moments, layer=layer, subspace="random", seed=seed, num_null_draws=2)

    scores = torch.stack([of_seed(seed)["ntps_label"] for seed in range(200)])
    error = scores.std(0) / 200**0.5
    assert torch.all((scores.mean(0) - chance).abs() < 5 * error)
    assert torch.equal(of_seed(0)["ntps_label"], scores[0])
    assert not torch.allclose(of_seed(0, layer=1)["ntps_label"], scores[0], atol=1e-3)
    v = K_sweep.control_subspace(moments, K_sweep.Config(subspace="random"), 16, 0).numpy()
    best = least_squares_loss(features, targets)
    explained = np.square(targets - targets.mean(0)).sum(1).mean() - best
    expected = [1 - (least_squares_loss(features @ v[:, :k], targets) - best) / explained for k in (1, 8, 15)]
    np.testing.assert_allclose(of_seed(0)["retained"][[0, 9, 18]], expected, atol=1e-8)


def test_every_subspace_has_as_many_directions_as_the_autoregression():
    features, targets, states = make_data(300, 16, 4)
    few = states[:8]  # seven prefixes
    ranks = {of: sweep(features, targets, few, subspace=of)["rank_v"] for of in ("autoregression", "pca", "random")}
    assert set(ranks.values()) == {7}
