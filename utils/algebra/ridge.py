"""Fit linear probes from moments: least squares, and ridge regression judged on held-out texts."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.algebra.linalg import equilibrated_eigh, without_constants
from utils.algebra.moments import LayerMoments

ALPHAS = tuple(10.0**power for power in range(-1, 6))  # on the scale of sums


# ------------------------------------------------------------------ moments of some of the texts
class Moments(NamedTuple):
    """Averages over some texts, and the number of texts: enough to fit or to judge a ridge regression."""

    second: Tensor  # (d, d)
    cross: Tensor  # (d, c)
    mean: Tensor  # (d,)
    label_mean: Tensor  # (c,)
    label_square: Tensor  # mean of |y|^2, a scalar
    num: float


Pair = tuple[Moments, Moments]  # moments of the texts to fit, and of the texts to judge


def whole_split(moments: LayerMoments) -> Moments:
    """The moments of all texts of a split, for ridge."""
    second, cross = moments.pooled_second_moment, moments.pooled_label_cross_moment
    square = moments.label_second_moment.trace()
    return Moments(second, cross, moments.pooled_mean, moments.label_mean, square, float(moments.num_samples))


def load_folds(file: Any, layer: int, device: torch.device) -> list[Moments]:
    """The moments of one layer over each fold that has texts; empty if the open file of cache.py does not keep them."""
    if f"layer.{layer}.fold_pooled_mean" not in file.keys():  # noqa: SIM118, no dict
        return []
    names = [f"layer.{layer}.fold_pooled_{name}" for name in ("second_moment", "label_cross_moment", "mean")]
    names += [f"fold_{name}" for name in ("label_mean", "label_second_moment", "num_samples")]
    *averages, label_seconds, counts = (file.get_tensor(name).to(device) for name in names)
    folds = zip(*averages, label_seconds.diagonal(dim1=1, dim2=2).sum(1), counts.tolist(), strict=True)
    return [Moments(*fold) for fold in folds if fold[-1] > 0]


def fold_pairs(folds: list[Moments]) -> list[Pair]:
    """The moments outside each fold (to fit) and inside it (to judge)."""
    pairs = []
    for i, fold in enumerate(folds):
        others = folds[:i] + folds[i + 1 :]
        num = sum(other.num for other in others)
        averages = [sum(other.num / num * other[j] for other in others) for j in range(len(fold) - 1)]
        pairs.append((Moments._make([*averages, num]), fold))
    return pairs


def centred_at(train: Moments, test: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of `test` about the means of `train`: of features (d, d), with labels (d, c), and of |labels|^2."""
    shift, label_shift = test.mean - train.mean, test.label_mean - train.label_mean
    second = test.second - torch.outer(test.mean, test.mean) + torch.outer(shift, shift)
    cross = test.cross - torch.outer(test.mean, test.label_mean) + torch.outer(shift, label_shift)
    return second, cross, test.label_square - test.label_mean.square().sum() + label_shift.square().sum()


