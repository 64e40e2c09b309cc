"""Whitening, cuts of a spectrum, nested bases: one of each, for every score and probe. All in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor


def eigen_cut(eigenvalues: Tensor, tolerance: float) -> Tensor:
    """Which eigenvalues (..., d), in ascending order, are above `tolerance` times the largest: a mask of that shape."""
    return eigenvalues > tolerance * eigenvalues[..., -1:].clamp(min=0)


def rounding(size: int) -> float:
    """The relative cut of `numpy.linalg.matrix_rank` for a symmetric float64 matrix of this size: d * eps."""
    return size * torch.finfo(torch.float64).eps


def unit_diagonal_scale(matrix: Tensor) -> Tensor:
    """D^-1/2 of the diagonal of a positive semi-definite matrix, (d,); 0 for a coordinate that is always zero."""
    diagonal = matrix.diagonal()
    return torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()


def equilibrated_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of D^-1/2 C D^-1/2, ascending, (d,), and the basis A = D^-1/2 E with A' C A = diag(eigenvalues)."""
    scale = unit_diagonal_scale(matrix)
    scaled = matrix * scale * scale[:, None]
    eigenvalues, eigenvectors = torch.linalg.eigh((scaled + scaled.T) / 2)
    return eigenvalues, scale[:, None] * eigenvectors


def whiten(matrix: Tensor, tolerance: float | None = None) -> Tensor:
    """W with W' C W = I on the range of the symmetric, positive semi-definite C; its columns count the rank kept.

    C is scaled to unit diagonal before the cut, so that the rank depends neither on the unit of the data nor on one
    massive coordinate; then eigenvalues above `tolerance` times the largest are kept. Where a Cholesky factor proves
    that all are, it is the whitener: every W gives the same scores, and it costs less.

    Differs from the paper: the released script keeps eigenvalues above 1e-8 of the matrix as it is, in float32.

    Args:
        matrix: C, (d, d), float64.
        tolerance: of the cut; None: d * eps, the rule of `numpy.linalg.matrix_rank`.

    Returns:
        (d, rank).
    """
    tolerance = rounding(len(matrix)) if tolerance is None else tolerance
    scale = unit_diagonal_scale(matrix)
    scaled = matrix * scale * scale[:, None]
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if not failed:
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(matrix)).to(matrix), upper=False)
        # smallest eigenvalue >= 1 / |inverse|_F^2, largest <= the 1-norm; a thousandfold margin keeps rounding out
        if 1 / inverse.square().sum() > 1e3 * tolerance * scaled.abs().sum(0).max():
            return scale[:, None] * inverse.T
    eigenvalues, basis = equilibrated_eigh(matrix)
    kept = eigen_cut(eigenvalues, tolerance)
    return basis[:, kept] * eigenvalues[kept].rsqrt()


def inverse_root(matrix: Tensor) -> Tensor:
    """Symmetric inverse square root of each symmetric matrix, (..., b, b); zero on its null space."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    kept = eigen_cut(eigenvalues, rounding(matrix.shape[-1]))
    return (vectors * torch.where(kept, eigenvalues, torch.inf).rsqrt()[..., None, :]) @ vectors.mT


def without_constants(covariance: Tensor, mean: Tensor, tolerance: float) -> Tensor:
    """The covariance (d, d) with zeros for each feature whose standard deviation is below `tolerance` times |mean|."""
    constant = covariance.diagonal().clamp(min=0).sqrt() <= tolerance * mean.abs()
    return covariance.masked_fill(constant | constant[:, None], 0)


@dataclass(frozen=True)
class NestedBasis:
    """Square orthogonal Q whose first k columns span the first k of some vectors, for every k; it is never formed."""

    reflectors: Tensor  # Householder reflectors, as torch.geqrf gives them
    factors: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> "NestedBasis":
        """The basis of the columns of `vectors`, (d, k)."""
        reflectors, factors = torch.geqrf(vectors / vectors.norm(dim=0))
        return cls(reflectors[:, : len(factors)], factors)

    def coordinates(self, vectors: Tensor) -> Tensor:
        """Q' X of vectors X, (d, n): row k is the part in the k-th direction."""
        return torch.ormqr(self.reflectors, self.factors, vectors, left=True, transpose=True)

    def change_of(self, matrix: Tensor) -> Tensor:
        """A Q of a matrix A, (n, d)."""
        return torch.ormqr(self.reflectors, self.factors, matrix, left=False)


def captured(coordinates: Tensor, ks: list[int]) -> Tensor:
    """|Q_k' x_j|^2 for each k of `ks` and each vector x_j, from the coordinates Q' X: (len(ks), n)."""
    return coordinates.square().cumsum(0)[[min(k, len(coordinates)) - 1 for k in ks]]
