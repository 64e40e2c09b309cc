"""K_sweep.py: eigenproblems against scipy and mpmath, scores against their definitions, and the command line."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

import cache
import K_sweep
from tests.conftest import configure, make_texts, retrain, run_in_process, write_rows
from utils.algebra.linalg import NestedBasis
from utils.algebra.moments import LayerMoments, load_layer
from utils.algebra.permuted_labels import draw_permuted_factors
from utils.algebra.scores import NULL_SCORES, SCORES
from utils.data.load import load_texts
from utils.results import open_tensors
from utils.script import UserError, parse
from utils.settings import with_values

CPU = torch.device("cpu")
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


def sweep(features, targets, states, **options) -> dict:
    return K_sweep.sweep_layer(moments_of(features, targets, states), None, configure(K_sweep, **options), 0)


def projector(vectors) -> np.ndarray:
    basis = scipy.linalg.orth(np.asarray(vectors), rcond=1e-13)
    return basis @ basis.T


# ------------------------------------------------------------------ the eigenproblem
@pytest.mark.parametrize("num_columns", [3, 30])
def test_solver_equals_scipy_at_full_rank(num_columns):
    random = np.random.default_rng(0)
    factor, root = random.normal(size=(30, num_columns)), random.normal(size=(30, 60))
    denominator = root @ root.T
    vectors, eigenvalues, whitener = K_sweep.solve_generalized_eigenproblem(tensor(factor), tensor(denominator))
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
    vectors, eigenvalues, whitener = K_sweep.solve_generalized_eigenproblem(tensor(factor), tensor(denominator))
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
        moments = tensor(scaled.T @ targets / 100), tensor(scaled.T @ scaled / 100)
        vectors, eigenvalues, whitener = K_sweep.solve_generalized_eigenproblem(*moments)
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
    found, eigenvalues, _ = K_sweep.solve_generalized_eigenproblem(
        tensor([[float(v) for v in row] for row in factor.tolist()]), tensor(denominator)
    )
    np.testing.assert_allclose(eigenvalues, expected_values, rtol=1e-8)
    signs = np.sign((found.numpy() * expected_vectors).sum(0))
    np.testing.assert_allclose(found * signs, expected_vectors, rtol=1e-6, atol=1e-6 * np.abs(expected_vectors).max())


def test_autoregression_is_the_reduced_rank_regression():
    """span V_k gives the least loss that any k-dimensional bottleneck of the prefixes can reach (Eckart-Young)."""
    _, _, states = make_data(50, 12, 2)
    prefix, following = states.cumsum(0)[:-1] / np.arange(1, len(states))[:, None], states[1:]
    v, _, _ = K_sweep.solve_generalized_eigenproblem(tensor(prefix.T @ following), tensor(prefix.T @ prefix))
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
    vectors, _, whitener = K_sweep.solve_generalized_eigenproblem(factor, denominator)
    complete = K_sweep.complete_by_variance(vectors, whitener, denominator)
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


@pytest.mark.slow
def test_fast_score_equals_the_reference_on_the_embedded_model(tiny_results):
    with open_tensors(tiny_results["reference"]) as (file, metadata):
        layers = [load_layer(file, metadata, layer, CPU) for layer in (0, 2, 4)]
    for moments in layers:
        config = configure(K_sweep, fractions=FRACTIONS, num_null_draws=2)
        fast = K_sweep.sweep_layer(moments, None, config, 0)["ntps"]
        expected = [K_sweep.ntps_reference(moments, fraction) for fraction in FRACTIONS]
        np.testing.assert_allclose(fast, expected, atol=1e-6)


# ------------------------------------------------------------------ the score
def ntps_of(u, u_whitener, v, k_us, k_vs, largest=True) -> np.ndarray:
    basis = NestedBasis.of(tensor(v))
    labels, perception = (basis.coordinates(tensor(vectors)) for vectors in (u, u_whitener))
    return K_sweep.ntps(labels, perception, k_us, k_vs, largest)[0].numpy()


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_score_is_the_projection_ratio(seed, k_u, k_v):
    """Against an explicit projector, at ranks where nothing is tied; and it lies in [0, 1]."""
    random = np.random.default_rng(seed)
    u, v = random.normal(size=(12, 9)) * np.logspace(0, 2, 9), random.normal(size=(12, 9)) * np.logspace(-2, 1, 9)
    score = ntps_of(u, u, v, [k_u], [k_v])[0]
    inside = projector(v[:, :k_v]) @ u[:, :k_u]
    assert score == pytest.approx(np.square(inside).sum() / np.square(u[:, :k_u]).sum(), abs=1e-9)
    assert 0 <= score <= 1


def test_one_inside_zero_orthogonal():
    orthonormal = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))[0]
    mixed = orthonormal[:, :4] @ np.random.default_rng(1).normal(size=(4, 4))
    assert ntps_of(mixed, mixed, orthonormal[:, :6], [4], [6])[0] == pytest.approx(1, abs=1e-12)
    assert ntps_of(mixed, mixed, orthonormal[:, 4:], [4], [6])[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("largest", [True, False])
def test_ties_are_the_average_over_random_bases(largest):
    """The closed form of the tied space against the released way of doing it, repeated over 4,000 random bases."""
    features, targets, states = make_data(300, 10, 3)
    moments = moments_of(features, targets, states)
    u, _, whitener = K_sweep.solve_generalized_eigenproblem(
        moments.pooled_label_cross_moment, moments.pooled_second_moment
    )
    v, _, _ = K_sweep.solve_generalized_eigenproblem(moments.prefix_next_cross_moment, moments.prefix_second_moment)
    u, whitener, second_moment = u.numpy(), whitener.numpy(), moments.pooled_second_moment.numpy()
    v = v.numpy() if largest else v.numpy()[:, ::-1].copy()
    inside = whitener.T @ second_moment @ u
    tied = whitener @ scipy.linalg.null_space(inside.T)  # M-orthonormal basis of the tied space, dimension 7
    k_us, k_vs = [2, 5, 8, 10], [3, 5, 6, 9]
    scores = ntps_of(u, whitener, v, k_us, k_vs, largest)
    random = np.random.default_rng(0)
    rotations = [np.linalg.qr(random.normal(size=(7, 7)))[0] for _ in range(4000)]
    for score, k_u, k_v in zip(scores, k_us, k_vs, strict=True):
        p = projector(v[:, :k_v])
        numerators, denominators = [], []
        for rotation in rotations:
            columns = np.concatenate([u, tied @ rotation] if largest else [tied @ rotation, u[:, ::-1]], axis=1)[
                :, :k_u
            ]
            numerators.append(np.square(p @ columns).sum())
            denominators.append(np.square(columns).sum())
        error = np.std(numerators) / np.mean(denominators) / np.sqrt(4000) + 1e-9
        assert score == pytest.approx(np.mean(numerators) / np.mean(denominators), abs=5 * error)


def test_rotating_the_features_changes_nothing():
    features, targets, states = make_data(200, 16, 4)
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(16, 16)))[0]
    before, after = sweep(features, targets, states), sweep(features @ rotation, targets, states @ rotation)
    for name in (*SCORES, "excess_loss", "excess_upper_euclidean"):
        np.testing.assert_allclose(before[name], after[name], atol=1e-8, err_msg=name)


def test_smallest_is_another_score_and_blind_to_the_labels():
    features, targets, states = make_data(400, 20, 3, signal=2.0)
    largest, smallest = (
        sweep(features, targets, states, eigenvectors=order)["ntps"] for order in ("largest", "smallest")
    )
    assert (largest - smallest).abs().max() > 0.05
    shuffled = np.random.default_rng(0).permutation(targets)
    other = sweep(features, shuffled, states, eigenvectors="smallest")["ntps"]
    # the whole tied space moves only by what the few informative directions take from it
    assert (smallest - other).abs().max() < (largest - sweep(features, shuffled, states)["ntps"]).abs().max()


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
    expected = K_sweep.sweep_layer(centred, None, K_sweep.Config(), 0)
    for name in ("ntps", "ntps_label", "ntps_whitened", "retained"):
        np.testing.assert_allclose(prefix_mean[name], expected[name], atol=1e-9, err_msg=name)


def test_fractions_are_floors_of_the_rank():
    fractions = K_sweep.Config().fractions
    assert len(fractions) == 19
    for rank in (1, 19, 20, 100, 896, 4096):
        assert K_sweep.num_directions(fractions, rank) == [max(1, i * rank // 20) for i in range(1, 20)]


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
    v, _, _ = K_sweep.solve_generalized_eigenproblem(moments.prefix_next_cross_moment, moments.prefix_second_moment)
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
    v, _, _ = K_sweep.solve_generalized_eigenproblem(moments.prefix_next_cross_moment, moments.prefix_second_moment)
    for i, k in enumerate(K_sweep.num_directions(K_sweep.Config().fractions, 15)):
        expected = np.square(projector(root @ v[:, :k].numpy()) @ left).sum() / 4
        assert result["ntps_whitened"][i].item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("targets_are", ["classes", "numbers"])
def test_probe_equals_scikit_learn_on_both_splits(targets_are):
    features, targets, states = make_data(400, 12, 4, seed=3)
    if targets_are == "numbers":
        targets = features[:, :1] - 2 * features[:, 1:2] + np.random.default_rng(0).normal(size=(400, 1))
    train, test = slice(0, 250), slice(250, None)
    result = K_sweep.sweep_layer(
        moments_of(features[train], targets[train], states),
        moments_of(features[test], targets[test], states),
        K_sweep.Config(),
        0,
    )
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


@pytest.mark.slow
def test_a_random_subspace_is_at_chance_and_the_same_for_a_seed():
    features, targets, states = make_data(300, 16, 4, seed=2)
    moments, chance = moments_of(features, targets, states), sweep(features, targets, states)["chance"]

    def of_seed(seed, layer=0):
        return K_sweep.sweep_layer(
            moments, None, configure(K_sweep, subspace="random", seed=seed, num_null_draws=2), layer
        )

    scores = torch.stack([of_seed(seed)["ntps_label"] for seed in range(200)])
    error = scores.std(0) / 200**0.5
    assert torch.all((scores.mean(0) - chance).abs() < 5 * error)
    assert torch.equal(of_seed(0)["ntps_label"], scores[0])
    assert not torch.allclose(of_seed(0, layer=1)["ntps_label"], scores[0], atol=1e-3)
    v = K_sweep.subspace_directions(moments, K_sweep.Config(subspace="random"), 0).numpy()
    best = least_squares_loss(features, targets)
    explained = np.square(targets - targets.mean(0)).sum(1).mean() - best
    expected = [1 - (least_squares_loss(features @ v[:, :k], targets) - best) / explained for k in (1, 8, 15)]
    np.testing.assert_allclose(of_seed(0)["retained"][[0, 9, 18]], expected, atol=1e-8)


def test_every_subspace_has_as_many_directions_as_the_autoregression():
    features, targets, states = make_data(300, 16, 4)
    few = states[:8]  # seven prefixes
    ranks = {of: sweep(features, targets, few, subspace=of)["rank_v"] for of in ("autoregression", "pca", "random")}
    assert set(ranks.values()) == {7}


def test_only_options_other_than_the_default_stand_in_the_name():
    def name(**options):
        return K_sweep.output_path(configure(K_sweep, dataset_name="docstrings/kind", **options)).as_posix()

    folder = "results/ntps/tiny/docstrings__kind"
    assert name() == name(subspace="autoregression") == f"{folder}.json"
    assert name(subspace="pca") == f"{folder}.pca.json"
    assert name(subspace="random", split="test", center=True) == f"{folder}.test.random.centered.json"
    assert name(eigenvectors="smallest") == f"{folder}.smallest.json"


# ------------------------------------------------------------------ permuted labels
@pytest.mark.slow
@pytest.mark.parametrize(("n", "d", "c"), [(400, 30, 5), (60, 40, 3), (25, 40, 3)])
def test_closed_form_null_agrees_with_real_permutations(n, d, c):
    features, targets, states = make_data(n, d, c, seed=7)
    drawn = sweep(features, targets, states, num_null_draws=1000)["null_draws"]
    random = np.random.default_rng(0)
    names = NULL_SCORES
    real = {name: [] for name in names}
    for _ in range(200):
        permuted = sweep(features, random.permutation(targets), states, num_null_draws=2)
        for name in names:
            real[name].append(permuted[name].numpy())
    for name in names:
        permutations, draws = np.stack(real[name]), drawn[name].numpy()
        standard_error = permutations.std(0) / np.sqrt(200) + draws.std(0) / np.sqrt(1000) + 1e-9
        assert np.all(np.abs(permutations.mean(0) - draws.mean(0)) < 5 * standard_error), name
        spread, drawn_spread = (np.diff(np.quantile(of.mean(1), [0.1, 0.9])) for of in (permutations, draws))
        assert spread == pytest.approx(drawn_spread, rel=0.25, abs=1e-9), name  # quantiles: some tails are long


def test_draws_have_the_known_mean():
    """E tr(S' Sigma^-1 S) = rank tr(label covariance) / (n - 1), exactly, under permuted labels."""
    p = np.array([0.5, 0.3, 0.2])
    label_covariance = tensor(np.diag(p) - np.outer(p, p))
    for n, rank in ((200, 30), (40, 30), (31, 30), (33, 30)):
        drawn = draw_permuted_factors(rank, n, label_covariance, 4000, np.random.default_rng(0))
        totals = drawn.factors.square().sum((1, 2))
        expected = rank * label_covariance.trace() / (n - 1)
        assert abs(totals.mean() - expected) < 5 * totals.std() / 4000**0.5 + 1e-12
        np.testing.assert_allclose(drawn.bases.mT @ drawn.bases, torch.eye(2).expand(4000, 2, 2), atol=1e-9)


# ------------------------------------------------------------------ the embedded model, and the command line
def shuffled_texts(settings, run, split):
    """The texts of `load_texts` in another order."""
    data = load_texts(settings, run, split)
    order = np.random.default_rng(1).permutation(len(data.texts))
    return dataclasses.replace(data, texts=[data.texts[i] for i in order], labels=data.labels[order])


@pytest.fixture(scope="module")
def tiny_results(tmp_path_factory):
    """cache.py on one docstring task with the embedded model, 1,500 texts, under four ways of computing the same."""
    ways = {
        "reference": {},
        "small batches": {"tokens_per_batch": 256},
        "float64 products": {"product_dtype": "float64"},
        "shuffled texts": {},
    }
    results = {}
    for way, options in ways.items():
        folder = tmp_path_factory.mktemp("tiny")
        config = configure(cache, dataset_name="docstrings/kind", max_samples=1500, results_dir=folder, **options)
        with pytest.MonkeyPatch.context() as patch:
            if way == "shuffled texts":
                patch.setattr(cache, "load_texts", shuffled_texts)
            cache.main(config)
        [results[way]] = folder.glob("moments/*/*/train.safetensors")
    return results


def layers_of(path) -> list[dict]:
    with open_tensors(path) as (file, metadata):
        num_layers = metadata["num_layers"]
        layers = [load_layer(file, metadata, layer, CPU) for layer in range(num_layers)]
    config = K_sweep.Config(num_null_draws=2)
    return [K_sweep.sweep_layer(moments, None, config, i) for i, moments in enumerate(layers)]


@pytest.mark.slow
def test_excess_lies_within_its_bounds_on_the_embedded_model(tiny_results):
    for layer in layers_of(tiny_results["reference"]):
        excess, slack = layer["excess_loss"], 1e-9
        for form in ("", "_euclidean"):
            assert torch.all(layer[f"excess_lower{form}"] <= excess + slack), layer["layer"]
            assert torch.all(excess <= layer[f"excess_upper{form}"] + slack), layer["layer"]
        assert torch.all(excess[:-1] - excess[1:] >= -slack)  # a larger V never loses more


@pytest.mark.slow
@pytest.mark.parametrize("way", ["small batches", "float64 products", "shuffled texts"])
def test_score_does_not_depend_on_how_it_is_computed(tiny_results, way):
    reference, other = layers_of(tiny_results["reference"]), layers_of(tiny_results[way])
    for a, b in zip(reference, other, strict=True):
        assert (a["rank_u"], a["rank_v"], a["rank_label"]) == (b["rank_u"], b["rank_v"], b["rank_label"])
        for name in SCORES:
            assert (a[name] - b[name]).abs().max() < 1e-4, (name, a["layer"])


@pytest.fixture(scope="module")
def cached(model_dirs, rows_path, tmp_path_factory):
    """A results folder with the moments of both splits in bfloat16; and the settings K_sweep.py needs to find them."""
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path)}
    names["results_dir"] = tmp_path_factory.mktemp("cached")
    for split in ("train", "test"):
        cache.main(configure(cache, **names, split=split, dtype="bfloat16"))
    return names


