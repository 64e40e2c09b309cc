"""Measure the effect of choosing a configuration on the outcome: against noise, and on a task left out.

Pure functions of numpy arrays, beside those of correlations.py. A configuration is a layer and a fraction K of one
score; `direction` is the claimed sign of its correlation with the outcome: +1 chooses the largest correlation, -1 the
smallest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import permutation_test

from fig_plot.findings.correlations import rank, spearman, spearman_rows, standardize


class SelectionNull(NamedTuple):
    """The best of many configurations, and the best of as many under permuted targets."""

    best: float  # correlation of the chosen configuration, with its sign
    configuration: int  # its index
    null_mean: float  # mean of the best correlation under permutation
    null_quantile: float  # the best correlation that 5 % of the permutations reach
    p_value: float
    null: np.ndarray  # (draws,) the best under each permutation; the same permutations for the same tasks and seed


class LeaveOneOut(NamedTuple):
    """Configurations chosen without the task that they are then judged on."""

    chosen: np.ndarray  # (tasks,) index of a configuration, -1 for a missing task
    predicted: np.ndarray  # (tasks,) fraction of the other tasks below the one left out, nan if missing
    correlation: float  # Spearman of predicted and target
    p_value: float


def _usable(maps: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Maps and targets without unusable tasks and configurations, and the indices of the kept tasks and configurations.

    Both are (configurations, tasks). A kept configuration is complete and not constant.
    """
    every_map, every_target = np.broadcast_arrays(np.asarray(maps, float), np.asarray(targets, float))
    tasks = np.flatnonzero(np.isfinite(every_target).any(0) & np.isfinite(every_map).any(0))
    kept, target = every_map[:, tasks], every_target[:, tasks]
    varying = (target != target[:, :1]).any(1)
    varying |= not varying.any()  # if no target varies the statistic is nan, which the caller reports
    complete = np.isfinite(kept).all(1) & np.isfinite(target).all(1)
    configurations = np.flatnonzero(complete & (kept != kept[:, :1]).any(1) & varying)
    if len(tasks) < 3 or not len(configurations):
        raise ValueError("a selection needs three tasks and one configuration that is complete and not constant")
    return kept[configurations], target[configurations], tasks, configurations


def _permutation_null(
    statistic: Callable[..., Any], targets: np.ndarray, num_permutations: int, seed: int
) -> tuple[np.ndarray, float]:
    """The statistic of permuted targets, (draws,), and the one-sided p-value; p is nan if the statistic is."""
    # batches bound the memory that products of large maps take
    options: dict[str, Any] = {
        "permutation_type": "pairings",
        "alternative": "greater",
        "vectorized": True,
        "batch": 1000,
    }
    test = permutation_test(
        (targets,), statistic, n_resamples=num_permutations, rng=np.random.default_rng(seed), **options
    )
    return test.null_distribution, float(test.pvalue) if np.isfinite(test.statistic) else float("nan")


def selection_null(
    maps: ArrayLike, targets: ArrayLike, num_permutations: int = 10_000, seed: int = 0, direction: int = 1
) -> SelectionNull:
    """Chooses as the paper does, the configuration with the best Spearman, and repeats the choice on permuted targets.

    The null permutes the tasks of the targets and takes the best of all configurations again, so it accounts for their
    resemblance. p = (1 + draws at least as good) / (1 + draws), or the exact share if the tasks have at most
    `num_permutations` orders.

    Args:
        maps: (configurations, tasks), layers x fractions flattened. Tasks that miss their target or every
            configuration are left out; so are configurations that then miss a task or are constant.
        targets: (tasks,), or (configurations, tasks) if each has its own, such as the accuracy of its layer.
        num_permutations: draws of the null.
        seed: seed of the draws.
        direction: +1: the best is the largest; -1: the smallest, in the null too.

    Raises:
        ValueError: fewer than three tasks, or no configuration is left.
    """
    maps, targets, tasks, configurations = _usable(maps, targets)
    ranks, target = direction * standardize(rank(maps)), standardize(rank(targets))  # dot products are correlations
    observed = (ranks * target).sum(1)
    index = int(observed.round(9).argmax())  # rounded: among equals the first, on any machine
    distinct, which = np.unique(target, axis=0, return_inverse=True)
    groups = [(ranks[which.ravel() == i], one) for i, one in enumerate(distinct)]  # one target a layer

    def best(order: np.ndarray, axis: int) -> np.ndarray:
        order = order.astype(int)
        return np.max([(rows @ one[order].T).max(0) for rows, one in groups], axis=0)

    null, p_value = _permutation_null(best, np.arange(len(tasks)), num_permutations, seed)
    quantile = direction * float(np.quantile(null, 0.95))
    found, null_mean = direction * float(observed[index]), direction * float(null.mean())
    return SelectionNull(found, int(configurations[index]), null_mean, quantile, p_value, direction * null)


