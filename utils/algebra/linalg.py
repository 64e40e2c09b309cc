"""Whitening, cuts of a spectrum, nested bases: one of each, for every score and probe. All in float64."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_PROBES = 4


def eigen_cut(eigenvalues: Tensor, tolerance: float) -> Tensor:
    """Which eigenvalues (..., d), in ascending order, are above `tolerance` times the largest: a mask of that shape."""
    return eigenvalues > tolerance * eigenvalues[..., -1:].clamp(min=0)


def rounding(size: int) -> float:
    """The relative cut of `numpy.linalg.matrix_rank` for a symmetric float64 matrix of this size: d * eps."""
    return size * torch.finfo(torch.float64).eps


def noise_probes(size: int) -> Tensor:
    """Z, (d, p): fixed random signs. The error of C Z is measured, as that of C itself would cost another C."""
    return torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (size, NUM_PROBES)))


@dataclass(frozen=True)
class Noise:
    """What rounding alone puts into a positive semi-definite matrix C: directions it explains are not in C's range."""

    diagonal: Tensor  # (d,), what it can add to each diagonal element; nothing that is correlated over coordinates
    error: Tensor | None = None  # (d, p), the error of C Z for the signs Z of `noise_probes`; None: none
    max_rank: int | None = None  # directions that the data can have, by their number; None: any

    @classmethod
    def none(cls, matrix: Tensor) -> "Noise":
        return cls(torch.zeros_like(matrix.diagonal()))

    def element_spread(self, matrix: Tensor, scale: Tensor) -> float:
        """Standard deviation of the error of an element of D^-1/2 C D^-1/2.

        An element's error in C is in proportion to the sizes of its two coordinates, so that the sum over a row and
        the signs of Z has the variance of the element times the trace.
        """
        if self.error is None or not scale.any():
            return 0.0
        rows = (self.error * scale[:, None])[scale > 0] / matrix.diagonal()[scale > 0].sum().sqrt()
        return rows.square().mean().sqrt().item()


def unit_diagonal_scale(matrix: Tensor, noise: Noise | None = None) -> Tensor:
    """D^-1/2 of the diagonal of C, (d,); 0 for a coordinate that is always zero, or not more than rounding."""
    diagonal = matrix.diagonal()
    return torch.where(diagonal > (noise.diagonal if noise else 0), diagonal, torch.inf).rsqrt()


def equilibrated_eigh(matrix: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues of D^-1/2 C D^-1/2, ascending, (d,), and the basis A = D^-1/2 E with A' C A = diag(eigenvalues)."""
    scale = unit_diagonal_scale(matrix, noise)
    scaled = matrix * scale * scale[:, None]
    eigenvalues, eigenvectors = torch.linalg.eigh((scaled + scaled.T) / 2)
    return eigenvalues, scale[:, None] * eigenvectors


def above_noise(eigenvalues: Tensor, basis: Tensor, noise: Noise, spread: float, tolerance: float) -> Tensor:
    """Which directions of `equilibrated_eigh` rounding does not explain: a mask, (d,).

    A direction is dropped where its eigenvalue is below `tolerance` times the largest plus what `noise.diagonal` gives
    it. Random errors of the elements show, in a null space of m directions, as eigenvalues up to 2 sqrt(m) times their
    spread (Wigner's semicircle); the largest m that this explains, with a factor of two to spare, is dropped. So where
    the spectrum goes on through the noise nothing is cut that stands out alone.
    """
    floor = tolerance * eigenvalues[-1:].clamp(min=0) + basis.square().T @ noise.diagonal
    count = torch.arange(1, len(eigenvalues) + 1).to(eigenvalues)
    explained = (eigenvalues <= 4 * spread * count.sqrt()).nonzero()
    num_null = int(explained[-1]) + 1 if len(explained) else 0
    if noise.max_rank is not None:
        num_null = max(num_null, len(eigenvalues) - noise.max_rank)
    return (eigenvalues > floor) & (count > num_null)


def whiten(matrix: Tensor, tolerance: float | None = None, noise: Noise | None = None) -> Tensor:
    """W with W' C W = I on the range of the symmetric, positive semi-definite C; its columns count the rank kept.

    C is scaled to unit diagonal before the cut, so that the rank depends neither on the unit of the data nor on one
    massive coordinate; then eigenvalues above `tolerance` times the largest, and above the noise, are kept. Where C is
    singular, the columns are in the range of the scaled matrix, so that solutions there depend on the axes. Where a
    Cholesky factor proves that all are, it is the whitener: every W gives the same scores, and it costs less.

    Differs from the paper: the released script keeps eigenvalues above 1e-8 of the matrix as it is, in float32.

    Args:
        matrix: C, (d, d), float64.
        tolerance: of the cut; None: d * eps, the rule of `numpy.linalg.matrix_rank`.
        noise: what of C is rounding beyond that; None: nothing.

    Returns:
        (d, rank).
    """
    tolerance = rounding(len(matrix)) if tolerance is None else tolerance
    noise = noise or Noise.none(matrix)
    scale = unit_diagonal_scale(matrix, noise)
    scaled = matrix * scale * scale[:, None]
    spread = noise.element_spread(matrix, scale)
    cut = 2 * (noise.diagonal * scale.square()).max() + 8 * spread * math.sqrt(len(matrix))
    full = noise.max_rank is None or noise.max_rank >= len(matrix)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if full and not failed:
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(matrix)).to(matrix), upper=False)
        # smallest eigenvalue >= 1 / |inverse|_F^2, largest <= the 1-norm; a thousandfold margin keeps rounding out
        if 1 / inverse.square().sum() > 1e3 * tolerance * scaled.abs().sum(0).max() + cut:
            return scale[:, None] * inverse.T
    eigenvalues, basis = equilibrated_eigh(matrix, noise)
    kept = above_noise(eigenvalues, basis, noise, spread, tolerance)
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


