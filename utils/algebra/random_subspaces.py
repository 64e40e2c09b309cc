"""What the scores of a random V are, V from a rotation-invariant law: the zero for next-token prediction's V.

The Euclidean overlap has its mean and deviation in closed form. The whitened ones have not, as whitening stretches V:
they are drawn, in the coordinates of the eigenvectors of Sigma, where a random V is Gaussian rows, each times its
deviation.
"""

import numpy as np
import torch
from torch import Tensor

from utils.algebra.linalg import NestedBasis, captured


def euclidean_overlap(directions: Tensor, ks: list[int]) -> tuple[Tensor, float]:
    """|P U|^2 / |U|^2 for a random projector P of rank k: its mean at each k, and the deviation of the mean over all k.

    Subspaces of one V are nested. With q_j the columns of a random rotation and A = U U' / |U|^2, the q_j' A q_j have
    variance 2 (tr A^2 - 1 / d) / (d (d + 2)) and sum to 1, so that the first k and the first l >= k of them covary by
    k (d - l) / (d - 1) times that.

    Args:
        directions: U, (d, r).
        ks: columns of V for each fraction.
    """
    d, k = len(directions), torch.tensor(ks).to(directions)
    gram = directions.T @ directions
    squared = gram.square().sum() / gram.trace() ** 2
    variance = 2 * (squared - 1 / d) / (d * (d + 2))
    covariance = torch.minimum(k[:, None], k) * (d - torch.maximum(k[:, None], k)) / max(d - 1, 1) * variance
    return k / d, covariance.mean().clamp(min=0).sqrt().item()


def whitened_draws(
    to_whitened: Tensor, labels: Tensor, weights: Tensor, ks: list[int], num_draws: int, random: np.random.Generator
) -> dict[str, Tensor]:
    """`ntps_whitened` and `retained` of random V, (num_draws, fractions) each.

    Args:
        to_whitened: W' Sigma, W the whitener of Sigma: takes V to the whitened space, (rank, d).
        labels: P, the orthonormal label directions there, (rank, r).
        weights: what each explains, (r,).
        ks: columns of V for each fraction.
        num_draws: number of draws.
        random: source of randomness.
    """
    variances, axes = torch.linalg.eigh(to_whitened @ to_whitened.T)
    deviations, labels = variances.clamp(min=0).sqrt(), axes.T @ labels
    shares: dict[str, list[Tensor]] = {"ntps_whitened": [], "retained": []}
    for _ in range(num_draws):
        drawn = torch.from_numpy(random.standard_normal((len(variances), max(ks)))).to(labels)
        basis = NestedBasis.of(deviations[:, None] * drawn)
        inside = captured(basis.coordinates(labels), basis.spanned(ks))
        shares["ntps_whitened"].append(inside.mean(1))
        shares["retained"].append(inside @ weights / weights.sum())
    return {name: torch.stack(draws) for name, draws in shares.items()}


def random_scores(
    directions: Tensor,
    to_whitened: Tensor,
    explained: tuple[Tensor, Tensor],
    ks: list[int],
    num_draws: int,
    random: np.random.Generator,
) -> dict[str, dict[str, float | list[float]]]:
    """Mean at each fraction, and mean and deviation of the mean over fractions, of each score that sees the labels.

    Args:
        directions: U_r, (d, r).
        to_whitened: as of `whitened_draws`.
        explained: label directions in the whitened space, and singular values, as K_sweep.py has them.
        ks: columns of V for each fraction.
        num_draws: of the whitened scores.
        random: source of randomness.
    """
    labels, values = explained
    mean, deviation = euclidean_overlap(directions, ks)
    scores = {"ntps_label": {"fractions": mean.tolist(), "mean": mean.mean().item(), "std": deviation}}
    for name, draws in whitened_draws(to_whitened, labels, values.square(), ks, num_draws, random).items():
        whole = draws.mean(1)
        scores[name] = {"fractions": draws.mean(0).tolist(), "mean": whole.mean().item(), "std": whole.std().item()}
    return scores