def mean_square_error(weights: Tensor, about: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean of |y - W' m|^2 with an intercept, from the moments of `centred_at`."""
    second, cross, label_square = about
    return label_square + (weights * (second @ weights - 2 * cross)).sum()


# ------------------------------------------------------------------ least squares
def probe_scores(moments: LayerMoments, held_out: LayerMoments | None, weights: Tensor) -> dict[str, float | None]:
    """MSE and R2 of the least-squares probe with intercept, on its own rows and on the held-out ones (None without)."""
    train, scores = whole_split(moments), dict[str, float | None]()
    for suffix, rows in (("", moments), ("_held_out", held_out)):
        scores[f"probe_mse{suffix}"] = scores[f"probe_r2{suffix}"] = None
        if rows is not None:
            error = mean_square_error(weights, centred_at(train, whole_split(rows))).item()
            scores[f"probe_mse{suffix}"] = error / weights.shape[1]
            scores[f"probe_r2{suffix}"] = 1 - error / rows.label_covariance.trace().item() if rows.labels_vary else None
    return scores


# ------------------------------------------------------------------ ridge
class RidgeFit(NamedTuple):
    """A ridge regression judged on held-out texts: sums of squares over these."""

    error: float  # sum |y - prediction|^2
    baseline: float  # sum |y - mean y of the training texts|^2
    null_error: float  # the mean that permuted labels add to the baseline
    shrinkage: Tensor  # lambda / (lambda + alpha / n) of each direction, ascending


def fit_ridge(train: Moments, test: Moments) -> RidgeFit:
    """Ridge with an intercept on standardised features, fitted on `train` and judged by `test`.

    One decomposition serves every alpha: with the eigenvalues lambda of the correlation matrix and its basis A the
    weights are A diag(1 / (lambda + alpha / n)) A' S. alpha, on the scale of sums as in scikit-learn's `Ridge`, is
    chosen by generalised cross-validation within `train`: the texts that judge have no say in it.
    """
    n, label_variance = train.num, train.label_square - train.label_mean.square().sum()
    covariance = train.second - torch.outer(train.mean, train.mean)
    eigenvalues, basis = equilibrated_eigh(without_constants(covariance, train.mean, 1e-10))
    eigenvalues = eigenvalues.clamp(min=0)
    cross = basis.T @ (train.cross - torch.outer(train.mean, train.label_mean))
    along = cross.square().sum(1)

    def validation_error(alpha: float) -> float:
        ridge = eigenvalues + alpha / n
        loss = label_variance - 2 * (along / ridge).sum() + (eigenvalues * along / ridge.square()).sum()
        return (loss / (1 - (1 + (eigenvalues / ridge).sum()) / n).clamp(min=1e-9).square()).item()

    ridge = eigenvalues + min(ALPHAS, key=validation_error) / n
    about = second, _, baseline = centred_at(train, test)
    error = mean_square_error(basis @ (cross / ridge[:, None]), about)
    spread = ((second @ basis) * basis).sum(0)  # variance of the judging texts in each direction
    null_error = label_variance * (spread * eigenvalues / ridge.square()).sum() / n
    sums = [test.num * mean.item() for mean in (error, baseline, null_error)]
    return RidgeFit(sums[0], sums[1], sums[2], shrinkage=eigenvalues / ridge)


def ridge(pairs: list[Pair], labels: Tensor) -> tuple[dict[str, float | None], list[RidgeFit]]:
    """R2 over all judging texts; its mean, deviation and z if labels, of covariance (c, c), are permuted; the fits."""
    fits = [fit_ridge(*pair) for pair in pairs]
    baseline = sum(fit.baseline for fit in fits)
    if not baseline > 0:  # the judging texts have equal labels
        return dict.fromkeys(("value", "null_mean", "null_std", "z")), fits
    value = 1 - sum(fit.error for fit in fits) / baseline
    null_mean = -sum(fit.null_error for fit in fits) / baseline
    null_std = ridge_null_std(torch.stack([fit.shrinkage for fit in fits]).mean(0), labels, pairs)
    z = (value - null_mean) / null_std if null_std > 1e-12 else None
    return {"value": value, "null_mean": null_mean, "null_std": null_std, "z": z}, fits


def ridge_null_std(shrinkage: Tensor, labels: Tensor, pairs: list[Pair]) -> float:
    """Standard deviation of the R2 of `ridge` under permuted labels, one part or all folds together.

    The sums over folds of (m - mu)(y - p)' are then independent and nearly normal; their products, which the errors
    of the folds share, are counted once.
    """
    s, folds = shrinkage, len(pairs)
    shared = (labels.square().sum() / labels.trace().square()).item()
    if folds == 1:
        (train, test) = pairs[0]
        variance = (2 * s**4 / train.num**2 + 4 * s**2 / (train.num * test.num)).sum().item()
    else:
        total = sum(test.num for _, test in pairs)
        between = 4 * s / (folds - 1) - 2 * (folds - 2) * s**2 / (folds - 1) ** 2
        within = s**2 / (folds - 1)
        variance = (folds * (folds - 1) / 2 * between**2 + 2 * folds * within**2).sum().item() / total**2
    return math.sqrt(shared * variance)
