"""Whitening, the cut of a spectrum and nested bases, shared by every score and probe. All in float64."""

import dataclasses
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def rounding(size: int) -> float:
    """The relative tolerance d * eps of `numpy.linalg.matrix_rank` for a float64 matrix of this size."""
    return size * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Noise:
    """Rounding errors in a positive semi-definite matrix C, (d, d); `whiten` drops directions that are no larger."""

    diagonal: Tensor | float = 0.0  # (d,), the most that rounding of the states adds to each diagonal element
    error: Tensor | None = None  # (d, p), the error of C Z for random signs Z; None: none
    max_rank: int = sys.maxsize  # largest rank that the number of texts or tokens allows

    def centred(self, diagonal: Tensor) -> "Noise":
        """The noise of C minus an outer product of means, whose rounding the `diagonal` of C before it sets."""
        lost = rounding(len(diagonal)) * diagonal
        return dataclasses.replace(self, diagonal=self.diagonal + lost, max_rank=max(0, self.max_rank - 1))

    def scaled(self, scale: Tensor, diagonal: Tensor) -> "Noise":
        """The noise of D C D, with D = diag(`scale`) and `diagonal` that of C, (d,) each."""
        error, squares = self.error, scale.square()
        if error is not None:  # an element's error is proportional to the sizes of its two coordinates
            error = error * scale[:, None] * (diagonal @ squares / diagonal.sum()).sqrt()
        return dataclasses.replace(self, diagonal=self.diagonal * squares, error=error)

    def num_null_directions(self, matrix: Tensor, eigenvalues: Tensor, basis: Tensor) -> int:
        """Number of eigenvalues of `equilibrated_eigh` that are zero but for errors of the products, or by `max_rank`.

        Random errors of deviation s give a null space of m directions eigenvalues up to 2 s sqrt(m) (Wigner's
        semicircle). The number is the largest m with an m-th smallest eigenvalue of at most twice that; s^2 is the mean
        square of the errors of C Z, each divided by C_ii tr C.
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
    """Eigenvalues of D^-1/2 C D^-1/2, ascending, (d,), and A = D^-1/2 E, (d, d), with its eigenvectors E.

    D is the diagonal of C; A' C A is diagonal. A coordinate that is zero, or no more than rounding, has zeros in A.
    """
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > noise.diagonal, diagonal, torch.inf).rsqrt()
    scaled = matrix * scale * scale[:, None]
    eigenvalues, eigenvectors = torch.linalg.eigh((scaled + scaled.T) / 2)
    return eigenvalues, scale[:, None] * eigenvectors


def whiten(matrix: Tensor, tolerance: float | None = None, noise: Noise = NO_NOISE) -> Tensor:
    """The whitener W, (d, rank), of the symmetric, positive semi-definite C, (d, d) float64: W' C W = I.

    W spans the eigenvectors with eigenvalues above `tolerance` (None: d * eps) times the largest, and above the noise,
    of C scaled to unit diagonal: the rank depends neither on the unit of the data nor on one massive coordinate.

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
    """Eigenvectors of F F' u = lambda C u with lambda > 0, and the span of all eigenvectors, tied ones (0) included."""

    whitener: Tensor  # W, (d, rank): W' C W = I; its columns span all eigenvectors
    coordinates: Tensor  # (rank, r), orthonormal: the eigenvectors are W times these, largest eigenvalue first
    eigenvalues: Tensor  # (r,)
    tied: Tensor  # (rank, t), orthonormal: those of the solver's eigenvectors with lambda = 0, of all if F is wide

    @property
    def vectors(self) -> Tensor:
        """The eigenvectors, (d, r), C-orthonormal."""
        return self.whitener @ self.coordinates


@dataclass(frozen=True)
class NestedBasis:
    """An orthogonal matrix with nested spans: for every k, its first columns span the first k vectors."""

    q: Tensor  # Q, (d, d)
    dims: list[int]  # for each k, the number of columns of Q that span the first k vectors

    @classmethod
    def of(cls, vectors: Tensor, ks: list[int], sizes: Tensor | None = None) -> "NestedBasis":
        """The basis of the columns of `vectors`, (d, k), in order, without columns that depend on earlier ones.

        A column depends on earlier ones if it is within sqrt(d * eps) of their span. It is zero if its length is below
        that share of its entry of `sizes`, (k,), the scale of its rounding; None: only zeros are zero.
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
        """Squared lengths |P_k x_j|^2, (len(ks), n), of vectors x_j, (d, n), projected on the span of each k."""
        return torch.nn.functional.pad((self.q.T @ vectors).square().cumsum(0), (0, 0, 1, 0))[self.dims]
