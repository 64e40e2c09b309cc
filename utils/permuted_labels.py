"""What the scores are when the labels say nothing: their distribution under permuted labels, in closed form.

No pass over the data is needed. After whitening by the covariance of the features, permuting the labels turns the
label cross-covariance into a random matrix of known law (a matrix-variate beta with the label covariance on its right).
"""

import numpy as np
import torch
from torch import Tensor


def inverse_root(matrix: Tensor) -> Tensor:
    """Symmetric inverse square root of each symmetric matrix, (..., b, b); zero on its null space."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    kept = eigenvalues > matrix.shape[-1] * torch.finfo(matrix.dtype).eps * eigenvalues[..., -1:]
    return (vectors * torch.where(kept, eigenvalues, torch.inf).rsqrt()[..., None, :]) @ vectors.mT


def draw_permuted_factors(
    rank: int, num_samples: int, label_covariance: Tensor, num_draws: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draws of W' S under permuted labels, W the whitener of Sigma, and an orthonormal basis of each draw's span.

    W' S = G (G'G + R)^{-1/2} L': G (rank, b) standard normal, R Wishart with n - 1 - rank degrees of freedom, L
    (c, b) a root of the label covariance. The draws are rotation invariant: any orthonormal basis of the whitened
    space will do.

    Args:
        rank: of Sigma.
        num_samples: n.
        label_covariance: (c, c).
        num_draws: number of draws.
        random: source of randomness.

    Returns:
        (num_draws, rank, c) and (num_draws, rank, b).
    """
    eigenvalues, vectors = torch.linalg.eigh(label_covariance)
    kept = eigenvalues > len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
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
    return g @ inverse_root(gram + r.mT @ r) @ label_root.T, g @ inverse_root(gram)


def permuted_label_null(
    draws: tuple[Tensor, Tensor],
    to_perception: Tensor,
    offset: Tensor,
    perception: Tensor,
    ks: tuple[list[int], list[int]],
) -> dict[str, Tensor]:
    """`ntps_label`, `ntps_whitened` and `retained` of each draw of permuted labels, (num_draws, fractions) each.

    Args:
        draws: of `draw_permuted_factors`, in the nested basis of V within the space that Sigma whitens.
        to_perception: takes that basis to the space that M whitens, (rank M, rank Sigma).
        offset: W_M' mu p', the part of W_M' B that permuting leaves alone, (rank M, c).
        perception: Q' W_M, (d, rank M), Q the nested basis of V.
        ks: columns of V for each fraction, in the d-dimensional space and in the whitened one.
    """
    factor, orthonormal = draws
    rows, rows_whitened = ([k - 1 for k in of] for of in ks)
    retained = factor.square().sum(2).cumsum(1)
    whitened = orthonormal.square().sum(2).cumsum(1)
    num_draws, _, num_labels = factor.shape
    # one product over all draws: (rank M, rank Sigma) @ (rank Sigma, draws * c)
    labels = to_perception @ factor.transpose(0, 1).flatten(1) + offset.repeat(1, num_draws)
    labels = labels.unflatten(1, (num_draws, num_labels)).transpose(0, 1)
    directions = perception @ (labels @ inverse_root(labels.mT @ labels)).transpose(0, 1).flatten(1)
    euclidean = directions.unflatten(1, (num_draws, num_labels)).square().sum(2).cumsum(0).T
    return {
        "ntps_label": euclidean[:, rows] / euclidean[:, -1:],
        "ntps_whitened": whitened[:, rows_whitened] / whitened[:, -1:],
        "retained": retained[:, rows_whitened] / retained[:, -1:],
    }
