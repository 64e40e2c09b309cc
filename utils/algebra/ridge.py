"""Ridge regression fitted on the moments of some texts and judged by those of others; its R2 under permuted labels."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.algebra.linalg import equilibrated_eigh, without_constants
from utils.algebra.moments import LayerMoments, check_has_layer
from utils.results import open_tensors
from utils.script import UserError

FOLDS_OF_LAYER = ("fold_pooled_second_moment", "fold_pooled_label_cross_moment", "fold_pooled_mean")
ALPHAS = tuple(10.0**power for power in range(-1, 6))  # on the scale of sums


class Value(NamedTuple):
    """A score, and its mean and standard deviation under permuted labels (nan: none)."""

    value: float
    null_mean: float = math.nan
    null_std: float = math.nan


class Part(NamedTuple):
    """Averages over some texts, and how many: what a ridge regression is fitted on or judged by."""

    second: Tensor  # (d, d)
    cross: Tensor  # (d, c)
    mean: Tensor  # (d,)
    label_mean: Tensor  # (c,)
    label_square: Tensor  # mean of |y|^2, a scalar
    num: float


class Judged(NamedTuple):
    """A ridge regression on texts that it was not fitted on: sums of squares over them."""

    error: float  # sum |y - prediction|^2
    baseline: float  # sum |y - mean y of the training part|^2
    null_error: float  # what permuted labels add to the baseline, on average
    shrinkage: Tensor  # lambda / (lambda + alpha / n) of each direction, ascending


def part_of(moments: LayerMoments) -> Part:
    """All texts of a split."""
    m = moments
    square = m.label_second_moment.trace()
    n = float(m.num_samples)
    return Part(m.pooled_second_moment, m.pooled_label_cross_moment, m.pooled_mean, m.label_mean, square, n)


def load_folds(path: Path, layer: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor] | None:
    """The moments of each fold of one layer and the texts per fold, None if not kept."""
    with open_tensors(path) as (file, metadata):
        check_has_layer(metadata, layer)
        if f"layer.{layer}.fold_pooled_mean" not in file.keys():  # noqa: SIM118, no dict
            return None
        folds = {name: file.get_tensor(f"layer.{layer}.{name}").to(device) for name in FOLDS_OF_LAYER}
        folds |= {name: file.get_tensor(name).to(device) for name in ("fold_label_mean", "fold_label_second_moment")}
        return folds, file.get_tensor("fold_num_samples").to(device)


def check_several(num_folds: int, who: str) -> None:
    """Raises UserError where all texts are in one fold.

    Args:
        num_folds: that have texts.
        who: would cross-validate.
    """
    if num_folds < 2:
        raise UserError(f"All texts fall into one fold (are they all equal?): {who} cannot cross-validate.")


def fold_parts(folds: dict[str, Tensor], counts: Tensor) -> list[tuple[Part, Part]]:
    """The texts outside a fold and those inside it, for each fold that has any, from `load_folds`."""
    order = ("pooled_second_moment", "pooled_label_cross_moment", "pooled_mean", "label_mean")
    averages: list[Any] = [folds[f"fold_{name}"] for name in order]
    averages.append(folds["fold_label_second_moment"].diagonal(dim1=1, dim2=2).sum(1))
    totals, total = [torch.tensordot(counts, average, 1) for average in averages], counts.sum()
    pairs: list[Any] = []
    for fold in counts.nonzero()[:, 0]:
        num, inside = counts[fold], [average[fold] for average in averages]
        outside: Any = [(all_of - num * part) / (total - num) for all_of, part in zip(totals, inside, strict=True)]
        pairs.append((Part._make([*outside, (total - num).item()]), Part._make([*inside, num.item()])))
    return pairs


def eigenbasis(train: Part, scaled: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (d,) of the correlation matrix, ascending, its basis A (d, d) for features as they are, and A' S.

    One eigendecomposition serves every alpha: the weights are A diag(1 / (eigenvalues + alpha / n)) A' S. Without
    `scaled` the features are not standardised first.
    """
    covariance = without_constants(train.second - torch.outer(train.mean, train.mean), train.mean, 1e-10)
    eigenvalues, basis = equilibrated_eigh(covariance) if scaled else torch.linalg.eigh(covariance)
    return eigenvalues.clamp(min=0), basis, basis.T @ (train.cross - torch.outer(train.mean, train.label_mean))


