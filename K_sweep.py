"""Solve the two eigenproblems of each layer and write the Next Token Perception Score over K.

    python K_sweep.py                                                # embedded model and data
    python K_sweep.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion --device cuda
    python K_sweep.py --eigenvectors smallest                        # the order of the released script
    python K_sweep.py --subspace pca                                 # control: directions of largest variance as V

Reads results/moments/<model>/<dataset>/<split>.safetensors (and the other split's, for the held-out probe).
Writes results/ntps/<model>/<dataset>.json and a picture beside it (.png, .pdf); options other than the default stand
in the name: <dataset>.smallest.json, <dataset>.centered.json, <dataset>.pca.json, <dataset>.test.json.

Symbols, per layer: M, B, C0, C1 the moments of cache.py; mu, p the means of the pooled state m and of the label y;
Sigma = M - mu mu', S = B - mu p'. W whitens: W' M W = I.

    perception      B B' u   = lambda M u     U: largest lambda first, r = rank B informative, the rest tied at 0
    autoregression  C1 C1' v = lambda C0 v    V: largest lambda first
    NTPS(K) = |P U|^2 / |U|^2                 P: Euclidean projector on span V, Frobenius norms
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from tqdm import tqdm

import cache
from fig_plot.plotting import plot_sweep, save_figure
from utils.io import (
    UserError,
    check_same_settings,
    environment,
    load_json,
    open_tensors,
    path_name,
    pick_device,
    result_settings,
    run_script,
    save_json,
)
from utils.moments import LayerMoments, load_layer, moments_path, probe_scores
from utils.permuted_labels import draw_permuted_factors, permuted_label_null
from utils.report import option_suffix, print_table, summarize, to_json


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    # These change the result: stored in the file, compared when the file is reused.
    model_name: str = "tiny"  # as given to cache.py; <model>+lora for a merged adapter
    dataset_name: str = "docstrings/library"  # as given to cache.py
    split: Literal["train", "test", "all"] = "train"  # rows U and V are solved on
    eigenvectors: Literal["largest", "smallest"] = "largest"  # smallest: what the released script computes
    subspace: Literal["autoregression", "pca", "random"] = "autoregression"  # what V is; the others are controls
    center: bool = False  # subtract the means first; the paper does not
    fractions: tuple[float, ...] = tuple(i / 20 for i in range(1, 20))  # K as a share of the rank kept
    num_null_draws: int = 100  # permuted-label draws for the null band and z
    seed: int = 0  # of the draws and of a random V
    # These change only speed or place.
    device: str = "cpu"  # cpu or cuda; float64 on both
    picture: bool = True  # draw it too; it takes longer than the scores of a small model
    results_dir: Path = Path("results")  # where moments are read and results go
    overwrite: bool = False  # recompute a file that is already complete
    SPEED_OR_PLACE: ClassVar = ("device", "picture", "results_dir", "overwrite")

    def __post_init__(self) -> None:
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError("--fractions must lie in (0, 1]")
        if self.num_null_draws < 2:
            raise ValueError("--num_null_draws must be at least 2, or the null has no spread")


# ------------------------------------------------------------------ the eigenproblem
def whiten(matrix: Tensor) -> Tensor:
    """W with W' C W = I on the range of the symmetric, positive semi-definite C; its columns count the rank kept.

    C is scaled to unit diagonal before the cut, so that the rank depends neither on the unit of the data nor on one
    massive coordinate; then eigenvalues above d * eps * the largest are kept (the rule of numpy.linalg.matrix_rank).
    Where a Cholesky factor proves that all are, it is the whitener: every W gives the same scores, and it costs less.

    Differs from the paper: the released script keeps eigenvalues above 1e-8 of the matrix as it is, in float32.

    Args:
        matrix: C, (d, d), float64.

    Returns:
        (d, rank).
    """
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()  # a coordinate that is always zero stays out
    scaled = matrix * scale * scale[:, None]
    cut = len(matrix) * torch.finfo(matrix.dtype).eps
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if not failed:
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(matrix)).to(matrix), upper=False)
        # smallest eigenvalue >= 1 / |inverse|_F^2, largest <= the 1-norm; a thousandfold margin keeps rounding out
        if 1 / inverse.square().sum() > 1e3 * cut * scaled.abs().sum(0).max():
            return scale[:, None] * inverse.T
    eigenvalues, eigenvectors = torch.linalg.eigh((scaled + scaled.T) / 2)
    kept = eigenvalues > cut * eigenvalues[-1].clamp(min=0)
    return scale[:, None] * eigenvectors[:, kept] * eigenvalues[kept].rsqrt()


def whiten_uncentred(moments: LayerMoments, whitener: Tensor) -> tuple[Tensor, Tensor]:
    """The whitener W_M of M, and W_M' Sigma W, from the whitener W of Sigma = M - mu mu'.

    At full rank M is a rank-one update of what W whitens: W_M = W (I + a a')^{-1/2}, a = W' mu.

    Returns:
        (d, rank M) and (rank M, rank Sigma).
    """
    if whitener.shape[0] > whitener.shape[1]:
        uncentred = whiten(moments.pooled_second_moment)
        return uncentred, uncentred.T @ moments.pooled_covariance @ whitener
    a = whitener.T @ moments.pooled_mean
    squared = (a @ a).clamp(min=torch.finfo(a.dtype).tiny)
    update = torch.outer(a * ((1 + squared).rsqrt() - 1) / squared, a)
    return whitener + whitener @ update, torch.eye(len(a)).to(a) + update


def informative_directions(whitened_factor: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of W' F, largest first, without those that are zero.

    Zero means below sqrt(rank * eps) of the largest: what an eigen-decomposition of W' F F' W can tell from zero.

    Args:
        whitened_factor: (rank, c), float64.

    Returns:
        (rank, r) and (r,).
    """
    if whitened_factor.shape[0] <= whitened_factor.shape[1]:  # wide: one symmetric problem is cheaper than an SVD
        eigenvalues, vectors = torch.linalg.eigh(whitened_factor @ whitened_factor.T)
        values, vectors = eigenvalues.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    else:
        vectors, values, _ = torch.linalg.svd(whitened_factor, full_matrices=False)
    kept = values > math.sqrt(len(whitened_factor) * torch.finfo(values.dtype).eps) * values[:1]
    return vectors[:, kept], values[kept]


def solve_generalized_eigenproblem(factor: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solves F F' u = lambda C u in the range of C, largest eigenvalue first.

    Differs from the paper: the released script takes the smallest first (`--eigenvectors smallest`).

    Args:
        factor: F, (d, c), float64.
        denominator: C, (d, d), symmetric, positive semi-definite, float64.

    Returns:
        Eigenvectors with lambda > 0, (d, r), C-orthonormal; their eigenvalues, (r,); the whitener W of C, (d, rank),
        whose columns span these and the tied eigenvectors with lambda = 0.
    """
    whitener = whiten(denominator)
    vectors, singular_values = informative_directions(whitener.T @ factor)
    return whitener @ vectors, singular_values.square(), whitener


def complete_by_variance(vectors: Tensor, whitener: Tensor, denominator: Tensor) -> Tensor:
    """Appends the eigenvectors with lambda = 0, ordered by v' C v / |v|^2, to those with lambda > 0: (d, rank).

    V has such ties only where the next tokens span less than the prefixes, as in a handful of short texts. Any order
    of them is a solution; this one is the same on every machine.
    """
    missing = whitener.shape[1] - vectors.shape[1]
    if not missing:
        return vectors
    inside = whitener.T @ denominator @ vectors  # coordinates of the vectors within the whitened space
    rest = whitener @ torch.linalg.qr(inside, mode="complete").Q[:, vectors.shape[1] :]
    axes = torch.linalg.svd(rest, full_matrices=False).Vh
    return torch.cat([vectors, rest @ axes.T.flip(1)], dim=1)


def subspace_directions(moments: LayerMoments, config: Config, layer: int) -> Tensor:
    """The columns of V, first one first, (d, rank C0), float64.

    Those of the autoregression, or of a control: of as many directions of largest variance of the pooled states
    (second moment, without --center), or drawn from a rotation-invariant law.
    """
    prefix_moment, next_moment = moments.autoregression(config.center)
    if config.subspace == "autoregression":
        v, _, whitener = solve_generalized_eigenproblem(next_moment, prefix_moment)
        return complete_by_variance(v, whitener, prefix_moment)
    rank = whiten(prefix_moment).shape[1]  # so that K is the same as for the autoregression
    if config.subspace == "pca":
        pooled = moments.pooled_covariance if config.center else moments.pooled_second_moment
        return torch.linalg.eigh(pooled).eigenvectors.flip(1)[:, :rank]
    random = np.random.default_rng([config.seed, layer, 1])  # another stream than the draws'
    return torch.from_numpy(random.standard_normal((len(prefix_moment), rank))).to(prefix_moment)


def nested_basis(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Square orthogonal Q whose first k columns span the first k columns of `vectors`, for every k at once.

    Returns:
        Householder reflectors and their factors: Q is applied (`torch.ormqr`), never formed.
    """
    reflectors, factors = torch.geqrf(vectors / vectors.norm(dim=0))
    return reflectors[:, : len(factors)], factors


def num_directions(fractions: tuple[float, ...], rank: int) -> list[int]:
    """K for each fraction of the rank: floor(f * rank), at least 1."""
    return [max(1, math.floor(fraction * rank + 1e-9)) for fraction in fractions]  # .15 * 20 is 2.9999999999999996


# ------------------------------------------------------------------ the scores
def captured(rows: Tensor, ks: list[int]) -> Tensor:
    """|Q_k' x_j|^2 for each k of `ks` and each column of X, from `rows` = Q' X: (len(ks), columns)."""
    return rows.square().cumsum(0)[[min(k, len(rows)) - 1 for k in ks]]


def average_over_ties(
    k: int, informative: tuple[Tensor, Tensor], tied: tuple[Tensor, Tensor], num_tied: int, largest: bool
) -> Tensor:
    """NTPS of the first k columns of U, averaged over all bases of its tied space (eigenvalue 0).

    (|P U_r|^2 + g |P Z|^2) / (|U_r|^2 + g |Z|^2), g the share of the tied space Z within U_k.

    Differs from the paper: the released script takes the tied vectors in whatever basis the solver returns.

    Args:
        k: columns of U.
        informative: |P u_j|^2 and |u_j|^2 of the r informative columns, largest eigenvalue first, each (r,).
        tied: |P Z|^2 and |Z|^2 of the whole tied space Z, scalars.
        num_tied: dimension of Z.
        largest: whether U starts with the largest eigenvalues or with the smallest.
    """
    num_informative = len(informative[0])
    taken = min(k, num_informative) if largest else k - min(k, num_tied)
    columns = slice(0, taken) if largest else slice(num_informative - taken, None)
    share = (k - taken) / num_tied if num_tied else 0.0
    numerator, denominator = (of[columns].sum() + share * whole for of, whole in zip(informative, tied, strict=True))
    return numerator / denominator


def ntps(
    label_rows: Tensor, perception_rows: Tensor, k_us: list[int], k_vs: list[int], largest: bool = True
) -> tuple[Tensor, Tensor]:
    """The paper's score over all k_U directions, and the same ratio over the r informative ones only.

    Args:
        label_rows: Q' U_r, (d, r), Q the nested basis of V, U largest eigenvalue first.
        perception_rows: Q' W, (d, rank M), W the whitener of M: it spans U_r and the tied space.
        k_us: columns of U for each fraction.
        k_vs: columns of V for each fraction.
        largest: order of U (V's is that of Q).

    Returns:
        `ntps` and `ntps_label`, (fractions,).
    """
    inside, norms = captured(label_rows, k_vs), label_rows.square().sum(0)
    tied_inside = captured(perception_rows, k_vs).sum(1) - inside.sum(1)  # Z itself is never formed
    tied_norm = perception_rows.square().sum() - norms.sum()
    num_tied = perception_rows.shape[1] - len(norms)
    scores = [
        average_over_ties(k_u, (inside[i], norms), (tied_inside[i], tied_norm), num_tied, largest)
        for i, k_u in enumerate(k_us)
    ]
    return torch.stack(scores).clamp(0, 1), inside.sum(1) / norms.sum()


# ------------------------------------------------------------------ one layer
def sweep_layer(moments: LayerMoments, held_out: LayerMoments | None, config: Config, layer: int) -> dict:
    """Every score of one layer over all fractions, as the JSON entry of that layer; `null_draws` still as tensors."""
    largest = config.eigenvectors == "largest"
    sigma, cross_moment = moments.pooled_covariance, moments.pooled_label_cross_moment
    sigma_whitener = whiten(sigma)
    if config.center:
        whitener, change = sigma_whitener, torch.eye(sigma_whitener.shape[1]).to(sigma)
        cross_moment, mean = moments.pooled_label_covariance, torch.zeros_like(moments.pooled_mean)
    else:
        (whitener, change), mean = whiten_uncentred(moments, sigma_whitener), moments.pooled_mean
    u, _ = informative_directions(whitener.T @ cross_moment)
    v = subspace_directions(moments, config, layer)
    k_us, k_vs = num_directions(config.fractions, whitener.shape[1]), num_directions(config.fractions, v.shape[1])
    rank_v, v = v.shape[1], (v if largest else v.flip(1))[:, : max(k_vs)]
    basis, whitened_basis = nested_basis(v), nested_basis(sigma_whitener.T @ (sigma @ v))
    perception_rows = torch.ormqr(*basis, whitener, left=True, transpose=True)
    ntps_all, ntps_label = ntps(perception_rows @ u, perception_rows, k_us, k_vs, largest)

    rank = sigma_whitener.shape[1]
    random = np.random.default_rng([config.seed, layer])
    null_draws = permuted_label_null(
        draw_permuted_factors(rank, moments.num_samples, moments.label_covariance, config.num_null_draws, random),
        torch.ormqr(*whitened_basis, change, left=False),
        torch.outer(whitener.T @ mean, moments.label_mean),
        perception_rows,
        (k_vs, [min(k, rank) for k in k_vs]),
    )
    return {
        "layer": layer,
        "rank_u": whitener.shape[1],
        "rank_v": rank_v,
        "rank_label": u.shape[1],
        "ntps": ntps_all,
        "ntps_label": ntps_label,
        "chance": torch.tensor(k_vs) / len(sigma),
        **excess_scores(moments, sigma_whitener, whitened_basis, basis, k_vs),
        **probe_scores(moments, held_out, sigma_whitener @ (sigma_whitener.T @ moments.pooled_label_covariance)),
        "null_draws": null_draws,
    }


def excess_scores(
    moments: LayerMoments,
    whitener: Tensor,
    whitened_basis: tuple[Tensor, Tensor],
    basis: tuple[Tensor, Tensor],
    ks: list[int],
) -> dict[str, Tensor]:
    """What a linear probe with intercept loses inside V_K: the exact excess loss, its shares and its bounds.

    With W' S = P diag(s) Q' and Pi the projector on the whitened span of V_K, the excess of the least-squares loss
    (summed over labels) is sum_j s_j^2 (1 - |Pi p_j|^2); the bounds replace every s_j by the largest or the smallest.

    Args:
        moments: of the layer.
        whitener: W of Sigma, (d, rank).
        whitened_basis: nested basis of W' Sigma V.
        basis: nested basis of V, for the Euclidean form of the bounds.
        ks: columns of V for each fraction.
    """
    p, s = informative_directions(whitener.T @ moments.pooled_label_covariance)
    inside = captured(torch.ormqr(*whitened_basis, p, left=True, transpose=True), ks)
    explained = s.square().sum()
    retained, ntps_whitened = inside @ s.square() / explained, inside.mean(1)
    directions = torch.ormqr(*basis, whitener @ p, left=True, transpose=True)
    missing = directions.square().sum() - captured(directions, ks).sum(1)
    smallest, largest = extreme_eigenvalues(moments.pooled_covariance, whitener)
    return {
        "ntps_whitened": ntps_whitened,
        "retained": retained,
        "excess_loss": explained * (1 - retained),
        "excess_lower": s[-1] ** 2 * len(s) * (1 - ntps_whitened),
        "excess_upper": s[0] ** 2 * len(s) * (1 - ntps_whitened),
        "excess_lower_euclidean": s[-1] ** 2 * smallest * missing,
        "excess_upper_euclidean": s[0] ** 2 * largest * missing,
    }


def extreme_eigenvalues(sigma: Tensor, whitener: Tensor) -> tuple[float, float]:
    """Smallest and largest eigenvalue of Sigma, by Lanczos; the smallest is 0 where its whitener dropped directions."""
    covariance, w = sigma.cpu().numpy(), whitener.cpu().numpy()
    inverse = LinearOperator(covariance.shape, matvec=lambda x: w @ (w.T @ x), dtype=covariance.dtype)
    start = np.ones(len(covariance))  # ARPACK draws one at random otherwise
    largest, largest_of_inverse = (
        eigsh(of, k=1, which="LA", v0=start, return_eigenvectors=False)[0] for of in (covariance, inverse)
    )
    return 1 / largest_of_inverse if w.shape[0] == w.shape[1] else 0.0, largest


# ------------------------------------------------------------------ run
def result_path(config: Config) -> Path:
    """Where the result goes; options other than the default stand in the name."""
    name = f"{path_name(config.dataset_name)}{option_suffix(result_settings(config))}.json"
    return config.results_dir / "ntps" / path_name(config.model_name) / name


def find_moments(config: Config) -> tuple[Path, Path | None]:
    """The moments to solve, and those of the other split for the held-out probe (None if there are none).

    Raises:
        UserError: no moments, naming the command that makes them.
    """

    def of_split(split: str) -> Path:
        return moments_path(config.results_dir, path_name(config.model_name), config.dataset_name, split)

    path = of_split(config.split)
    if not path.is_file():
        if config.model_name != "tiny" or not config.dataset_name.startswith("docstrings/"):
            command = f"python cache.py --model_name {config.model_name} --dataset_name {config.dataset_name}"
            raise UserError(f"No moments at {path}. Run: {command} --split {config.split}")
        print(f"No moments at {path}: making them, as the embedded model takes seconds.")
        for split in dict.fromkeys((config.split, "test")):
            cache.main(cache.Config(dataset_name=config.dataset_name, split=split, results_dir=config.results_dir))
    other = of_split({"train": "test", "test": "train", "all": ""}[config.split])
    return path, other if other.is_file() else None


def sweep(config: Config, path: Path, other_path: Path | None, output_path: Path) -> dict:
    """The result of all layers, one in memory at a time; the stored one where it was made from the same moments."""
    device = pick_device(config.device)
    with contextlib.ExitStack() as stack:
        file, metadata = stack.enter_context(open_tensors(path))
        other, other_metadata = stack.enter_context(open_tensors(other_path)) if other_path else (None, None)
        # not the environment: the same rows and settings give the same moments on any machine, at any commit
        provenance = {
            "moments": {name: value for name, value in metadata.items() if name != "environment"},
            "held_out": other_metadata and {"fingerprint": other_metadata["fingerprint"]},
        }
        if output_path.is_file() and not config.overwrite:
            stored = load_json(output_path)
            check_same_settings(stored["config"], config, output_path)
            if any(stored.get(name) != value for name, value in provenance.items()):
                raise UserError(f"{output_path} was made from other moments. Recompute it with --overwrite.")
            return stored
        num_layers, hidden_size = file.get_slice("pooled_mean").get_shape()
        layers = []
        for layer in tqdm(range(num_layers), unit="layer", desc="K_sweep"):
            moments = load_layer(file, metadata, layer, device)
            held_out = load_layer(other, other_metadata, layer, device) if other_metadata else None
            layers.append(sweep_layer(moments, held_out, config, layer))
    return {
        "config": result_settings(config),
        "environment": environment(),
        **provenance,
        "num_samples": metadata["num_samples"],
        "num_classes": len(metadata["label_names"]),
        "hidden_size": hidden_size,
        "fractions": list(config.fractions),
        "score": summarize(layers, config.fractions),
        "layers": [to_json(layer) for layer in layers],
    }


def main(config: Config) -> None:
    """Writes the scores and a picture of them, and prints their table."""
    path, other_path = find_moments(config)
    output_path = result_path(config)
    result = sweep(config, path, other_path, output_path)
    print_table(result)
    if config.picture:
        save_figure(plot_sweep(result), output_path)
    save_json(output_path, result)  # last: where the JSON is, the picture is
    print(output_path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
