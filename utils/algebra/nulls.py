"""Compute the scores that chance gives, under permuted labels and with a random V, from the moments alone.

Permuted labels turn the whitened label cross-covariance into a random matrix of known law. For a random V, of a
rotation-invariant law, the mean and deviation of the Euclidean overlap have closed forms. The whitened overlaps have
none; `random_scores` draws them in the eigenbasis of Sigma: there a random V has Gaussian rows times deviations.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from utils.algebra.linalg import Eigenspace, NestedBasis, rounding
from utils.algebra.moments import LayerMoments

STREAMS: dict[str, tuple[int, ...]] = {"permuted labels": (), "control of V": (1,), "random V": (2,)}
Seed = tuple[int, int]  # seed of the run, number of the layer


def random_stream(purpose: str, seed: int, layer_index: int) -> np.random.Generator:
    """The random generator of one purpose in `STREAMS` at one layer; streams of purposes and layers differ."""
    return np.random.default_rng([seed, layer_index, *STREAMS[purpose]])


def inverse_root(matrix: Tensor) -> Tensor:
    """Symmetric inverse square root of each symmetric matrix, (..., b, b); zero on its null space."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    kept = eigenvalues > rounding(matrix.shape[-1]) * eigenvalues[..., -1:].clamp(min=0)
    return (vectors * torch.where(kept, eigenvalues, torch.inf).rsqrt()[..., None, :]) @ vectors.mT


