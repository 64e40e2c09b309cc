"""Rank correlations over tasks, their intervals, and what choosing a configuration on the outcome is worth.

Pure functions of numpy arrays; nothing is read or written. Ranks count from 1 = smallest, ties share their mean rank.
A value is missing where it is NaN or infinite, and a pair where either side is. A statistic that is not defined (fewer
than three pairs, or one side constant) is nan, never 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import permutation_test, rankdata, weightedtau
from sklearn.metrics import roc_auc_score

TOLERANCE = 1e-9  # two rank correlations nearer than this are equal: they differ by rounding only

Correlation = Callable[[ArrayLike, ArrayLike], float]


class Interval(NamedTuple):
    """A statistic and its bootstrap interval."""

    value: float
    low: float
    high: float


class SelectionNull(NamedTuple):
    """The best of many configurations, and the best of as many under permuted targets."""

    best: float  # correlation of the configuration chosen, with its sign
    configuration: int  # which one
    null_mean: float  # of the best under permutation
    null_quantile: float  # 95 % quantile of the same
    p_value: float


class LeaveOneOut(NamedTuple):
    """Configurations chosen without the task that they are then judged on."""

    chosen: np.ndarray  # (tasks,) index of a configuration, -1 where the task is missing
    predicted: np.ndarray  # (tasks,) fraction of the other tasks below the one left out, nan where missing
    correlation: float  # Spearman of predicted and target
    p_value: float


# ------------------------------------------------------------------ correlations of one pair of vectors
def rank(values: ArrayLike) -> np.ndarray:
    """Ranks along the last axis, 1 = smallest, ties averaged, nan where a value is missing."""
    values = np.asarray(values, float)
    present = np.isfinite(values)
    # the missing go behind all others, so that they push no rank up
    return np.where(present, rankdata(np.where(present, values, np.inf), axis=-1), np.nan)


def _standardize(values: np.ndarray) -> np.ndarray:
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
    a, b = _standardize(residuals.T)
    return float(a @ b)


def auc(score: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half.

    Args:
        score: (n,); missing scores are left out.
        positive: (n,) of truth values.

    Returns:
        nan where only one class is left.
    """
    score, positive = np.asarray(score, float), np.asarray(positive, bool)
    known = np.isfinite(score)
    if len(set(positive[known])) < 2:
        return float("nan")
    return float(roc_auc_score(positive[known], score[known]))


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
        rows = spearman_rows(x[:, tasks], y[:, tasks])  # (models, draws)
        count = np.isfinite(rows).sum(0)
        draws = np.divide(np.nansum(rows, 0), count, where=count > 0, out=np.full(num_draws, np.nan))
    else:
        draws = np.array([mean_correlation(x[:, chosen], y[:, chosen], correlation) for chosen in tasks])
    return _percentiles(mean_correlation(x, y, correlation), draws, level)


