"""A toy problem that the tests of the method share: pooled features, labels and states, and their moments."""

import numpy as np
import torch

import K_sweep
from tests.conftest import configure
from utils.algebra.moments import LayerMoments

FRACTIONS = K_sweep.Config().fractions


def tensor(array) -> torch.Tensor:
    return torch.as_tensor(np.asarray(array), dtype=torch.float64)


def make_data(num_samples, hidden_size, num_classes, seed=0, signal=1.0, decades=2.0):
    """Pooled features with an uneven spectrum and a mean, one-hot labels, and a token sequence for the prefixes."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(hidden_size, hidden_size)) * np.logspace(0, -decades, hidden_size)
    labels = random.integers(0, num_classes, num_samples)
    labels[:num_classes] = range(num_classes)
    centres = signal * random.normal(size=(num_classes, hidden_size))
    features = (random.normal(size=(num_samples, hidden_size)) + centres[labels] + 0.5) @ mixing
    states = (random.normal(size=(40 * hidden_size, hidden_size)) + 0.3) @ mixing
    return features, np.eye(num_classes)[labels], states


def averages_of(pooled, targets, prefixes, following) -> dict[str, torch.Tensor]:
    """The moments by their definition; rows are texts in the first two matrices, pairs of tokens in the others."""
    n, norms = len(pooled), np.square(pooled).sum(1)
    averages = {
        "pooled_second_moment": pooled.T @ pooled / n,
        "pooled_label_cross_moment": pooled.T @ targets / n,
        "pooled_mean": pooled.mean(0),
        "prefix_second_moment": prefixes.T @ prefixes / n,
        "prefix_next_cross_moment": prefixes.T @ following / n,
        "prefix_mean": prefixes.sum(0) / n,
        "next_mean": following.sum(0) / n,
        "label_mean": targets.mean(0),
        "label_second_moment": targets.T @ targets / n,
        "pooled_norm_fourth_power": np.square(norms).mean(),
        "pooled_norm_squared_pooled": norms @ pooled / n,
    }
    return {name: tensor(value) for name, value in averages.items()}


def moments_of(features, targets, states=None, **more) -> LayerMoments:
    """The moments of one layer from the data itself; the states are one long text."""
    states = np.zeros((2, features.shape[1])) if states is None else states
    prefix = states.cumsum(0)[:-1] / np.arange(1, len(states))[:, None]  # a running mean: a toy problem stays sane
    averages = averages_of(features, targets, prefix, states[1:])
    return LayerMoments(**averages, num_samples=len(features), num_pairs=len(prefix), **more)


def solve(moments, held_out=None, layer=0, num_random_draws=0, **options) -> dict:
    """Every number of `sweep_layer` by its name."""
    found = K_sweep.sweep_layer(moments, held_out, configure(K_sweep, **options), layer, num_random_draws)
    return {**vars(found), **found.scores, **found.probe}


def sweep(features, targets, states, **options) -> dict:
    return solve(moments_of(features, targets, states), **options)
