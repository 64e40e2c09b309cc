"""Whitening, the cut of a spectrum, nested bases: one of each, for every score and probe. All in float64."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_PROBES = 4


def rounding(size: int) -> float:
    """The relative cut of `numpy.linalg.matrix_rank` for a symmetric float64 matrix of this size: d * eps."""
    return size * torch.finfo(torch.float64).eps


def noise_probes(size: int) -> Tensor:
    """Z, (d, p): fixed random signs. The error of C Z is measured, as that of C itself would cost another C."""
    return torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (size, NUM_PROBES)))


@dataclass(frozen=True)
class Noise:
    """Rounding in a positive semi-definite matrix C: directions that it explains are not in the range of C."""

    diagonal: Tensor  # (d,), the most that rounding of the states adds to each diagonal element
    error: Tensor | None = None  # (d, p), the error of C Z for the signs Z of `noise_probes`; None: none
    max_rank: int | None = None  # directions that the data can have, by their number; None: any

    def num_null_directions(self, matrix: Tensor, eigenvalues: Tensor, basis: Tensor) -> int:
        """How many of the smallest eigenvalues of `equilibrated_eigh` errors of products, or the rank, explain.

        Random errors of the elements show, in a null space of m directions, as eigenvalues up to 2 sqrt(m) times their
        deviation (Wigner's semicircle). The largest m that this explains, with a factor of two to spare, is null; so a
        direction that stands alone above the noise is kept. An element's error in C is in proportion to the sizes of
        its two coordinates, so that each row of the error of C Z, divided by its own size and that of all coordinates,
        has the deviation of an equilibrated element.
        """
        num_null = 0 if self.max_rank is None else max(0, len(eigenvalues) - self.max_rank)
        is_used = basis.any(1)
        if self.error is None or not is_used.any():
            return num_null
        sizes = matrix.diagonal()[is_used]
        deviation = (self.error[is_used].square() / sizes[:, None] / sizes.sum()).mean().sqrt()
        count = torch.arange(1, len(eigenvalues) + 1).to(eigenvalues)
        explained = (eigenvalues <= 4 * deviation * count.sqrt()).nonzero()
        return max(num_null, int(explained.max()) + 1 if len(explained) else 0)


def equilibrated_eigh(matrix: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues of D^-1/2 C D^-1/2, D the diagonal of C, ascending, (d,), and A = D^-1/2 E: A' C A is diagonal.

    A coordinate that is always zero, or not more than rounding, has zeros in A.
    """
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > (noise.diagonal if noise else 0), diagonal, torch.inf).rsqrt()
    scaled = matrix * scale * scale[:, None]
    eigenvalues, eigenvectors = torch.linalg.eigh((scaled + scaled.T) / 2)
    return eigenvalues, scale[:, None] * eigenvectors


def whiten(matrix: Tensor, tolerance: float | None = None, noise: Noise | None = None) -> Tensor:
    """W with W' C W = I on the range of the symmetric, positive semi-definite C; its columns count the rank kept.

    C is scaled to unit diagonal before the cut, so that the rank depends neither on the unit of the data nor on one
    massive coordinate; then eigenvalues above `tolerance` times the largest, and above the noise, are kept. Where C is
    singular, the columns are in the range of the scaled matrix, so that solutions there depend on the axes.

    Differs from the paper: the released script keeps eigenvalues above 1e-8 of the matrix as it is, in float32.

    Args:
        matrix: C, (d, d), float64.
        tolerance: of the cut; None: d * eps, the rule of `numpy.linalg.matrix_rank`.
        noise: the part of C that is rounding beyond that; None: nothing.

    Returns:
        (d, rank).
    """
    eigenvalues, basis = equilibrated_eigh(matrix, noise)
    floor = (rounding(len(matrix)) if tolerance is None else tolerance) * eigenvalues[-1:].clamp(min=0)
    if noise:
        floor = floor + basis.square().T @ noise.diagonal
    kept = eigenvalues > floor
    if noise:
        kept[: noise.num_null_directions(matrix, eigenvalues, basis)] = False
    return basis[:, kept] * eigenvalues[kept].rsqrt()