@pytest.fixture
def names(cached, tmp_path):
    """Of a copy of `cached`."""
    return cached | {"results_dir": shutil.copytree(cached["results_dir"], tmp_path / "results")}


def test_from_moments_to_json_and_picture(names, monkeypatch, capsys):
    call = [word for name, value in names.items() for word in (f"--{name}", value)]
    assert run_in_process(monkeypatch, "K_sweep.py", *call) == 0
    path = names["results_dir"] / "ntps" / Path(names["model_name"]).name / "rows.json"
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(path)
    content = json.loads(path.read_text())
    assert len(content["layers"]) == 3 and content["num_samples"] == 168 and content["num_classes"] == 3
    for layer in content["layers"]:
        for name in (*SCORES, "chance", "excess_loss", "excess_lower", "excess_upper"):
            assert len(layer[name]) == len(content["fractions"]) == 19
        assert set(layer["null"]) == {"ntps_label", "ntps_whitened", "retained"}
        assert 0 <= layer["probe_r2"] <= 1 and layer["probe_r2_held_out"] is not None
    value = np.mean(content["layers"][-1]["retained"])
    assert content["score"]["retained"]["value"] == pytest.approx(value)
    assert path.with_suffix(".png").stat().st_size > 10_000 and path.with_suffix(".pdf").is_file()


