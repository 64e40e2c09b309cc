"""Rank correlations over tasks, and their intervals.

Pure functions of numpy arrays; nothing is read or written. Ranks count from 1 = smallest, ties share their mean rank.
A value is missing where it is NaN or infinite, and a pair where either side is. A statistic that is not defined (fewer
than three pairs, or one side constant) is nan, never 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata, weightedtau

TOLERANCE = 1e-9  # two rank correlations nearer than this are equal: they differ by rounding only

Correlation = Callable[[ArrayLike, ArrayLike], float]


class Draws(NamedTuple):
    """How often a bootstrap or a permutation draws, and from which seed."""

    num_draws: int = 1000
    seed: int = 0


class Interval(NamedTuple):
    """A statistic and its bootstrap interval."""

    value: float
    low: float
    high: float


# ------------------------------------------------------------------ correlations of one pair of vectors
def rank(values: ArrayLike) -> np.ndarray:
    """Ranks along the last axis, 1 = smallest, ties averaged, nan where a value is missing."""
    values = np.asarray(values, float)
    present = np.isfinite(values)
    # the missing go behind all others, so that they push no rank up
    return np.where(present, rankdata(np.where(present, values, np.inf), axis=-1), np.nan)


def standardize(values: np.ndarray) -> np.ndarray:
    """Mean 0 and length 1 along the last axis; nan rows where that is constant."""
    values = values - values.mean(-1, keepdims=True)
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.divide(values, length, where=length > TOLERANCE, out=np.full_like(values, np.nan))


def spearman_rows(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Spearman's correlation along the last axis of two arrays that broadcast, each row over its own complete pairs.

    Args:
        x: (..., n).
        y: (..., n).

    Returns:
        (...), nan where it is not defined.
    """
    x, y = np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float))
    complete = np.isfinite(x) & np.isfinite(y)
    count = complete.sum(-1)
    centre = (count[..., None] + 1) / 2  # the mean rank, ties or not
    a, b = (np.where(complete, rank(np.where(complete, side, np.nan)) - centre, 0) for side in (x, y))
    spread = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    defined = (count > 2) & (spread > TOLERANCE)
    return np.divide((a * b).sum(-1), spread, where=defined, out=np.full(spread.shape, np.nan))


def _complete_pairs(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray] | None:
    """The pairs without a missing side; None where no correlation is defined."""
    pairs = np.array([x, y], float)
    a, b = pairs[:, np.isfinite(pairs).all(0)]
    return (a, b) if len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0 else None


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of two vectors (n,) over their complete pairs."""
    return float(spearman_rows(x, y))


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b of two vectors (n,) over their complete pairs."""
    pairs = _complete_pairs(x, y)
    if pairs is None:
        return float("nan")
    # written out because scipy's also computes a p-value, ten times slower, and the bootstrap calls this often
    a, b = (np.sign(side[:, None] - side) for side in pairs)
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def weighted_tau(x: ArrayLike, y: ArrayLike) -> float:
    """scipy.stats.weightedtau of two vectors (n,) over their complete pairs: the largest values weigh most."""
    pairs = _complete_pairs(x, y)
    return float("nan") if pairs is None else float(weightedtau(*pairs).statistic)


CORRELATIONS: dict[str, Correlation] = {"spearman": spearman, "kendall": kendall, "weighted_tau": weighted_tau}


def partial_spearman(x: ArrayLike, y: ArrayLike, given: ArrayLike) -> float:
    """Spearman's correlation of x and y after the ranks of the covariates are regressed out of the ranks of both.

    Args:
        x: (n,).
        y: (n,).
        given: one covariate (n,) or several (n, k). Rows with a missing value anywhere are left out.

    Returns:
        nan also where the covariates leave no spread, or fewer than k + 3 rows.
    """
    table = np.column_stack([x, y, given]).astype(float)
    table = table[np.isfinite(table).all(1)]
    num_covariates = table.shape[1] - 2
    if len(table) < num_covariates + 3:
        return float("nan")
    ranks = rank(table.T).T
    design = np.column_stack([np.ones(len(ranks)), ranks[:, 2:]])
    residuals = ranks[:, :2] - design @ np.linalg.lstsq(design, ranks[:, :2])[0]
    a, b = standardize(residuals.T)
    return float(a @ b)