def joint_p_value(best: ArrayLike, nulls: list[np.ndarray], direction: int) -> float:
    """One-sided p of the mean of several models' best correlations, their tasks permuted alike.

    Args:
        best: best correlation of each model, (models,).
        nulls: null of each model, (draws,); all from the same permutations of the same tasks.
        direction: +1: the claim is a large mean; -1: a small one.
    """
    drawn, found = direction * np.mean(nulls, axis=0), direction * float(np.asarray(best).mean())
    return float((1 + (drawn >= found - 1e-9).sum()) / (1 + len(drawn)))


def _choose_without_each(maps: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best configuration on the other tasks, and its fraction on this task, for each draw and task.

    Both (draws, tasks); -1 and nan if every correlation of the other tasks is undefined. The best is the largest.
    """
    chosen, predicted = np.full(targets.shape, -1), np.full(targets.shape, np.nan)
    for t in range(targets.shape[1]):
        others, here = np.delete(maps, t, 1), maps[:, t : t + 1]
        found = standardize(rank(np.delete(targets, t, 1))) @ standardize(rank(others)).T  # (draws, configurations)
        defined = np.isfinite(found)
        best = np.where(defined, found.round(9), -np.inf).argmax(1)  # rounded: among equals the first, on any machine
        fraction = ((others < here) + (others == here) / 2).mean(1)
        chosen[:, t] = np.where(defined.any(1), best, -1)
        predicted[:, t] = np.where(defined.any(1), fraction[best], np.nan)
    return chosen, predicted


def leave_one_out_selection(
    maps: ArrayLike, targets: ArrayLike, num_permutations: int = 1000, seed: int = 0, direction: int = 1
) -> LeaveOneOut:
    """Chooses, for each task, the configuration with the best Spearman on the other tasks, and judges it on that task.

    Configurations have scales of their own, so the value left out is turned into the fraction of the other tasks'
    values of the same configuration that lie below it (ties half); these fractions are correlated (Spearman) with the
    targets. With one configuration this is its plain Spearman.

    Under noise its mean is 0, since the rank of a value among the others tells nothing of the others' order; but as the
    choice changes from task to task its spread is wider than Spearman's (12 tasks: .46 to .49 for 19 to 100 unrelated
    configurations, .30 for one). So the one-sided p-value comes from permuted targets.

    Args:
        maps: (configurations, tasks); missing values as in `selection_null`.
        targets: (tasks,).
        num_permutations: draws of the null.
        seed: seed of the draws.
        direction: +1: the best is the largest; -1: the smallest, and p counts draws that are at least as small.

    Raises:
        ValueError: fewer than three tasks, or no configuration is left.
    """
    num_tasks = np.size(targets)
    maps, kept, tasks, configurations = _usable(maps, targets)
    target = direction * kept[0]

    def correlation(permuted: np.ndarray, axis: int) -> np.ndarray:
        _, fraction = _choose_without_each(maps, np.atleast_2d(permuted))
        return spearman_rows(fraction, permuted).reshape(permuted.shape[:-1])

    _, p_value = _permutation_null(correlation, target, num_permutations, seed)
    (best,), (fraction,) = _choose_without_each(maps, target[None])
    chosen, predicted = np.full(num_tasks, -1), np.full(num_tasks, np.nan)
    chosen[tasks] = np.where(best < 0, -1, configurations[best])
    predicted[tasks] = fraction
    return LeaveOneOut(chosen, predicted, direction * spearman(fraction, target), p_value)