def test_settings_left_at_their_default_are_those_of_the_moments(names):
    result = K_sweep.run(configure(K_sweep, **names, picture=False, num_null_draws=2))
    assert result["config"]["dtype"] == "bfloat16"
    with pytest.raises(UserError, match=r"dtype: 'bfloat16' there, 'float16' now"):
        K_sweep.run(configure(K_sweep, **names, picture=False, dtype="float16"))
    with pytest.raises(UserError, match=r"max_samples: None there, 20 now"):
        K_sweep.run(configure(K_sweep, **names, picture=False, max_samples=20))


def test_results_are_reused_refused_and_kept_apart(names, monkeypatch):
    config = configure(K_sweep, **names, picture=False, num_null_draws=2)
    first, solve = K_sweep.run(config), K_sweep.sweep_layer

    def no_work(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(K_sweep, "sweep_layer", no_work)
    assert K_sweep.run(config) == first
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        K_sweep.run(with_values(config, seed=1))
    monkeypatch.setattr(K_sweep, "sweep_layer", solve)
    K_sweep.run(with_values(config, eigenvectors="smallest", center=True))
    folder = names["results_dir"] / "ntps" / Path(names["model_name"]).name
    assert sorted(path.name for path in folder.iterdir()) == ["rows.json", "rows.smallest.centered.json"]
    cache.main(configure(cache, **names, dtype="bfloat16", pooling="last", overwrite=True))
    with pytest.raises(UserError, match=r"other moments.*--overwrite"):
        K_sweep.run(config)


def test_a_retrained_model_is_noticed(names, model_dirs, tmp_path):
    folder = shutil.copytree(model_dirs["qwen2"], tmp_path / "model")
    names = names | {"model_name": str(folder)}
    cache.main(configure(cache, **names))
    config = configure(K_sweep, **names, picture=False, num_null_draws=2)
    K_sweep.run(config)
    retrain(folder)
    with pytest.raises(UserError, match="other weights of the model"):
        K_sweep.run(config)
    shutil.rmtree(folder)  # moments are solved without the model, where it is not there
    folder.mkdir()
    K_sweep.run(with_values(config, overwrite=True))


def test_missing_moments_name_a_command_that_makes_them(tmp_path):
    """The name of an adapted model is of a folder of results; cache.py takes the model and its adapter."""
    wanted = {"model_name": "tiny+lora", "dataset_name": "docstrings/kind", "max_samples": 90, "split": "test"}
    with pytest.raises(UserError, match=r"No moments at .*Run: python cache\.py ") as raised:
        K_sweep.run(configure(K_sweep, **wanted, results_dir=tmp_path))
    script, *arguments = shlex.split(str(raised.value).split("Run: python ")[1])
    assert script == "cache.py"
    adapter = tmp_path / "lora" / "tiny" / "docstrings__kind" / "adapter"
    expected = wanted | {"model_name": "tiny", "adapter_dir": adapter, "results_dir": tmp_path}
    parsed = parse(cache.Config, arguments)
    assert parsed == configure(cache, **expected)
    assert str(cache.config_path(parsed)) in str(raised.value)  # where K_sweep.py looked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fractions", "0.5", "1.5"], r"--fractions must be in (0, 1]"),
        (["--num_null_draws", "1"], "--num_null_draws must be at least 2"),
        (["--device", "gpu9"], "--device gpu9 cannot be used here"),
    ],
)
def test_mistakes_end_in_one_sentence(options, message, tmp_path, monkeypatch, capsys):
    code, printed = run_in_process(monkeypatch, "K_sweep.py", *options, "--results_dir", tmp_path), capsys.readouterr()
    assert code == 2 or code.startswith("error: ")
    assert message in " ".join(f"{code} {printed.err} {printed.out}".replace("│", " ").split())
    assert not any(tmp_path.iterdir())  # before a pass through the model


def test_test_targets_that_are_all_equal_have_no_score(model_dirs, tmp_path, monkeypatch):
    """They do for the train split, where the test split only judges the probe."""
    folder = tmp_path / "numbers"
    folder.mkdir()
    for split, spread in (("train", 0.1), ("test", 0.0)):
        rows = [{"text": text, "label": 0.1 + spread * (i % 7)} for i, text in enumerate(make_texts(40))]
        write_rows(folder / f"{split}.jsonl", rows)
    shared = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(folder), "results_dir": tmp_path / "results"}
    for split in ("train", "test"):
        cache.main(configure(cache, **shared, split=split))
    arguments = [word for name, value in shared.items() for word in (f"--{name}", value)]
    message = run_in_process(monkeypatch, "K_sweep.py", *arguments, "--split", "test", "--no_picture")
    assert message.startswith("error: The labels of ") and "test.safetensors are all equal. See --split" in message
    assert run_in_process(monkeypatch, "K_sweep.py", *arguments, "--no_picture") == 0