def inverse_root(matrix: Tensor) -> Tensor:
    """Symmetric inverse square root of each symmetric matrix, (..., b, b); zero on its null space."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    kept = eigenvalues > rounding(matrix.shape[-1]) * eigenvalues[..., -1:].clamp(min=0)
    return (vectors * torch.where(kept, eigenvalues, torch.inf).rsqrt()[..., None, :]) @ vectors.mT


def without_constants(covariance: Tensor, mean: Tensor, tolerance: float) -> Tensor:
    """The covariance (d, d) with zeros for each feature whose standard deviation is below `tolerance` times |mean|."""
    constant = covariance.diagonal().clamp(min=0).sqrt() <= tolerance * mean.abs()
    return covariance.masked_fill(constant | constant[:, None], 0)


@dataclass(frozen=True)
class Eigenspace:
    """Eigenvectors of F F' u = lambda C u with lambda > 0, and the space that these and the tied ones (0) span."""

    whitener: Tensor  # W, (d, rank): W' C W = I; its columns span all eigenvectors
    coordinates: Tensor  # (rank, r), orthonormal: the eigenvectors are W times these, largest eigenvalue first
    eigenvalues: Tensor  # (r,)

    @property
    def vectors(self) -> Tensor:
        """(d, r), C-orthonormal."""
        return self.whitener @ self.coordinates


@dataclass(frozen=True)
class NestedBasis:
    """An orthogonal matrix whose first columns span the first k of some vectors, for every k."""

    q: Tensor  # Q, (d, d)
    dims: list[int]  # of the spans: how many columns of Q span the first k vectors, for each k

    @classmethod
    def of(cls, vectors: Tensor, ks: list[int], sizes: Tensor | None = None) -> "NestedBasis":
        """The basis of the columns of `vectors`, (d, k), in their order, dependent ones left out.

        Args:
            ks: numbers of vectors whose spans are of interest.
            vectors: one within sqrt(d * eps) of the span of those before it is dependent.
            sizes: (k,), what rounding is relative to: a vector of sqrt(d * eps) of its size is zero; None: its length.
        """
        tolerance = math.sqrt(rounding(len(vectors)))
        lengths = vectors.norm(dim=0)
        is_zero = lengths <= (0 if sizes is None else tolerance * sizes)
        columns = vectors / torch.where(is_zero, torch.inf, lengths)
        q, r = torch.linalg.qr(columns, mode="complete")
        kept = list(range(min(columns.shape)))
        if (r.diagonal().abs() <= tolerance).any():  # a dependent column must not take a place in Q
            kept = independent_columns(columns, tolerance)
            q = torch.linalg.qr(columns[:, kept], mode="complete").Q
        return cls(q, np.searchsorted(kept, ks).tolist())

    def projected_norms(self, vectors: Tensor) -> Tensor:
        """|P_k x_j|^2 for the projector on each span and each vector x_j, (d, n): (len(ks), n)."""
        return torch.nn.functional.pad((self.q.T @ vectors).square().cumsum(0), (0, 0, 1, 0))[self.dims]


def independent_columns(columns: Tensor, tolerance: float) -> list[int]:
    """The columns, each of norm 1 or 0, of which more than `tolerance` is outside the span of those before it."""
    kept: list[int] = []
    basis = torch.zeros_like(columns.T)  # orthonormal rows
    for j, column in enumerate(columns.T):
        span = basis[: len(kept)]
        for _ in range(2):  # twice is enough: one pass leaves rounding of the size of the part it takes off
            column = column - (span @ column) @ span
        if (length := column.norm()) > tolerance:
            basis[len(kept)] = column / length
            kept.append(j)
    return kept
