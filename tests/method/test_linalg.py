"""utils/algebra/linalg.py: whitening, cuts and nested bases against scipy's decompositions."""

import numpy as np
import pytest
import scipy.linalg
import torch

from tests.method.toy import tensor
from utils.algebra.linalg import NestedBasis, Noise, whiten, without_constants
from utils.algebra.products import random_signs


@pytest.mark.parametrize("spectrum", [np.linspace(1, 2, 9), np.logspace(0, -12, 9), np.r_[np.ones(5), np.zeros(4)]])
def test_whitener_gives_scipy_s_inverse(spectrum):
    """W W' is the inverse on the range: full rank, badly conditioned, and rank-deficient."""
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0]
    matrix = axes * spectrum @ axes.T
    whitener = whiten(tensor(matrix)).numpy()
    rank = int((spectrum > 0).sum())
    assert whitener.shape == (9, rank)
    loss = 1e-15 * spectrum.max() / spectrum[spectrum > 0].min()  # of digits, by the condition number
    np.testing.assert_allclose(whitener.T @ matrix @ whitener, np.eye(rank), atol=1e-12 + 100 * loss)
    projector = matrix @ whitener @ whitener.T  # onto the range
    expected = scipy.linalg.orth(matrix, rcond=1e-14)
    np.testing.assert_allclose(projector @ expected, expected, atol=1e-10 + 100 * loss)


@pytest.mark.parametrize(("tolerance", "rank"), [(1e-9, 4), (1e-5, 3), (1e-3, 2), (0.5, 1)])
def test_tolerance_cuts_the_spectrum_of_the_correlations(tolerance, rank):
    """The cut uses eigenvalues of the matrix scaled to unit diagonal, for any units of its coordinates."""
    axes = scipy.linalg.hadamard(4) / 2  # any spectrum in this basis has a constant diagonal
    spectrum = np.array([1, 1e-2, 1e-4, 1e-7])
    correlations = axes * spectrum @ axes.T
    for units in (np.ones(4), np.array([1e-3, 1, 1e4, 7])):
        matrix = correlations * units * units[:, None]
        whitener = whiten(tensor(matrix), tolerance).numpy()
        assert whitener.shape[1] == rank
        kept = axes[:, :rank] / units[:, None] / np.sqrt(spectrum[:rank])
        np.testing.assert_allclose(whitener @ whitener.T, kept @ kept.T, rtol=1e-6, atol=1e-6 * np.abs(kept).max() ** 2)


def test_constant_features_are_taken_out_by_their_spread_and_not_by_their_unit():
    random = np.random.default_rng(0)
    features = random.normal(size=(50, 4)) * [1, 1e-9, 1e-9, 1] + [0, 1e3, 0, 5]  # only the second is constant
    covariance, mean = np.cov(features.T, bias=True), features.mean(0)
    found = without_constants(tensor(covariance), tensor(mean), 1e-6).numpy()
    assert not found[1].any() and not found[:, 1].any()
    kept = np.ix_([0, 2, 3], [0, 2, 3])
    np.testing.assert_array_equal(found[kept], covariance[kept])


@pytest.mark.parametrize("dependent", [False, True])
def test_a_nested_basis_spans_what_the_first_columns_span(dependent):
    random = np.random.default_rng(0)
    vectors, units = random.normal(size=(90, 75)), np.logspace(0, 6, 75)
    if dependent:
        vectors[:, 3] = vectors[:, :3] @ [1, -2, 3]
        vectors[:, 10:20] = vectors[:, :8] @ random.normal(size=(8, 10))
        vectors[:, 70] = vectors[:, :60] @ random.normal(size=60)
    points, ks = random.normal(size=(90, 7)), [1, 3, 4, 5, 9, 12, 20, 21, 66, 71, 75]
    basis = NestedBasis.of(tensor(vectors * units), ks)
    np.testing.assert_allclose(basis.q.T @ basis.q.numpy(), np.eye(90), atol=1e-12)  # Q is square and orthogonal
    norms = basis.projected_norms(tensor(points))
    for k, dimension, inside in zip(ks, basis.dims, norms, strict=True):
        expected, found = scipy.linalg.orth(vectors[:, :k], rcond=1e-10), basis.q[:, :dimension]
        assert dimension == expected.shape[1] and (dependent or dimension == k)
        np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-10)
        np.testing.assert_allclose(inside, np.square(expected.T @ points).sum(0), atol=1e-9)


def test_neither_a_column_twice_nor_one_of_rounding_adds_a_dimension():
    """QR puts an axis into the place of the copy, here that of the next column."""
    assert NestedBasis.of(torch.eye(4).double()[:, [0, 0, 1, 2, 3]], [1, 2, 3, 4, 5]).dims == [1, 1, 2, 3, 4]
    vectors = np.random.default_rng(0).normal(size=(20, 6)) * [1e-16, 1e-16, 1, 1, 1, 1]
    assert NestedBasis.of(tensor(vectors), [1, 2, 3, 6], torch.ones(6).double()).dims == [0, 0, 1, 4]


@pytest.mark.parametrize(("smallest", "rank"), [(4.5e-8, 50), (1e-9, 49)])
def test_measured_errors_explain_a_null_space_and_not_one_direction_that_stands_alone(smallest, rank):
    """Ten exact zeros become eigenvalues of about sqrt(10) errors; all errors together have the norm sqrt(60)."""
    random, units = np.random.default_rng(0), np.logspace(-2, 2, 60)
    spectrum = np.r_[np.linspace(1, 2, 49), smallest, np.zeros(10)]
    axes = scipy.linalg.hadamard(64)[:60, :60] / 8
    axes = np.linalg.qr(axes + 1e-3 * random.normal(size=(60, 60)))[0]
    exact = axes * spectrum @ axes.T
    error = 2e-9 * random.normal(size=(60, 60))
    error = (error + error.T) / np.sqrt(2) * np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    matrix, error = exact * np.outer(units, units) + error * np.outer(units, units), error * np.outer(units, units)
    noise = Noise(torch.zeros(60, dtype=torch.float64), tensor(error) @ random_signs(60))
    assert whiten(tensor(matrix), noise=noise).shape[1] == rank