def auc(score: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half.

    Args:
        score: (n,); missing scores are left out.
        positive: (n,) of truth values.

    Returns:
        nan where only one class is left.
    """
    scores, known = np.asarray(score, float), np.isfinite(np.asarray(score, float))
    is_positive = np.asarray(positive, bool)[known]
    if len(set(is_positive)) < 2:
        return float("nan")
    ranks = rankdata(scores[known])  # scikit-learn's is too slow to resample
    num_positive, num_negative = is_positive.sum(), (~is_positive).sum()
    return float((ranks[is_positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


# ------------------------------------------------------------------ intervals
def _percentiles(value: float, draws: np.ndarray, level: float) -> Interval:
    """The central `level` of the draws that are defined."""
    draws = draws[np.isfinite(draws)]
    if not len(draws) or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def bootstrap_interval(
    statistic: Callable[..., float], *arrays: ArrayLike, num_draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap of a statistic over rows: `num_draws` samples of the rows with replacement.

    Rows are tasks, so the interval says what another sample of such tasks would give. Resampled tasks tie, which draws
    a rank correlation towards 0: for Spearman at 12 tasks the middle of the interval lies about .05 nearer to 0 than
    the value, and nominal 95 % covered 96 to 99 % (normal pairs, correlation 0, .6, .9). Draws in which the statistic
    is nan (all rows alike) are left out.

    Args:
        statistic: called with the resampled arrays, gives a float.
        arrays: all of the same length along the first axis.
    """
    tables = [np.asarray(array) for array in arrays]
    random, num_rows = np.random.default_rng(seed), len(tables[0])
    rows = random.integers(num_rows, size=(num_draws, num_rows))
    draws = np.array([statistic(*(table[chosen] for table in tables)) for chosen in rows], float)
    return _percentiles(float(statistic(*tables)), draws, level)


def mean_correlation(x: ArrayLike, y: ArrayLike, correlation: Correlation = spearman) -> float:
    """Mean over models of the correlation over tasks within a model; models without a defined one are left out.

    Args:
        x: (models, tasks), missing cells nan.
        y: (models, tasks).
        correlation: one of CORRELATIONS.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    rows = spearman_rows(x, y) if correlation is spearman else np.array([*map(correlation, x, y)])
    defined = rows[np.isfinite(rows)]
    return float(defined.mean()) if len(defined) else float("nan")


def mean_spearman_of_draws(x: np.ndarray, y: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Mean over models of the Spearman over resampled tasks, (draws,); x and y (models, tasks), tasks (draws, n)."""
    rows = spearman_rows(x[:, tasks], y[:, tasks])  # (models, draws)
    count = np.isfinite(rows).sum(0)
    return np.divide(np.nansum(rows, 0), count, where=count > 0, out=np.full(len(tasks), np.nan))


def bootstrap_lead(score: np.ndarray, baseline: np.ndarray, target: np.ndarray, draws: Draws) -> Interval:
    """|mean Spearman of the score| - |that of the baseline|, and its interval over tasks; all (models, tasks)."""
    num_tasks = target.shape[1]
    tasks = np.random.default_rng(draws.seed).integers(num_tasks, size=(draws.num_draws, num_tasks))
    whole, drawn = (
        np.abs(mean_spearman_of_draws(score, target, chosen)) - np.abs(mean_spearman_of_draws(baseline, target, chosen))
        for chosen in (np.arange(num_tasks)[None], tasks)
    )
    return _percentiles(float(whole[0]), drawn, 0.95)


def bootstrap_mean_correlation(
    x: ArrayLike,
    y: ArrayLike,
    correlation: Correlation = spearman,
    num_draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """`mean_correlation` with a percentile bootstrap over tasks, one sample of tasks for all models at once.

    Models see the same tasks, so their correlations err together: tasks are the clusters, and more models narrow the
    interval only as far as they disagree. Models are not resampled: the interval speaks of these models. Nominal 95 %
    covered 93 % (8 models that share what makes tasks easy, 12 to 24 tasks, 800 trials).

    Args:
        x: (models, tasks), missing cells nan.
        y: (models, tasks).
        correlation: one of CORRELATIONS.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    random, num_tasks = np.random.default_rng(seed), x.shape[1]
    tasks = random.integers(num_tasks, size=(num_draws, num_tasks))
    if correlation is spearman:
        draws = mean_spearman_of_draws(x, y, tasks)
    else:
        draws = np.array([mean_correlation(x[:, chosen], y[:, chosen], correlation) for chosen in tasks])
    return _percentiles(mean_correlation(x, y, correlation), draws, level)
