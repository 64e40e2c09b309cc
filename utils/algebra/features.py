"""Score pooled features for labels in closed form, from the moments of one layer; larger is better.

Symbols: n texts, d features, c classes; Sigma the covariance of the features, S their covariance with the one-hot
labels, p the class shares, D = diag(p) - p p' the covariance of the labels.
"""

import math
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from utils.algebra.linalg import rounding, whiten
from utils.algebra.moments import LayerMoments, PooledMoments
from utils.algebra.ridge import Pair, RidgeFit, fold_pairs, probe_scores, ridge

CLOSED_FORM_SCORES = ("ridge_r2", "h_oas", "h_ledoit_wolf", "logme", "cka", "probe_r2_held_out", "probe_r2")


def ledoit_wolf(moments: LayerMoments, sigma: Tensor) -> float:
    """Ledoit and Wolf's shrinkage intensity, as in scikit-learn, from the means of |m|^4 and |m|^2 m."""
    q, v = moments.pooled_norm_fourth_power, moments.pooled_norm_squared_pooled
    assert q is not None and v is not None
    n, d, mean = moments.num_samples, len(sigma), moments.pooled_mean
    squared, second = mean @ mean, moments.pooled_second_moment
    # mean over texts of |m - mu|^4
    fourth = q + 4 * mean @ second @ mean - 3 * squared**2 - 4 * mean @ v + 2 * squared * second.trace()
    distance = (sigma.square().sum() - sigma.trace() ** 2 / d) / d
    error = (fourth - sigma.square().sum()) / (d * n)
    return (torch.minimum(error, distance) / distance).item() if distance > 0 else 1.0


def oas(moments: LayerMoments, sigma: Tensor) -> float:
    """Chen et al.'s shrinkage intensity (oracle approximating shrinkage), as in scikit-learn."""
    mean_square, level = sigma.square().mean(), sigma.trace() / len(sigma)
    rest = mean_square - level**2 / len(sigma)
    shrinkage = (mean_square + level**2) / ((moments.num_samples + 1) * rest)
    return min(1.0, shrinkage.item()) if rest > 0 else 1.0


def h_score(moments: LayerMoments, sigma: Tensor, shrinkage: float) -> float:
    """The H-score (1-a) n/(n-1) tr(Sigma_a^-1 S_b) with shrinkage a.

    S_b = S diag(p)^-1 S' is the covariance between classes, Sigma_a = (1-a) Sigma + a (tr Sigma / d) I.
    """
    n, present = moments.num_samples, moments.label_mean > 0
    root = moments.pooled_label_covariance[:, present] * moments.label_mean[present].rsqrt()
    shrunk = (1 - shrinkage) * sigma + shrinkage * sigma.diagonal().mean() * torch.eye(len(sigma)).to(sigma)
    return ((1 - shrinkage) * n / (n - 1) * (root * torch.linalg.solve(shrunk, root)).sum()).item()


def log_evidence(eigenvalues: Tensor, projected: Tensor, square: Tensor, n: int, d: int) -> float:
    """LogME of one target: log evidence per text of Bayesian linear regression, at the best alpha and beta.

    Fixed point, constants and stopping rule are those of thuml/LogME. The last term, of the d - k directions in which
    features do not vary, is new; without it the evidence is too large if n < d.

    Args:
        eigenvalues: the non-zero eigenvalues of the sum of m m', (k,).
        projected, square: the sum of m y in that eigenbasis, (k,), and of y^2, a scalar.
    """
    explained = projected.square() / eigenvalues
    rest = square - explained.sum()
    alpha = beta = torch.ones_like(rest)
    for _ in range(11):
        t = alpha / beta
        gamma = (eigenvalues / (eigenvalues + t)).sum()
        length = (eigenvalues * explained / (t + eigenvalues).square()).sum()
        residual = (explained / (1 + eigenvalues / t).square()).sum() + rest
        alpha, beta = gamma / (length + 1e-5), (n - gamma) / (residual + 1e-5)
        if (alpha / beta - t).abs() <= 1e-3 * t:
            break
    determinant = (alpha + beta * eigenvalues).log().sum() + (d - len(eigenvalues)) * alpha.log()
    evidence = d * alpha.log() + n * beta.log() - determinant - beta * residual - alpha * length
    return ((evidence - n * math.log(2 * math.pi)) / (2 * n)).item()


def logme(moments: LayerMoments) -> float:
    """LogME of the labels: the mean over classes."""
    n, d = moments.num_samples, len(moments.pooled_mean)
    eigenvalues, basis = torch.linalg.eigh(moments.pooled_second_moment)
    kept = eigenvalues > rounding(d) * eigenvalues[-1]
    projected = n * basis[:, kept].T @ moments.pooled_label_cross_moment
    targets = zip(projected.T, n * moments.label_second_moment.diagonal(), strict=True)
    return fmean(log_evidence(n * eigenvalues[kept], *target, n, d) for target in targets)


def cka(moments: LayerMoments, sigma: Tensor) -> float:
    """Linear CKA |S|^2 / (|Sigma| |D|)."""
    scale = sigma.norm() * moments.label_covariance.norm()
    return (moments.pooled_label_covariance.square().sum() / scale).item()


def feature_scores(
    moments: LayerMoments, held_out: LayerMoments | None = None, folds: list[PooledMoments] | None = None
) -> tuple[dict[str, dict[str, Any]], list[RidgeFit]]:
    """Every score of one layer (no H-scores for a regression; ridge alone if m never varies), and the fits of ridge.

    A score has a `value` and a truth value `meaningless`; ridge also has `null_mean`, `null_std` and `z`. With fewer
    than two `folds` (from `load_folds`), ridge fits all texts and predicts the held-out ones, if any.
    """
    sigma, found, fits = moments.pooled_covariance, dict[str, dict[str, Any]](), list[RidgeFit]()
    pairs: list[Pair] = fold_pairs(folds) if folds and len(folds) > 1 else []
    if not pairs and held_out is not None:
        pairs = [(moments, held_out)]
    if pairs:
        found["ridge_r2"], fits = ridge(pairs, moments.label_covariance)
    whitener = whiten(sigma, noise=moments.covariance_rounding)
    if rank := whitener.shape[1]:
        values = probe_scores(moments, held_out, whitener @ (whitener.T @ moments.pooled_label_covariance))
        values |= {"cka": cka(moments, sigma), "logme": logme(moments)}
        if moments.class_counts is not None:
            values["h_oas"] = h_score(moments, sigma, oas(moments, sigma))
            values["h_ledoit_wolf"] = h_score(moments, sigma, ledoit_wolf(moments, sigma))
        known = {name: value for name, value in values.items() if value is not None}
        found |= {name: {"value": value if math.isfinite(value) else None} for name, value in known.items()}
    for name, entry in found.items():  # once n <= d the probe fits any labels on its own rows
        entry["meaningless"] = name == "probe_r2" and moments.num_samples <= max(len(sigma), rank + 1)
    return {name: found[name] for name in CLOSED_FORM_SCORES if name in found}, fits
