"""Fit linear probes from moments: least squares, and ridge regression evaluated on held-out texts."""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.algebra.linalg import equilibrated_eigh, without_constants
from utils.algebra.moments import LayerMoments, PooledMoments

ALPHAS = tuple(10.0**power for power in range(-1, 6))  # penalties on the scale of sums
Pair = tuple[PooledMoments, PooledMoments]  # moments of the texts to fit, and of the texts to evaluate
FIELDS = tuple(field.name for field in dataclasses.fields(PooledMoments))


def load_folds(file: Any, layer: int, device: torch.device) -> list[PooledMoments]:
    """The moments of one layer over each fold that has texts; empty if the open file of cache.py lacks them."""
    names = [f"layer.{layer}.fold_{name}" if name.startswith("pooled_") else f"fold_{name}" for name in FIELDS]
    if names[0] not in file.keys():  # noqa: SIM118, no dict
        return []
    *averages, counts = (file.get_tensor(name).to(device) for name in names)
    return [PooledMoments(*fold) for fold in zip(*averages, map(int, counts.tolist()), strict=True) if fold[-1]]


def fold_pairs(folds: list[PooledMoments]) -> list[Pair]:
    """A pair per fold: the moments of the other folds, to fit, and its own, to evaluate."""
    pairs = []
    for i, fold in enumerate(folds):
        others = folds[:i] + folds[i + 1 :]
        num = sum(other.num_samples for other in others)
        averages: dict[str, Any] = {
            name: sum(other.num_samples / num * getattr(other, name) for other in others) for name in FIELDS[:-1]
        }
        pairs.append((PooledMoments(**averages, num_samples=num), fold))
    return pairs


def centred_at(train: PooledMoments, test: PooledMoments) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of `test` about the means of `train`: features (d, d), features with labels (d, c), mean |labels|^2."""
    shift, label_shift = test.pooled_mean - train.pooled_mean, test.label_mean - train.label_mean
    second = test.pooled_covariance + torch.outer(shift, shift)
    cross = test.pooled_label_covariance + torch.outer(shift, label_shift)
    return second, cross, test.label_covariance.trace() + label_shift.square().sum()


def mean_square_error(weights: Tensor, about: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean of |y - W' m|^2 with an intercept, from the moments of `centred_at`."""
    second, cross, label_square = about
    return label_square + (weights * (second @ weights - 2 * cross)).sum()


def probe_scores(moments: LayerMoments, held_out: LayerMoments | None, weights: Tensor) -> dict[str, float | None]:
    """MSE and R2 of the least-squares probe with intercept, on its own rows and on held-out ones (None if missing)."""
    scores: dict[str, float | None] = {}
    for suffix, rows in (("", moments), ("_held_out", held_out)):
        scores[f"probe_mse{suffix}"] = scores[f"probe_r2{suffix}"] = None
        if rows is not None:
            error = mean_square_error(weights, centred_at(moments, rows)).item()
            scores[f"probe_mse{suffix}"] = error / weights.shape[1]
            scores[f"probe_r2{suffix}"] = 1 - error / rows.label_covariance.trace().item() if rows.labels_vary else None
    return scores


class RidgeFit(NamedTuple):
    """Sums of squares of a ridge regression over held-out texts, and its shrinkage."""

    error: float  # sum |y - prediction|^2
    baseline: float  # sum |y - mean y of the training texts|^2
    null_error: float  # mean error under permuted labels, minus the baseline
    shrinkage: Tensor  # lambda / (lambda + alpha / n) of each direction, ascending


def fit_ridge(train: PooledMoments, test: PooledMoments) -> RidgeFit:
    """Ridge with an intercept on standardised features, fitted on `train` and evaluated on `test`.

    One decomposition serves every alpha: with the eigenvalues lambda of the correlation matrix and its basis A the
    weights are A diag(1 / (lambda + alpha / n)) A' S. Generalised cross-validation on `train` alone chooses alpha, on
    the scale of sums as in scikit-learn's `Ridge`.
    """
    n, label_variance = train.num_samples, train.label_covariance.trace()
    eigenvalues, basis = equilibrated_eigh(without_constants(train.pooled_covariance, train.pooled_mean, 1e-10))
    eigenvalues = eigenvalues.clamp(min=0)
    cross = basis.T @ train.pooled_label_covariance
    along = cross.square().sum(1)

    def validation_error(alpha: float) -> float:
        ridge = eigenvalues + alpha / n
        loss = label_variance - 2 * (along / ridge).sum() + (eigenvalues * along / ridge.square()).sum()
        return (loss / (1 - (1 + (eigenvalues / ridge).sum()) / n).clamp(min=1e-9).square()).item()

    ridge = eigenvalues + min(ALPHAS, key=validation_error) / n
    about = second, _, baseline = centred_at(train, test)
    error = mean_square_error(basis @ (cross / ridge[:, None]), about)
    spread = ((second @ basis) * basis).sum(0)  # variance of the test texts in each direction
    null_error = label_variance * (spread * eigenvalues / ridge.square()).sum() / n
    sums = [test.num_samples * mean.item() for mean in (error, baseline, null_error)]
    return RidgeFit(sums[0], sums[1], sums[2], shrinkage=eigenvalues / ridge)


def ridge(pairs: list[Pair], labels: Tensor) -> tuple[dict[str, float | None], list[RidgeFit]]:
    """R2 over all held-out texts, its mean, deviation and z under permuted `labels`, (c, c); and the fits."""
    fits = [fit_ridge(*pair) for pair in pairs]
    baseline = sum(fit.baseline for fit in fits)
    if not baseline > 0:  # the held-out texts have equal labels
        return dict.fromkeys(("value", "null_mean", "null_std", "z")), fits
    value = 1 - sum(fit.error for fit in fits) / baseline
    null_mean = -sum(fit.null_error for fit in fits) / baseline
    null_std = ridge_null_std(torch.stack([fit.shrinkage for fit in fits]).mean(0), labels, pairs)
    z = (value - null_mean) / null_std if null_std > 1e-12 else None
    return {"value": value, "null_mean": null_mean, "null_std": null_std, "z": z}, fits


def ridge_null_std(shrinkage: Tensor, labels: Tensor, pairs: list[Pair]) -> float:
    """Standard deviation of the R2 of `ridge` under permuted labels, for one held-out part or for all folds.

    Permuted, the sums of (m - mu)(y - p)' over each fold are independent and nearly normal. The errors of two folds
    share the product of their sums, which counts once.
    """
    s, folds = shrinkage, len(pairs)
    shared = (labels.square().sum() / labels.trace().square()).item()
    if folds == 1:
        (train, test) = pairs[0]
        variance = (2 * s**4 / train.num_samples**2 + 4 * s**2 / (train.num_samples * test.num_samples)).sum().item()
    else:
        total = sum(test.num_samples for _, test in pairs)
        between = 4 * s / (folds - 1) - 2 * (folds - 2) * s**2 / (folds - 1) ** 2
        within = s**2 / (folds - 1)
        variance = (folds * (folds - 1) / 2 * between**2 + 2 * folds * within**2).sum().item() / total**2
    return math.sqrt(shared * variance)
