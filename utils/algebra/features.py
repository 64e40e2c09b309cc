"""Scores of pooled features for labels in closed form, from the moments of one layer: H-score, LogME, CKA, ridge, ...

Nothing here sees a text: n, the mean of m m', of m y' and of m are enough, with |m|^4 and |m|^2 m for one kind of
shrinkage. Each score comes with its mean and standard deviation under permuted labels, and says where it means nothing.

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

from utils.algebra.linalg import eigen_cut, rounding, whiten
from utils.algebra.moments import LayerMoments, probe_scores
from utils.algebra.permuted_labels import draw_permuted_factors
from utils.algebra.ridge import Judged, Value, fold_parts, part_of, ridge

NUM_DRAWS = 30  # of LogME under permuted labels; every other null is a formula


@dataclass(frozen=True)
class Definition:
    """What a score is, for a table's head and for who reads its numbers."""

    name: str
    label: str
    low: float | None  # range; None: unbounded
    high: float | None
    higher_is_better: bool | None  # None: it does not see the labels
    chance: str  # under permuted labels
    saturates: bool = False  # has its best value whatever the labels once n <= d
    needs_classes: bool = False  # not defined for regression


DEFINITIONS = (
    Definition("ridge_r2", "ridge R2, cross-validated", None, 1, True, "slightly below 0"),
    Definition("h_oas", "H-score, OAS shrinkage", 0, None, True, "about rho (c-1) / N", needs_classes=True),
    Definition("h_ledoit_wolf", "H-score, Ledoit-Wolf", 0, None, True, "about rho (c-1) / N", needs_classes=True),
    Definition("h_olse", "H-score, OLSE shrinkage", 0, None, True, "about rho (c-1) / N", needs_classes=True),
    Definition("logme", "LogME", None, None, True, "by draws"),
    Definition("cka", "linear CKA", 0, 1, True, "tr Sigma tr D / (N |Sigma| |D|)"),
    Definition("alignment", "kernel-target alignment", 0, 1, True, "that of the mean alone, and CKA's part"),
    Definition("probe_r2_held_out", "least-squares R2, held out", None, 1, True, "below 0 by about rho / N"),
    Definition("probe_r2", "least-squares R2, train", 0, 1, True, "rho / N", saturates=True),
    Definition("h_score", "H-score", 0, None, True, "rho (c-1) / N", saturates=True, needs_classes=True),
    Definition("h_share", "H-score / (c-1)", 0, 1, True, "rho / N", saturates=True, needs_classes=True),
    Definition("effective_rank", "effective rank", 1, None, None, "the same"),
    Definition("participation_ratio", "participation ratio", 1, None, None, "the same"),
)
NAMES = tuple(definition.name for definition in DEFINITIONS)
LABELS = {definition.name: definition.label for definition in DEFINITIONS}
SEEING = tuple(definition.name for definition in DEFINITIONS if definition.higher_is_better)


# ------------------------------------------------------------------ H-score
def label_root(moments: LayerMoments) -> Tensor:
    """S diag(p)^-1/2, (d, classes present): its square is the between-class covariance S_b."""
    present = moments.label_mean > 0
    return moments.pooled_label_covariance[:, present] * moments.label_mean[present].rsqrt()


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
    d = len(sigma)
    mean_square, level = sigma.square().mean(), sigma.trace() / d
    rest = mean_square - level**2 / d
    shrinkage = (mean_square + level**2) / ((moments.num_samples + 1) * rest)
    return min(1.0, shrinkage.item()) if rest > 0 else 1.0


def olse(moments: LayerMoments, sigma: Tensor) -> float:
    """Bodnar et al.'s shrinkage intensity."""
    rest = sigma.square().sum() - sigma.trace() ** 2 / len(sigma)
    return min(1.0, (sigma.trace() ** 2 / moments.num_samples / rest).item()) if rest > 0 else 1.0


SHRINKAGES: dict[str, Callable[[LayerMoments, Tensor], float]] = {
    "h_oas": oas,
    "h_ledoit_wolf": ledoit_wolf,
    "h_olse": olse,
}