def draw_permuted_factors(
    rank: int, num_samples: int, label_covariance: Tensor, num_draws: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draws of W' S under permuted labels, (num_draws, rank, c), and orthonormal bases of them, (num_draws, rank, b).

    W whitens Sigma. W' S = G (G'G + R)^{-1/2} L', with G (rank Sigma, b) standard normal, R Wishart with n - 1 - rank
    degrees of freedom, L (c, b) a root of the label covariance. The law is rotation invariant, so that any orthonormal
    basis of the whitened space serves.
    """
    eigenvalues, vectors = torch.linalg.eigh(label_covariance)
    kept = eigenvalues > rounding(len(eigenvalues)) * eigenvalues[-1].clamp(min=0)
    label_root = vectors[:, kept] * eigenvalues[kept].sqrt()
    num_labels, freedom = label_root.shape[1], max(0, num_samples - 1 - rank)
    gaussian = random.standard_normal((num_draws, rank, num_labels))
    if freedom > num_labels:  # Bartlett: the triangular root of a Wishart matrix instead of `freedom` Gaussian rows
        root = np.triu(random.standard_normal((num_draws, num_labels, num_labels)), 1)
        diagonal = np.arange(num_labels)
        root[:, diagonal, diagonal] = np.sqrt(random.chisquare(freedom - diagonal, (num_draws, num_labels)))
    else:
        root = random.standard_normal((num_draws, freedom, num_labels))
    g, r = (torch.from_numpy(array).to(label_covariance.device) for array in (gaussian, root))
    gram = g.mT @ g
    return g @ inverse_root(gram + r.mT @ r) @ label_root.T, g @ inverse_root(gram)


def nested_shares(columns: Tensor, dims: list[int]) -> Tensor:
    """The share of the squares of each draw, (num_draws, rank, c), in its first `dims` rows: (num_draws, len(dims))."""
    inside = pad(columns.square().sum(2).cumsum(1), (1, 0))
    return inside[:, dims] / inside[:, -1:]


def multiply(matrices: list[Tensor], draws: Tensor) -> Tensor:
    """The product of the matrices and each draw, (num_draws, rows, c), in the cheapest order."""
    product = torch.linalg.multi_dot([*matrices, draws.permute(1, 0, 2).flatten(1)])
    return product.unflatten(1, (len(draws), -1)).permute(1, 0, 2)


def permuted_scores(
    moments: LayerMoments, space: tuple[Tensor, Tensor, NestedBasis, NestedBasis], num_draws: int, seed: Seed
) -> dict[str, Tensor]:
    """`ntps_label`, `ntps_whitened` and `retained` under permuted labels, (num_draws, fractions) each.

    `moments` are those of the perception problem, centred or not. `space` has the whitener of M, (d, rank M), W' Sigma
    with the whitener W of Sigma, (rank Sigma, d), and the nested bases of V before and after whitening by Sigma.
    """
    of_perception, to_whitened, basis, whitened = space
    random, n, covariance = random_stream("permuted labels", *seed), moments.num_samples, moments.label_covariance
    # coordinates: the nested basis of V within the space that Sigma whitens
    factors, bases = draw_permuted_factors(len(to_whitened), n, covariance, num_draws, random)
    offset = torch.outer(of_perception.T @ moments.pooled_mean, moments.label_mean)
    labels = multiply([of_perception.T, to_whitened.T, whitened.q], factors) + offset  # W_M' B; mu p' stays the same
    labels = labels @ inverse_root(labels.mT @ labels)
    directions = multiply([basis.q.T, of_perception], labels)
    return {
        "ntps_label": nested_shares(directions, basis.dims),
        "ntps_whitened": nested_shares(bases, whitened.dims),
        "retained": nested_shares(factors, whitened.dims),
    }


def euclidean_overlap(directions: Tensor, ks: list[int]) -> tuple[Tensor, float]:
    """Mean at each k of |P U|^2 / |U|^2, U (d, r), P a random projector of rank k; and the deviation of their average.

    Subspaces of one V are nested. With q_j the columns of a random rotation and A = U U' / |U|^2, the q_j' A q_j have
    variance 2 (tr A^2 - 1 / d) / (d (d + 2)) and sum to 1, so that the first k and the first l >= k of them covary by
    k (d - l) / (d - 1) times that.
    """
    d, k = len(directions), torch.tensor(ks).to(directions)
    gram = directions.T @ directions
    squared = gram.square().sum() / gram.trace() ** 2
    variance = 2 * (squared - 1 / d) / (d * (d + 2))
    covariance = torch.minimum(k[:, None], k) * (d - torch.maximum(k[:, None], k)) / max(d - 1, 1) * variance
    return k / d, covariance.mean().clamp(min=0).sqrt().item()


def random_scores(
    directions: Tensor, to_whitened: Tensor, labels: Eigenspace, ks: list[int], num_draws: int, seed: Seed
) -> dict[str, dict[str, float | list[float]]]:
    """The scores of random V that depend on labels: mean at each fraction; mean and deviation of the average over them.

    `directions` are U_r, (d, r); `to_whitened`, W' Sigma, takes V to the space that Sigma whitens, (rank, d), in which
    `labels` are the directions that explain variance of the labels. Without draws the result is empty.
    """
    if not num_draws:
        return {}
    mean, deviation = euclidean_overlap(directions, ks)
    scores = {"ntps_label": {"fractions": mean.tolist(), "mean": mean.mean().item(), "std": deviation}}
    variances, axes = torch.linalg.eigh(to_whitened @ to_whitened.T)
    rotated, weights = axes.T @ labels.coordinates, labels.eigenvalues
    drawn: dict[str, list[Tensor]] = {"ntps_whitened": [], "retained": []}
    random = random_stream("random V", *seed)
    for _ in range(num_draws):
        v = torch.from_numpy(random.standard_normal((len(variances), max(ks)))).to(rotated)
        inside = NestedBasis.of(variances.clamp(min=0).sqrt()[:, None] * v, ks).projected_norms(rotated)
        drawn["ntps_whitened"].append(inside.mean(1))
        drawn["retained"].append(inside @ weights / weights.sum())
    for name, draws in drawn.items():
        of_fractions, of_run = torch.stack(draws).mean(0), torch.stack(draws).mean(1)
        scores[name] = {"fractions": of_fractions.tolist(), "mean": of_run.mean().item(), "std": of_run.std().item()}
    return scores
