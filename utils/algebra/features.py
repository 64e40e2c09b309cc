"""Scores of pooled features for labels in closed form, from the moments of one layer: ridge, H-score, LogME, CKA, R2.

Each score comes with its mean and standard deviation under permuted labels, and says where it means nothing. Nothing
here sees a text: n, the mean of m m', of m y' and of m are enough, with |m|^4 and |m|^2 m for Ledoit-Wolf shrinkage.

Symbols: n texts, d features, c classes; Sigma the covariance of the features, S that with the one-hot labels, p the
class shares, D = diag(p) - p p' the covariance of the labels, W the whitener of Sigma, rho its rank, N = n - 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.algebra.linalg import rounding, whiten
from utils.algebra.moments import LayerMoments
from utils.algebra.nulls import draw_permuted_factors
from utils.algebra.ridge import RidgeFit, Value, about_means_of, fold_moments, probe_scores, ridge, whole_split

NUM_DRAWS = 30  # of LogME under permuted labels; every other null is a formula


@dataclass(frozen=True)
class Definition:
    """A score's name and reading, for tables and their readers; larger is better for each."""

    name: str
    label: str
    saturates: bool = False  # has its best value whatever the labels once n <= d
    needs_classes: bool = False  # not defined for regression


DEFINITIONS = (
    Definition("ridge_r2", "ridge R2, cross-validated"),
    Definition("h_oas", "H-score, OAS shrinkage", needs_classes=True),
    Definition("h_ledoit_wolf", "H-score, Ledoit-Wolf", needs_classes=True),
    Definition("logme", "LogME"),
    Definition("cka", "linear CKA"),
    Definition("probe_r2_held_out", "least-squares R2, held out"),
    Definition("probe_r2", "least-squares R2, train", saturates=True),
)
NAMES = tuple(definition.name for definition in DEFINITIONS)
LABELS = {definition.name: definition.label for definition in DEFINITIONS}


def weighted_null(weights: Tensor, num_labels: int, freedom: int) -> tuple[float, float]:
    """Mean and deviation of sum_k w_k P_kk, P a random projector of rank `num_labels` in `freedom` dimensions.

    Permuted labels make P of the label directions, whitened; w = 1 gives the H-score without shrinkage.
    """
    b, n = min(num_labels, freedom), freedom
    mean = weights.sum().item() * b / n
    if n < 2:
        return mean, 0.0
    one = 2 * b * (n - b) / (n**2 * (n + 2))  # variance of one P_kk; the P_kk sum to b
    square = weights.square().sum().item()
    variance = one * (square - (weights.sum().item() ** 2 - square) / (n - 1))
    return mean, math.sqrt(max(0.0, variance))


# ------------------------------------------------------------------ H-score
def ledoit_wolf(moments: LayerMoments, sigma: Tensor) -> float:
    """Ledoit and Wolf's shrinkage intensity: scikit-learn's, from sum |m|^4 and sum |m|^2 m."""
    q, v = moments.pooled_norm_fourth_power, moments.pooled_norm_squared_pooled
    if q is None or v is None:
        return math.nan
    n, d, mean = moments.num_samples, len(sigma), moments.pooled_mean
    squared, second = mean @ mean, moments.pooled_second_moment
    # the mean over texts of |m - mu|^4
    fourth = q + 4 * mean @ second @ mean - 3 * squared**2 - 4 * mean @ v + 2 * squared * second.trace()
    distance = (sigma.square().sum() - sigma.trace() ** 2 / d) / d
    error = (fourth - sigma.square().sum()) / (d * n)
    return (torch.minimum(error, distance) / distance).item() if distance > 0 else 1.0


def oas(moments: LayerMoments, sigma: Tensor) -> float:
    """The shrinkage intensity of Chen et al.'s oracle approximating shrinkage: scikit-learn's."""
    mean_square, level = sigma.square().mean(), sigma.trace() / len(sigma)
    rest = mean_square - level**2 / len(sigma)
    shrinkage = (mean_square + level**2) / ((moments.num_samples + 1) * rest)
    return min(1.0, shrinkage.item()) if rest > 0 else 1.0


SHRINKAGES: dict[str, Callable[[LayerMoments, Tensor], float]] = {"h_oas": oas, "h_ledoit_wolf": ledoit_wolf}


