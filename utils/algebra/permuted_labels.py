"""What the scores are when the labels say nothing: their distribution under permuted labels, in closed form.

No pass over the data is needed. After whitening by the covariance of the features, permuting the labels turns the
label cross-covariance into a random matrix of known law (a matrix-variate beta with the label covariance on its right).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from utils.algebra.linalg import eigen_cut, inverse_root, rounding


@dataclass(frozen=True)
class PermutedFactors:
    """Draws of W' S under permuted labels, W the whitener of Sigma, and an orthonormal basis of each draw's span."""

    factors: Tensor  # (num_draws, rank Sigma, c)
    bases: Tensor  # (num_draws, rank Sigma, b), b the rank of the label covariance


def draw_permuted_factors(
    rank: int, num_samples: int, label_covariance: Tensor, num_draws: int, random: np.random.Generator
) -> PermutedFactors:
    """Draws of W' S when the labels are permuted.

    W' S = G (G'G + R)^{-1/2} L': G (rank, b) standard normal, R Wishart with n - 1 - rank degrees of freedom, L
    (c, b) a root of the label covariance. The draws are rotation invariant: any orthonormal basis of the whitened
    space will do.

    Args:
        rank: of Sigma.
        num_samples: n.
        label_covariance: (c, c).
        num_draws: number of draws.
        random: source of randomness.
    """
    eigenvalues, vectors = torch.linalg.eigh(label_covariance)
    kept = eigen_cut(eigenvalues, rounding(len(eigenvalues)))
    label_root = vectors[:, kept] * eigenvalues[kept].sqrt()
    num_labels, freedom = label_root.shape[1], max(0, num_samples - 1 - rank)
    gaussian = random.standard_normal((num_draws, rank, num_labels))
    if freedom > num_labels:  # Bartlett: the triangular root of a Wishart matrix instead of `freedom` Gaussian rows
        root = np.triu(random.standard_normal((num_draws, num_labels, num_labels)), 1)
        diagonal = range(num_labels)
        root[:, diagonal, diagonal] = np.sqrt(
            random.chisquare(freedom - np.arange(num_labels), (num_draws, num_labels))
        )
    else:
        root = random.standard_normal((num_draws, freedom, num_labels))
    g, r = (torch.from_numpy(array).to(label_covariance.device) for array in (gaussian, root))
    gram = g.mT @ g
    return PermutedFactors(g @ inverse_root(gram + r.mT @ r) @ label_root.T, g @ inverse_root(gram))


def whitened_null(draws: PermutedFactors, ks: list[int]) -> dict[str, Tensor]:
    """`ntps_whitened` and `retained` of each draw, (num_draws, fractions) each.

    Args:
        draws: of `draw_permuted_factors`, in the nested basis of V within the space that Sigma whitens.
        ks: directions of that space that the first columns of V span, for each fraction.
    """
    shares = {}
    for name, columns in (("ntps_whitened", draws.bases), ("retained", draws.factors)):
        inside = pad(columns.square().sum(2).cumsum(1), (1, 0))
        shares[name] = inside[:, ks] / inside[:, -1:]
    return shares


def euclidean_null(
    draws: PermutedFactors, to_perception: Tensor, offset: Tensor, perception: Tensor, ks: list[int]
) -> Tensor:
    """`ntps_label` of each draw, (num_draws, fractions).

    Args:
        draws: as of `whitened_null`.
        to_perception: takes that basis to the space that M whitens, (rank M, rank Sigma).
        offset: W_M' mu p', the part of W_M' B that permuting leaves alone, (rank M, c).
        perception: Q' W_M, (d, rank M), Q the nested basis of V.
        ks: columns of V for each fraction.
    """
    num_draws, _, num_labels = draws.factors.shape
    # one product over all draws: (rank M, rank Sigma) @ (rank Sigma, draws * c)
    labels = to_perception @ draws.factors.transpose(0, 1).flatten(1) + offset.repeat(1, num_draws)
    labels = labels.unflatten(1, (num_draws, num_labels)).transpose(0, 1)
    directions = perception @ (labels @ inverse_root(labels.mT @ labels)).transpose(0, 1).flatten(1)
    inside = pad(directions.unflatten(1, (num_draws, num_labels)).square().sum(2).cumsum(0).T, (1, 0))
    return inside[:, ks] / inside[:, -1:]