def about_means_of(train: Part, test: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of `test` about the means of `train`: of features (d, d), with labels (d, c), and of |labels|^2."""
    shift, label_shift = test.mean - train.mean, test.label_mean - train.label_mean
    second = test.second - torch.outer(test.mean, test.mean) + torch.outer(shift, shift)
    cross = test.cross - torch.outer(test.mean, test.label_mean) + torch.outer(shift, label_shift)
    return second, cross, test.label_square - test.label_mean.square().sum() + label_shift.square().sum()


def ridge_path(folds: dict[str, Tensor], counts: Tensor, alphas: tuple[float, ...]) -> dict:
    """Cross-validated R2 of StandardScaler + Ridge(alpha) for each alpha, exactly, from the moments of the folds.

    R2 = 1 - sum over folds |y - prediction|^2 / |y - training mean|^2.

    Args:
        folds: `fold_*` of cache.py of one layer, averages over the texts of a fold, (f, ...), float64.
        counts: texts per fold, (f,).
        alphas: on the scale of sums, as scikit-learn's.

    Raises:
        UserError: all texts are in one fold.
    """
    check_several(len(counts.nonzero()), "--ridge")
    errors, baseline = [0.0] * len(alphas), 0.0
    for train, test in fold_parts(folds, counts):
        eigenvalues, basis, cross = eigenbasis(train)
        second_out, cross_out, label_square = about_means_of(train, test)
        baseline += test.num * label_square.item()
        second_out, cross_out = basis.T @ second_out @ basis, basis.T @ cross_out
        for index, alpha in enumerate(alphas):
            weights = cross / (eigenvalues + alpha / train.num)[:, None]
            fitted = (weights * (second_out @ weights - 2 * cross_out)).sum()
            errors[index] += test.num * (label_square + fitted).item()
    r2 = [1 - error / baseline for error in errors]
    best = max(range(len(alphas)), key=r2.__getitem__)
    return {"alphas": list(alphas), "r2": r2, "best_alpha": alphas[best], "best_r2": r2[best]}


def judge_ridge(train: Part, test: Part, alphas: tuple[float, ...] | None = None, scaled: bool = True) -> Judged:
    """Ridge on standardised features, fitted on `train` and judged by `test`.

    alpha is chosen by generalised cross-validation within `train`: the texts that judge have no say in it.

    Args:
        train: with an intercept.
        test: other texts.
        alphas: on the scale of sums, as scikit-learn's `Ridge`; None: ALPHAS.
        scaled: standardise the features first, as `StandardScaler` does.
    """
    n = train.num
    eigenvalues, basis, cross = eigenbasis(train, scaled)
    label_variance = train.label_square - train.label_mean.square().sum()
    along = cross.square().sum(1)

    def validation_error(alpha: float) -> float:
        ridge = eigenvalues + alpha / n
        loss = label_variance - 2 * (along / ridge).sum() + (eigenvalues * along / ridge.square()).sum()
        return (loss / (1 - (1 + (eigenvalues / ridge).sum()) / n).clamp(min=1e-9).square()).item()

    ridge = eigenvalues + min(alphas or ALPHAS, key=validation_error) / n
    second, cross_out, label_out = about_means_of(train, test)
    weights = basis @ (cross / ridge[:, None])
    fitted = (weights * (second @ weights - 2 * cross_out)).sum()
    spread = ((second @ basis) * basis).sum(0)  # of the judging texts in each direction
    null_error = label_variance * (spread * eigenvalues / ridge.square()).sum() * test.num / n
    error, baseline = test.num * (label_out + fitted), test.num * label_out
    return Judged(error.item(), baseline.item(), null_error.item(), eigenvalues / ridge)


def ridge_null_std(shrinkage: Tensor, labels: Tensor, pairs: list[tuple[Part, Part]]) -> float:
    """Standard deviation of the R2 of `judge_ridge` under permuted labels, one part or all folds together.

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


def ridge(pairs: list[tuple[Part, Part]], labels: Tensor) -> tuple[Value, list[Judged]]:
    """R2 = 1 - sum of errors / sum of baselines over the parts, and each part.

    Args:
        pairs: texts to fit and texts to judge, of `fold_parts`, or of two splits.
        labels: D, (c, c).
    """
    judged = [judge_ridge(train, test) for train, test in pairs]
    baseline = sum(part.baseline for part in judged)
    if baseline <= 0:
        return Value(math.nan), judged
    shrinkage = torch.stack([part.shrinkage for part in judged]).mean(0)
    null_mean = -sum(part.null_error for part in judged) / baseline
    value = 1 - sum(part.error for part in judged) / baseline
    return Value(value, null_mean, ridge_null_std(shrinkage, labels, pairs)), judged