def h_scores(moments: LayerMoments, spectrum: tuple[Tensor, Tensor]) -> dict[str, Value]:
    """(1-a) n/(n-1) tr(Sigma_a^-1 S_b) for each shrinkage a, Sigma_a = (1-a) Sigma + a (tr Sigma / d) I.

    S_b = S diag(p)^-1 S' is the covariance between classes.
    """
    (eigenvalues, basis), sigma, freedom = spectrum, moments.pooled_covariance, moments.num_samples - 1
    present = moments.label_mean > 0
    root = moments.pooled_label_covariance[:, present] * moments.label_mean[present].rsqrt()
    along = (basis.T @ root).square().sum(1)
    scores = {}
    for name, shrinkage in SHRINKAGES.items():
        a = shrinkage(moments, sigma)
        if math.isnan(a):
            continue
        factor = (1 - a) * moments.num_samples / freedom
        shrunk = (1 - a) * eigenvalues + a * sigma.trace() / len(sigma)
        kept = shrunk > 0
        value = factor * (along[kept] / shrunk[kept]).sum().item()
        null = weighted_null(factor * eigenvalues[kept] / shrunk[kept], root.shape[1] - 1, freedom)
        scores[name] = Value(value, *null)
    return scores


# ------------------------------------------------------------------ LogME
def log_evidence(eigenvalues: Tensor, projected: Tensor, squares: Tensor, n: int, d: int) -> Tensor:
    """LogME of each target, (targets,): the evidence of Bayesian linear regression, a text, at its best alpha and beta.

    thuml/LogME's fixed point, constants and stopping rule, each target from alpha = beta = 1, with the term of the
    d - k directions in which the features do not vary: without it the evidence is too large where n < d.

    Args:
        eigenvalues: of the sum of m m', without zeros, (k,).
        projected: the sums of m y in that eigenbasis, (k, targets).
        squares: the sum of y^2 of each target, (targets,).
        n: texts.
        d: features.
    """
    sigma = eigenvalues[:, None]
    explained = projected.square() / sigma
    rest = squares - explained.sum(0)
    alpha, beta = torch.ones_like(squares), torch.ones_like(squares)
    length, residual = torch.zeros_like(squares), torch.zeros_like(squares)
    running = torch.ones_like(squares, dtype=torch.bool)
    for _ in range(11):
        t = alpha / beta
        gamma = (sigma / (sigma + t)).sum(0)
        new_length = (sigma * explained / (t + sigma).square()).sum(0)
        new_residual = (explained / (1 + sigma / t).square()).sum(0) + rest
        length = torch.where(running, new_length, length)
        residual = torch.where(running, new_residual, residual)
        alpha = torch.where(running, gamma / (new_length + 1e-5), alpha)
        beta = torch.where(running, (n - gamma) / (new_residual + 1e-5), beta)
        running = running & ((alpha / beta - t).abs() / t > 1e-3)
        if not running.any():
            break
    determinant = (alpha + beta * sigma).log().sum(0) + (d - len(eigenvalues)) * alpha.log()
    evidence = d * alpha.log() + n * beta.log() - determinant - beta * residual - alpha * length
    return (evidence - n * math.log(2 * math.pi)) / (2 * n)


def logme(moments: LayerMoments, spectrum: tuple[Tensor, Tensor], random: np.random.Generator) -> Value:
    """LogME, mean over classes; the null by draws.

    Args:
        moments: of the layer.
        spectrum: eigenvalues and eigenvectors of Sigma, without zeros.
        random: source of randomness.
    """
    n, d = moments.num_samples, len(moments.pooled_mean)
    eigenvalues, basis = nonzero_spectrum(moments.pooled_second_moment)
    squares = n * moments.label_second_moment.diagonal()
    projected = n * basis.T @ moments.pooled_label_cross_moment
    value = log_evidence(n * eigenvalues, projected, squares, n, d).mean().item()
    variances, directions = spectrum
    draws = draw_permuted_factors(len(variances), n, moments.label_covariance, NUM_DRAWS, random).factors
    # thin products: of all draws at once, never of two d x d matrices
    drawn = directions @ (variances.sqrt()[:, None] * draws.transpose(0, 1).flatten(1))
    offset = torch.outer(moments.pooled_mean, moments.label_mean).repeat(1, NUM_DRAWS)
    permuted = n * basis.T @ (drawn + offset)
    null = log_evidence(n * eigenvalues, permuted, squares.repeat(NUM_DRAWS), n, d).view(NUM_DRAWS, -1).mean(1)
    return Value(value, null.mean().item(), null.std().item())


