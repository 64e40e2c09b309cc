"""Measure how well labelled points separate in a few coordinates, beside points with shuffled labels."""

from typing import Any

import numpy as np


def mean_and_scale(coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale, (k,) each, that give the columns of (n, k) mean 0 and variance 1.

    A column that spreads by less than 1e-6 of its mean has scale inf: its spread is rounding of float32 states.
    """
    mean, spread = coordinates.mean(0), coordinates.std(0)
    return mean, np.where(spread > 1e-6 * np.abs(mean), spread, np.inf)


def separating_line(coordinates: np.ndarray, is_first: np.ndarray) -> tuple[np.ndarray, float]:
    """w (2,) and b of the line w'z + b = 0 between two categories of points z (n, 2); `is_first` (n,): w'z + b > 0.

    It is that of a logistic regression (scikit-learn, C = 1) in standardised coordinates.
    """
    from sklearn.linear_model import LogisticRegression

    mean, scale = mean_and_scale(coordinates)
    model = LogisticRegression().fit((coordinates - mean) / scale, is_first)
    weights = model.coef_[0] / scale
    return weights, float(model.intercept_[0] - weights @ mean)


def measure(coordinates: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Silhouette of labels (n,) in standardised coordinates (n, k); leave-one-out accuracy of logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import silhouette_score
    from sklearn.model_selection import LeaveOneOut, cross_val_predict

    right = cross_val_predict(LogisticRegression(), coordinates, labels, cv=LeaveOneOut()) == labels
    return {"silhouette": float(silhouette_score(coordinates, labels)), "leave_one_out": float(right.mean())}


def separability(coordinates: np.ndarray, labels: np.ndarray, num_shuffles: int, seed: int) -> dict[str, Any]:
    """Each score of `measure`: `value`, mean over shuffles, `p` = (1 + shuffles at least as good) / (1 + shuffles).

    Coordinates are (n, k), labels (n,); the same seed gives the same shuffles in both subspaces.
    """
    random = np.random.default_rng(seed)
    mean, scale = mean_and_scale(coordinates)  # computed from all words: it uses no label
    coordinates = (coordinates - mean) / scale
    draws = [measure(coordinates, random.permutation(labels)) for _ in range(num_shuffles)]
    result = {}
    for name, value in measure(coordinates, labels).items():
        shuffled = np.array([draw[name] for draw in draws])
        as_good = int((shuffled >= value - 1e-9).sum())  # shuffles that swap two categories whole give the same value
        result[name] = {"value": value, "shuffled": float(shuffled.mean()), "p": (1 + as_good) / (1 + num_shuffles)}
    return result
