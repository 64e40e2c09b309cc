"""Whitening, the cut of a spectrum and nested bases, shared by every score and probe. All in float64."""

import dataclasses
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def rounding(size: int) -> float:
    """The relative cut of `numpy.linalg.matrix_rank` for a symmetric float64 matrix of this size: d * eps."""
    return size * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Noise:
    """The size of rounding in a positive semi-definite matrix C; directions no larger than it are cut off."""

    diagonal: Tensor | float = 0.0  # (d,), the most that rounding of the states adds to each diagonal element
    error: Tensor | None = None  # (d, p), the error of C Z for random signs Z; None: none
    max_rank: int = sys.maxsize  # largest rank that the number of texts or tokens allows

    def centred(self, diagonal: Tensor) -> "Noise":
        """The noise after the mean is subtracted from C; `diagonal`, that of the difference, can be far smaller."""
        lost = rounding(len(diagonal)) * diagonal
        return dataclasses.replace(self, diagonal=self.diagonal + lost, max_rank=max(0, self.max_rank - 1))

    def scaled(self, scale: Tensor, diagonal: Tensor) -> "Noise":
        """The noise of D C D for a diagonal matrix D of elements `scale`, (d,), and C of this diagonal."""
        error, squares = self.error, scale.square()
        if error is not None:  # an element's error is proportional to the sizes of its two coordinates
            error = error * scale[:, None] * (diagonal @ squares / diagonal.sum()).sqrt()
        return dataclasses.replace(self, diagonal=self.diagonal * squares, error=error)

    def num_null_directions(self, matrix: Tensor, eigenvalues: Tensor, basis: Tensor) -> int:
        """Number of smallest eigenvalues of `equilibrated_eigh` that errors of products, or the rank, explain.

        In a null space of m directions random errors appear as eigenvalues up to 2 sqrt(m) times their deviation
        (Wigner's semicircle); the largest m that this explains, with a factor of two to spare, is null. The deviation
        is that of an error of C Z, divided by the sizes of its coordinate and of all.
        """
        num_null, is_used = max(0, len(eigenvalues) - self.max_rank), basis.any(1)
        if self.error is None or not is_used.any():
            return num_null
        sizes = matrix.diagonal()[is_used]
        deviation = (self.error[is_used].square() / sizes[:, None] / sizes.sum()).mean().sqrt()
        count = torch.arange(1, len(eigenvalues) + 1).to(eigenvalues)
        is_explained = eigenvalues <= 4 * deviation * count.sqrt()
        return max(num_null, int((is_explained * count).max()))


NO_NOISE = Noise()


def equilibrated_eigh(matrix: Tensor, noise: Noise = NO_NOISE) -> tuple[Tensor, Tensor]:
    """Eigenvalues of D^-1/2 C D^-1/2, D the diagonal of C, ascending, (d,), and A = D^-1/2 E: A' C A is diagonal.

    A coordinate that is always zero, or not more than rounding, has zeros in A.
    """
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > noise.diagonal, diagonal, torch.inf).rsqrt()
    scaled = matrix * scale * scale[:, None]
    eigenvalues, eigenvectors = torch.linalg.eigh((scaled + scaled.T) / 2)
    return eigenvalues, scale[:, None] * eigenvectors


def whiten(matrix: Tensor, tolerance: float | None = None, noise: Noise = NO_NOISE) -> Tensor:
    """W, (d, rank), with W' C W = I on the range of the symmetric, positive semi-definite C, (d, d) float64.

    C is scaled to unit diagonal before the cut, so that the rank depends neither on the unit of the data nor on one
    massive coordinate; eigenvalues above `tolerance` (None: d * eps) times the largest, and above the noise, are kept.

    Differs from the paper: the released script keeps eigenvalues above 1e-8 of the matrix as it is, in float32.
    """
    eigenvalues, basis = equilibrated_eigh(matrix, noise)
    floor = (rounding(len(matrix)) if tolerance is None else tolerance) * eigenvalues[-1:].clamp(min=0)
    kept = eigenvalues > floor + (basis.square().T * noise.diagonal).sum(1)
    kept[: noise.num_null_directions(matrix, eigenvalues, basis)] = False
    return basis[:, kept] * eigenvalues[kept].rsqrt()


def without_constants(covariance: Tensor, mean: Tensor, tolerance: float) -> Tensor:
    """The covariance (d, d) with zeros for features with a standard deviation below `tolerance` times |mean|."""
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
        """The eigenvectors, (d, r), C-orthonormal."""
        return self.whitener @ self.coordinates


@dataclass(frozen=True)
class NestedBasis:
    """An orthogonal matrix; for every k, its first columns span the first k of some vectors."""

    q: Tensor  # Q, (d, d)
    dims: list[int]  # for each k, the number of columns of Q that span the first k vectors

    @classmethod
    def of(cls, vectors: Tensor, ks: list[int], sizes: Tensor | None = None) -> "NestedBasis":
        """The basis of the columns of `vectors`, (d, k), in order, without columns that depend on earlier ones.

        A column depends on earlier ones within sqrt(d * eps) of their span. It counts as zero below that share of its
        entry of `sizes`, (k,), the scale of its rounding; None: only a column of zeros is zero.
        """
        tolerance = math.sqrt(rounding(len(vectors)))
        lengths = vectors.norm(dim=0)
        kept = (lengths > (0 if sizes is None else tolerance * sizes)).nonzero().flatten().tolist()
        columns = vectors / lengths
        q, r = torch.linalg.qr(columns[:, kept], mode="complete")
        while (dependent := (r.diagonal().abs() <= tolerance).nonzero()).numel():
            del kept[dependent[0]]  # only the first: later ones may depend on its rounding alone
            q, r = torch.linalg.qr(columns[:, kept], mode="complete")
        return cls(q, np.searchsorted(kept[: len(vectors)], ks).tolist())

    def projected_norms(self, vectors: Tensor) -> Tensor:
        """|P_k x_j|^2 for the projector on each span and each vector x_j, (d, n): (len(ks), n)."""
        return torch.nn.functional.pad((self.q.T @ vectors).square().cumsum(0), (0, 0, 1, 0))[self.dims]