def nonzero_spectrum(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix; the `rank` largest, or those above d * eps."""
    eigenvalues, basis = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = eigenvalues > rounding(len(matrix)) * eigenvalues[-1].clamp(min=0)
    if rank is not None:
        kept[: len(eigenvalues) - rank] = False
    return eigenvalues[kept], basis[:, kept]


# ------------------------------------------------------------------ CKA, least squares
def cka(moments: LayerMoments) -> Value:
    """Linear CKA |S|^2 / (|Sigma| |D|)."""
    sigma, labels = moments.pooled_covariance, moments.label_covariance
    freedom, scale = moments.num_samples - 1, (sigma.norm() * labels.norm()).item() or math.nan
    mean = (sigma.trace() * labels.trace() / freedom).item()
    variance = (2 * sigma.square().sum() * labels.square().sum() / freedom**2).item()
    value = moments.pooled_label_covariance.square().sum().item()
    return Value(value / scale, mean / scale, math.sqrt(variance) / scale)


def least_squares(moments: LayerMoments, held_out: LayerMoments | None, whitener: Tensor) -> dict[str, Value]:
    """R2 of the least-squares probe with intercept on its own texts and on those held out."""
    freedom, rank, labels = moments.num_samples - 1, whitener.shape[1], moments.label_covariance
    r2 = probe_scores(moments, held_out, whitener @ (whitener.T @ moments.pooled_label_covariance))
    # the roles of features and labels swapped
    mean, std = weighted_null(torch.linalg.eigvalsh(labels), min(rank, freedom), freedom)
    variance, train = labels.trace().item(), r2["probe_r2"]
    scores = {"probe_r2": Value(math.nan if train is None else train, mean / variance, std / variance)}
    if held_out is not None and r2["probe_r2_held_out"] is not None:
        spread = whitener.T @ about_means_of(whole_split(moments), whole_split(held_out))[0] @ whitener
        shared, other = labels.square().sum().item() / variance**2, held_out.label_covariance.trace().item()
        null = -spread.trace().item() * variance / (freedom * other)
        quadratic = 2 * spread.square().sum().item() / freedom**2
        bilinear = 4 * spread.trace().item() / (freedom * held_out.num_samples)
        deviation = math.sqrt(shared * (quadratic + bilinear)) * variance / other
        scores["probe_r2_held_out"] = Value(r2["probe_r2_held_out"], null, deviation)
    return scores


# ------------------------------------------------------------------ all of them
class FeatureScores(NamedTuple):
    """Every score of a layer, and the fits of its ridge regression."""

    scores: dict[str, dict[str, Any]]  # name -> value, null_mean, null_std, z, meaningless
    fits: list[RidgeFit]  # of each fold, or of the other split; none without either


def as_entry(definition: Definition, found: Value, saturated: bool) -> dict[str, Any]:
    """A score as it stands in a JSON result: None for what is not a number, z = (value - mean) / deviation."""
    z = (found.value - found.null_mean) / found.null_std if found.null_std > 1e-12 else math.nan
    numbers = {name: x if math.isfinite(x) else None for name, x in {**found._asdict(), "z": z}.items()}
    return {**numbers, "meaningless": saturated and definition.saturates}


def feature_scores(
    moments: LayerMoments,
    held_out: LayerMoments | None = None,
    folds: tuple[dict[str, Tensor], Tensor] | None = None,
    seed: tuple[int, ...] = (0, 0),
) -> FeatureScores:
    """Every score of one layer, but H-scores of a regression; ridge alone where m never varies.

    Args:
        moments: of the layer.
        held_out: the same of the other split.
        folds: of `utils.algebra.ridge.load_folds`; None: ridge is fitted on all texts and judged by the other split.
        seed: of the draws of LogME.
    """
    sigma, found = moments.pooled_covariance, dict[str, Value]()
    pairs = fold_moments(*folds) if folds else []
    if len(pairs) < 2 and held_out is not None:
        pairs = [(whole_split(moments), whole_split(held_out))]
    fits: list[RidgeFit] = []
    if pairs and pairs[0][0].num > 0:
        found["ridge_r2"], fits = ridge(pairs, moments.label_covariance)
    whitener = whiten(sigma, noise=moments.pooled_noise(center=True))
    if rank := whitener.shape[1]:
        spectrum = nonzero_spectrum(sigma, rank)
        found |= least_squares(moments, held_out, whitener) | {"cka": cka(moments)}
        if moments.class_counts is not None:
            found |= h_scores(moments, spectrum)
        found["logme"] = logme(moments, spectrum, np.random.default_rng(seed))
    saturated = moments.num_samples <= max(len(sigma), rank + 1)
    entries = {d.name: as_entry(d, found[d.name], saturated) for d in DEFINITIONS if d.name in found}
    return FeatureScores(entries, fits)
