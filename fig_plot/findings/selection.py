"""Measure the effect of choosing a configuration on the outcome, against the same choice in noise.

All functions are pure functions of numpy arrays. A configuration is a layer and a fraction K of one
score; `direction` is the claimed sign of its correlation with the outcome: +1 chooses the largest correlation, -1 the
smallest.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import permutation_test, rankdata

from fig_plot.findings.correlations import TOLERANCE


class SelectionNull(NamedTuple):
    """The best of many configurations, and the best of as many under permuted targets."""

    best: float  # correlation of the chosen configuration, with its sign
    configuration: int  # its index
    null_mean: float  # mean of the best correlation under permutation
    p_value: float
    null: np.ndarray  # (draws,) the best under each permutation; the same permutations for the same tasks and seed


def standardized_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis with mean 0 and length 1; nan for a row that is constant or lacks a value."""
    ranks = rankdata(values, axis=-1, nan_policy="propagate")
    ranks -= ranks.mean(-1, keepdims=True)
    length = np.linalg.norm(ranks, axis=-1, keepdims=True)
    return np.divide(ranks, length, where=length > TOLERANCE, out=np.full_like(ranks, np.nan))


def selection_null(
    maps: ArrayLike, targets: ArrayLike, num_permutations: int = 10_000, seed: int = 0, direction: int = 1
) -> SelectionNull:
    """Chooses as the paper does, the configuration with the best Spearman, and repeats the choice on permuted targets.

    The null permutes the tasks of the targets and takes the best of all configurations again, so it accounts for their
    resemblance. p = (1 + draws at least as good) / (1 + draws), or the exact share if the tasks have at most
    `num_permutations` orders.

    Args:
        maps: (configurations, tasks), layers x fractions flattened. Tasks without a target or without any value do
            not count, nor do configurations that then miss a task or are constant.
        targets: (tasks,), or (configurations, tasks) if each has its own, such as the accuracy of its layer.
        num_permutations: draws of the null.
        seed: seed of the draws.
        direction: the claimed sign, in the null too.
    """
    maps, targets = np.broadcast_arrays(np.asarray(maps, float), np.asarray(targets, float))
    tasks = np.isfinite(targets).any(0) & np.isfinite(maps).any(0)
    ranks, target = direction * standardized_ranks(maps[:, tasks]), standardized_ranks(targets[:, tasks])
    configurations = np.flatnonzero(np.isfinite(ranks * target).all(1))
    ranks, target = ranks[configurations], target[configurations]
    observed = (ranks * target).sum(1)
    index = int(observed.round(9).argmax())  # rounding makes ties equal, and the first wins on any machine
    distinct, which = np.unique(target, axis=0, return_inverse=True)
    groups = [(ranks[which.ravel() == i], one) for i, one in enumerate(distinct)]  # one target a layer

    def best(order: np.ndarray, axis: int) -> np.ndarray:
        order = order.astype(int)
        return np.max([(rows @ one[order].T).max(0) for rows, one in groups], axis=0)

    test = permutation_test(
        (np.arange(target.shape[1]),), best, permutation_type="pairings", alternative="greater", vectorized=True,
        n_resamples=num_permutations, rng=np.random.default_rng(seed),
        batch=1000,  # bounds the memory of the products
    )  # fmt: skip
    null = direction * test.null_distribution
    found = direction * float(observed[index])
    return SelectionNull(found, int(configurations[index]), float(null.mean()), float(test.pvalue), null)


def joint_p_value(best: ArrayLike, nulls: list[np.ndarray], direction: int) -> float:
    """One-sided p of the mean of several models' best correlations, (models,), their tasks permuted alike.

    `nulls` has the null of each model, (draws,), all from the same permutations of the same tasks.
    """
    drawn, found = direction * np.mean(nulls, axis=0), direction * float(np.asarray(best).mean())
    return float((1 + (drawn >= found - 1e-9).sum()) / (1 + len(drawn)))