def weighted_null(weights: Tensor, num_labels: int, freedom: int) -> tuple[float, float]:
    """Mean and deviation of sum_k w_k P_kk, P a random projector of rank `num_labels` in `freedom` dimensions.

    That is what the label directions, whitened, are under permuted labels; w = 1 gives the H-score.
    """
    b, n = min(num_labels, freedom), freedom
    mean = weights.sum().item() * b / n
    if n < 2:
        return mean, 0.0
    one = 2 * b * (n - b) / (n**2 * (n + 2))  # variance of one P_kk; the P_kk sum to b
    square = weights.square().sum().item()
    variance = one * (square - (weights.sum().item() ** 2 - square) / (n - 1))
    return mean, math.sqrt(max(0.0, variance))


def h_scores(moments: LayerMoments, whitener: Tensor, spectrum: tuple[Tensor, Tensor]) -> dict[str, Value]:
    """H = tr(Sigma^+ S_b), its share of c - 1, and (1-a) n/(n-1) tr(Sigma_a^-1 S_b) for each shrinkage a."""
    root, freedom, rank = label_root(moments), moments.num_samples - 1, whitener.shape[1]
    num_labels = root.shape[1] - 1
    eigenvalues, basis = spectrum
    value = (whitener.T @ root).square().sum().item()
    mean, std = weighted_null(torch.ones(min(rank, freedom)), num_labels, freedom)
    scores = {"h_score": Value(value, mean, std)}
    scores["h_share"] = Value(*(number / num_labels for number in scores["h_score"]))
    along = (basis.T @ root).square().sum(1)
    sigma = moments.pooled_covariance
    for name, shrinkage in SHRINKAGES.items():
        a = shrinkage(moments, sigma)
        if math.isnan(a):
            continue
        factor = (1 - a) * moments.num_samples / freedom
        shrunk = (1 - a) * eigenvalues + a * sigma.trace() / len(sigma)
        kept = shrunk > 0
        weights = factor * eigenvalues[kept] / shrunk[kept]
        value = factor * (along[kept] / shrunk[kept]).sum().item()
        scores[name] = Value(value, *weighted_null(weights, num_labels, freedom))
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


def logme(moments: LayerMoments, spectrum: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], random: Any) -> Value:
    """LogME, mean over classes; the null by draws.

    Args:
        moments: of the layer.
        spectrum: eigenvalues and eigenvectors of Sigma, without zeros.
        second: the same of M.
        random: source of randomness.
    """
    n, d = moments.num_samples, len(moments.pooled_mean)
    eigenvalues, basis = second
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


# ------------------------------------------------------------------ kernels and the spectrum
def kernel_scores(moments: LayerMoments) -> dict[str, Value]:
    """Linear CKA |S|^2 / (|Sigma| |D|), and its uncentred twin |B|^2 / (|M| |mean of y y'|)."""
    sigma, labels, cross = moments.pooled_covariance, moments.label_covariance, moments.pooled_label_covariance
    freedom, p, mean = moments.num_samples - 1, moments.label_mean, moments.pooled_mean
    expected = (sigma.trace() * labels.trace() / freedom).item()
    variance = (2 * sigma.square().sum() * labels.square().sum() / freedom**2).item()
    scale = (sigma.norm() * labels.norm()).item() or math.nan
    scores = {"cka": Value(cross.square().sum().item() / scale, expected / scale, math.sqrt(variance) / scale)}
    scale = (moments.pooled_second_moment.norm() * moments.label_second_moment.norm()).item()
    constant = ((mean @ mean) * (p @ p)).item()
    variance += (4 * (mean @ sigma @ mean) * (p @ labels @ p) / freedom).item()
    value = moments.pooled_label_cross_moment.square().sum().item()
    scores["alignment"] = Value(value / scale, (constant + expected) / scale, math.sqrt(variance) / scale)
    return scores