def independent_columns(columns: Tensor, tolerance: float) -> list[int]:
    """The columns, each of norm 1 or 0, of which more than `tolerance` is outside the span of those before it."""
    kept: list[int] = []
    basis = columns[:, :0]
    for start in range(0, columns.shape[1], 64):  # in blocks: what earlier blocks span goes off in one product
        block, new = columns[:, start : start + 64].clone(), []
        for _ in range(2):  # twice is enough: one pass leaves rounding of the size of what it takes off
            block -= basis @ (basis.T @ block)
        for j, column in enumerate(block.T):
            if len(kept) < len(columns) and (length := column.norm()) > tolerance:
                new.append(column / length)
                block[:, j + 1 :] -= torch.outer(new[-1], new[-1] @ block[:, j + 1 :])
                kept.append(start + j)
        basis = torch.cat([basis, *(column[:, None] for column in new)], dim=1)
    return kept


@dataclass(frozen=True)
class NestedBasis:
    """Square orthogonal Q whose first columns span the first k of some vectors, for every k; it is never formed."""

    reflectors: Tensor  # Householder reflectors, as torch.geqrf gives them
    factors: Tensor
    num_spanned: list[int]  # [k]: how many columns of Q span the first k vectors; less than k where these are dependent

    @classmethod
    def of(cls, vectors: Tensor, sizes: Tensor | None = None) -> "NestedBasis":
        """The basis of the columns of `vectors`, (d, k), in their order, dependent ones left out.

        Args:
            vectors: what lies within sqrt(d * eps) of the span of those before it is dependent.
            sizes: (k,), what rounding is relative to: a vector of sqrt(d * eps) of its size is zero; None: its length.
        """
        tolerance = math.sqrt(rounding(len(vectors)))
        lengths = vectors.norm(dim=0)
        is_zero = lengths <= (0 if sizes is None else tolerance * sizes)
        columns = vectors / torch.where(is_zero, torch.inf, lengths)
        reflectors, factors = torch.geqrf(columns)
        kept = list(range(len(factors)))
        if (reflectors.diagonal().abs() <= tolerance).any():
            kept = independent_columns(columns, tolerance)
            reflectors, factors = torch.geqrf(columns[:, kept])
        num_spanned = np.searchsorted(kept, np.arange(columns.shape[1] + 1)).tolist()
        return cls(reflectors[:, : len(factors)], factors, num_spanned)

    def spanned(self, ks: list[int]) -> list[int]:
        """How many columns of Q span the first k vectors, for each k."""
        return [self.num_spanned[k] for k in ks]

    def coordinates(self, vectors: Tensor) -> Tensor:
        """Q' X of vectors X, (d, n): row k is the part in the k-th direction."""
        return torch.ormqr(self.reflectors, self.factors, vectors, left=True, transpose=True)

    def change_of(self, matrix: Tensor) -> Tensor:
        """A Q of a matrix A, (n, d)."""
        return torch.ormqr(self.reflectors, self.factors, matrix, left=False)


def captured(coordinates: Tensor, ks: list[int]) -> Tensor:
    """|Q_k' x_j|^2 for each k of `ks` and each vector x_j, from the coordinates Q' X: (len(ks), n)."""
    return torch.nn.functional.pad(coordinates.square().cumsum(0), (0, 0, 1, 0))[ks]