# ------------------------------------------------------------------ choosing a configuration on the outcome
def _usable(maps: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Maps and targets of the tasks kept, which tasks, and which configurations are complete and not constant."""
    every_map, every_target = np.asarray(maps, float), np.asarray(targets, float)
    tasks = np.flatnonzero(np.isfinite(every_target) & np.isfinite(every_map).any(0))
    kept = every_map[:, tasks]
    configurations = np.flatnonzero(np.isfinite(kept).all(1) & (kept != kept[:, :1]).any(1))
    if len(tasks) < 3 or not len(configurations):
        raise ValueError("a selection needs three tasks and one configuration that is complete and not constant")
    return kept[configurations], every_target[tasks], tasks, configurations


def _permutation_null(
    statistic: Callable[..., Any], targets: np.ndarray, num_permutations: int, seed: int
) -> tuple[np.ndarray, float]:
    """The statistic of permuted targets (draws,), and its one-sided p-value, nan where the statistic is."""
    test = permutation_test(
        (targets,),
        statistic,
        permutation_type="pairings",
        alternative="greater",
        vectorized=True,
        n_resamples=num_permutations,
        batch=1000,  # keeps the products of large maps out of memory
        rng=np.random.default_rng(seed),
    )
    return test.null_distribution, float(test.pvalue) if np.isfinite(test.statistic) else float("nan")


def selection_null(
    maps: ArrayLike, targets: ArrayLike, num_permutations: int = 10_000, seed: int = 0, absolute: bool = False
) -> SelectionNull:
    """The paper's way: the configuration with the largest Spearman, and what the same choice finds in noise.

    The null permutes the targets over the tasks and takes the maximum over all configurations again, so that it knows
    how much they resemble each other. p = (1 + draws at least as large) / (1 + draws), or the exact share where the
    tasks have no more than `num_permutations` orders.

    Args:
        maps: (configurations, tasks), layers x fractions flattened. Tasks that miss their target or every
            configuration are left out; so are configurations that then miss a task or are constant.
        targets: (tasks,).
        num_permutations: draws of the null.
        seed: of the draws.
        absolute: the largest |Spearman| instead, in the null too (null_mean and null_quantile are of |.| then).

    Raises:
        ValueError: fewer than three tasks, or no configuration is left.
    """
    maps, targets, _, configurations = _usable(maps, targets)
    size = np.abs if absolute else np.positive
    ranks, target = _standardize(rank(maps)), _standardize(rank(targets))  # dot products are correlations
    observed = ranks @ target
    index = int(size(observed).round(9).argmax())  # rounded: among equals the first, on any machine

    def largest(permuted: np.ndarray, axis: int) -> np.ndarray:
        return size(ranks @ permuted.T).max(0)

    null, p_value = _permutation_null(largest, target, num_permutations, seed)
    quantile = float(np.quantile(null, 0.95))
    return SelectionNull(float(observed[index]), int(configurations[index]), float(null.mean()), quantile, p_value)


def _choose_without_each(maps: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every row of targets (draws, tasks) and every task: the best configuration elsewhere, and its fraction here.

    Both (draws, tasks); -1 and nan where no correlation of the other tasks is defined.
    """
    chosen, predicted = np.full(targets.shape, -1), np.full(targets.shape, np.nan)
    for t in range(targets.shape[1]):
        others, here = np.delete(maps, t, 1), maps[:, t : t + 1]
        found = _standardize(rank(np.delete(targets, t, 1))) @ _standardize(rank(others)).T  # (draws, configurations)
        defined = np.isfinite(found)
        best = np.where(defined, found.round(9), -np.inf).argmax(1)  # rounded: among equals the first, on any machine
        fraction = ((others < here) + (others == here) / 2).mean(1)
        chosen[:, t] = np.where(defined.any(1), best, -1)
        predicted[:, t] = np.where(defined.any(1), fraction[best], np.nan)
    return chosen, predicted


def leave_one_out_selection(
    maps: ArrayLike, targets: ArrayLike, num_permutations: int = 1000, seed: int = 0
) -> LeaveOneOut:
    """Chooses, for each task, the configuration with the largest Spearman on the other tasks, and judges it there.

    Configurations have scales of their own, so the value left out is turned into the fraction of the other tasks'
    values of the same configuration that lie below it (ties half); these fractions are correlated (Spearman) with the
    targets. With one configuration this is its plain Spearman.

    Under noise its mean is 0: the downward bias of leave-one-out predictions does not arise, as the rank of a value
    among the others tells nothing of the others' order. Its spread is wider than Spearman's, though, since the choice
    changes from task to task: at 12 tasks the sd is .30 for one configuration, .46 to .49 for 19 to 100 unrelated ones.
    So its p-value comes from permuted targets, one-sided, and no table of Spearman's correlation applies.

    Args:
        maps: (configurations, tasks); missing values as in `selection_null`.
        targets: (tasks,).
        num_permutations: draws of the null.
        seed: of the draws.

    Raises:
        ValueError: fewer than three tasks, or no configuration is left.
    """
    num_tasks = np.size(targets)
    maps, targets, tasks, configurations = _usable(maps, targets)

    def correlation(permuted: np.ndarray, axis: int) -> np.ndarray:
        _, fraction = _choose_without_each(maps, np.atleast_2d(permuted))
        return spearman_rows(fraction, permuted).reshape(permuted.shape[:-1])

    _, p_value = _permutation_null(correlation, targets, num_permutations, seed)
    (best,), (fraction,) = _choose_without_each(maps, targets[None])
    chosen, predicted = np.full(num_tasks, -1), np.full(num_tasks, np.nan)
    chosen[tasks] = np.where(best < 0, -1, configurations[best])
    predicted[tasks] = fraction
    return LeaveOneOut(chosen, predicted, spearman(fraction, targets), p_value)


def expected_maximum(
    num_configurations: int, num_tasks: int, num_draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Mean and 95 % quantile of the largest Spearman among independent noise rankings of the tasks.

    What a sweep would report if it measured nothing and its configurations were unrelated; real ones resemble each
    other, which `selection_null` takes into account.
    """
    random = np.random.default_rng(seed)
    target = _standardize(np.arange(num_tasks, dtype=float))
    largest = [
        (random.permuted(np.tile(target, (num_configurations, 1)), axis=1) @ target).max() for _ in range(num_draws)
    ]
    return float(np.mean(largest)), float(np.quantile(largest, 0.95))