def nonzero_spectrum(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix; the `rank` largest, or those above d * eps."""
    eigenvalues, basis = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = eigen_cut(eigenvalues, rounding(len(matrix))) & (eigenvalues > 0)
    if rank is not None:
        kept &= torch.arange(len(eigenvalues)).to(kept.device) >= len(eigenvalues) - rank
    return eigenvalues[kept], basis[:, kept]


def effective_rank(eigenvalues: Tensor) -> float:
    """exp of the entropy of the singular values of the features, from the eigenvalues of M (RankMe)."""
    shares = eigenvalues.sqrt() / eigenvalues.sqrt().sum()
    return torch.exp(-(shares * shares.log()).sum()).item()


# ------------------------------------------------------------------ probes
def least_squares(moments: LayerMoments, held_out: LayerMoments | None, whitener: Tensor) -> dict[str, Value]:
    """R2 of the least-squares probe with intercept on its own texts and on those held out."""
    freedom, rank, labels = moments.num_samples - 1, whitener.shape[1], moments.label_covariance
    r2 = probe_scores(moments, held_out, whitener @ (whitener.T @ moments.pooled_label_covariance))
    eigenvalues = torch.linalg.eigvalsh(labels)
    mean, std = weighted_null(eigenvalues, min(rank, freedom), freedom)  # the roles of features and labels swapped
    variance = labels.trace().item()
    train = r2["probe_r2"]
    scores = {"probe_r2": Value(math.nan if train is None else train, mean / variance, std / variance)}
    if held_out is not None and r2["probe_r2_held_out"] is not None:
        shift = held_out.pooled_mean - moments.pooled_mean
        spread = whitener.T @ (held_out.pooled_covariance + torch.outer(shift, shift)) @ whitener
        shared, other = labels.square().sum().item() / variance**2, held_out.label_covariance.trace().item()
        null = -spread.trace().item() * variance / (freedom * other)
        quadratic = 2 * spread.square().sum().item() / freedom**2
        bilinear = 4 * spread.trace().item() / (freedom * held_out.num_samples)
        deviation = math.sqrt(shared * (quadratic + bilinear)) * variance / other
        scores["probe_r2_held_out"] = Value(r2["probe_r2_held_out"], null, deviation)
    return scores


# ------------------------------------------------------------------ all of them
class LayerScores(NamedTuple):
    """Every score of a layer, and the parts of its cross-validated ridge regression."""

    scores: dict[str, dict[str, Any]]  # name -> value, null_mean, null_std, z, meaningless
    parts: list[Judged]  # of each fold, or of the other split; none where neither is there


def as_entry(definition: Definition, found: Value, saturated: bool) -> dict[str, Any]:
    """A score as it stands in a JSON result: None for what is not a number, z = (value - mean) / deviation."""
    z = (found.value - found.null_mean) / found.null_std if found.null_std > 1e-12 else math.nan
    numbers = {name: x if math.isfinite(x) else None for name, x in {**found._asdict(), "z": z}.items()}
    return {**numbers, "meaningless": saturated and definition.saturates}


def layer_scores(
    moments: LayerMoments,
    held_out: LayerMoments | None = None,
    folds: tuple[dict[str, Tensor], Tensor] | None = None,
    seed: tuple[int, ...] = (0, 0),
) -> LayerScores:
    """Every score of one layer. What cannot be had is not there: H-scores of a regression, all where m never varies.

    Args:
        moments: of the layer.
        held_out: the same of the other split.
        folds: of `utils.algebra.ridge.load_folds`; None: ridge is fitted on all texts and judged by the other split.
        seed: of the draws of LogME.
    """
    sigma, found = moments.pooled_covariance, dict[str, Value]()
    pairs = fold_parts(*folds) if folds else []
    if len(pairs) < 2 and held_out is not None:
        pairs = [(part_of(moments), part_of(held_out))]
    parts: list[Judged] = []
    if pairs and pairs[0][0].num > 0:
        found["ridge_r2"], parts = ridge(pairs, moments.label_covariance)
    whitener = whiten(sigma, noise=moments.pooled_noise(center=True))
    if rank := whitener.shape[1]:
        spectrum, second = nonzero_spectrum(sigma, rank), nonzero_spectrum(moments.pooled_second_moment)
        found |= least_squares(moments, held_out, whitener) | kernel_scores(moments)
        if moments.class_counts is not None:
            found |= h_scores(moments, whitener, spectrum)
        found["logme"] = logme(moments, spectrum, second, np.random.default_rng(seed))
        found["effective_rank"] = Value(effective_rank(second[0]))
        found["participation_ratio"] = Value((sigma.trace() ** 2 / sigma.square().sum()).item())
    saturated = moments.num_samples <= max(len(sigma), rank + 1)
    entries = {d.name: as_entry(d, found[d.name], saturated) for d in DEFINITIONS if d.name in found}
    return LayerScores(entries, parts)
