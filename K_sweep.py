"""Solve the two eigenproblems of each layer and write the Next Token Perception Score over K.

    python K_sweep.py                                                # embedded model and data
    python K_sweep.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion --device cuda
    python K_sweep.py --eigenvectors smallest                        # the order of the released script
    python K_sweep.py --subspace pca                                 # control: directions of largest variance as V

Reads results/moments/<model>/<dataset>/<split>.safetensors (and the other split's, for the held-out probe).
Writes results/ntps/<model>/<dataset>.json and a picture beside it (.png, .pdf); options other than the default are
in the name: <dataset>.smallest.json, <dataset>.centered.json, <dataset>.pca.json, <dataset>.test.json.

Symbols, per layer: M, B, C0, C1 the moments of cache.py; mu, p the means of the pooled state m and of the label y;
Sigma = M - mu mu', S = B - mu p'. W whitens: W' M W = I.

    perception      B B' u   = lambda M u     U: largest lambda first, r = rank B informative, the rest tied at 0
    autoregression  C1 C1' v = lambda C0 v    V: largest lambda first
    NTPS(K) = |P U|^2 / |U|^2                 P: Euclidean projector on span V, Frobenius norms
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from tqdm import tqdm

import cache
from utils.algebra.features import layer_scores
from utils.algebra.linalg import NestedBasis, Noise, captured, rounding, whiten
from utils.algebra.moments import (
    LayerMoments,
    check_has_layer,
    load_layer,
    moments_path,
    probe_scores,
)
from utils.algebra.permuted_labels import draw_permuted_factors, euclidean_null, whitened_null
from utils.algebra.random_subspaces import random_scores
from utils.algebra.ridge import load_folds
from utils.algebra.scores import option_suffix, print_table, summarize, to_json
from utils.pictures import plot_sweep, save_figure
from utils.results import find_result, open_tensors, result_path, save_json
from utils.script import UserError, environment, pick_device, run_script
from utils.settings import Data, Model, Run, Unrecorded, result_settings, with_values


@dataclass(frozen=True)
class Output(Unrecorded):
    """What is written beside the scores."""

    picture: bool = True  # draw it too; it takes longer than the scores of a small model


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell.

    What model and data leave at their default is as the moments of cache.py have it.
    """

    split: Literal["train", "test", "all"] = "train"  # rows U and V are solved on
    eigenvectors: Literal["largest", "smallest"] = "largest"  # smallest: what the released script computes
    subspace: Literal["autoregression", "pca", "random"] = "autoregression"  # what V is; the others are controls
    center: bool = False  # subtract the means first; the paper does not
    fractions: tuple[float, ...] = tuple(i / 20 for i in range(1, 20))  # K as a share of the rank kept
    num_null_draws: int = 100  # permuted-label draws for the null band and z
    num_random_draws: int = 20  # random V at the last layer, against which V gets a z; 0: none
    model: Model = Model()
    data: Data = Data()
    output: Output = Output()
    run: Run = Run(device="cpu")  # float64 on any device

    def __post_init__(self) -> None:
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError("--fractions must be in (0, 1]")
        if self.num_null_draws < 2:
            raise ValueError("--num_null_draws must be at least 2, or the null has no spread")
        if self.num_random_draws < 0 or self.num_random_draws == 1:
            raise ValueError("--num_random_draws must be at least 2, or random V have no spread; 0 for none")


# ------------------------------------------------------------------ the score, from its definition
def ntps_reference(moments: LayerMoments, fraction: float) -> float:
    """The score of one layer at one K, dense and slow: what the rest of this file computes for every K at once."""

    def solve(factor: Tensor, denominator: Tensor) -> tuple[Tensor, int]:
        """All eigenvectors of F F' u = lambda C u in the range of C, largest first; and how many have lambda > 0."""
        scale = denominator.diagonal().rsqrt()
        spread, axes = torch.linalg.eigh(denominator * scale * scale[:, None])
        kept = spread > len(scale) * torch.finfo(torch.float64).eps * spread[-1]
        whitener = scale[:, None] * axes[:, kept] * spread[kept].rsqrt()  # W' C W = I
        _, vectors = torch.linalg.eigh(whitener.T @ factor @ factor.T @ whitener)
        lengths = torch.linalg.svdvals(whitener.T @ factor)  # of eigenvalues the roots, without their rounding
        smallest = math.sqrt(whitener.shape[1] * torch.finfo(torch.float64).eps) * lengths[0]
        num_informative = int((lengths > smallest).sum())
        return whitener @ vectors.flip(1), num_informative

    u, num_informative = solve(moments.pooled_label_cross_moment, moments.pooled_second_moment)
    v, _ = solve(moments.prefix_next_cross_moment, moments.prefix_second_moment)
    k_u, k_v = (max(1, math.floor(fraction * vectors.shape[1] + 1e-9)) for vectors in (u, v))
    # the first k_u columns of U; where these reach into the space of lambda = 0, its average over all bases
    weights = torch.zeros(u.shape[1], dtype=torch.float64)
    weights[: min(k_u, num_informative)] = 1
    if k_u > num_informative:
        weights[num_informative:] = (k_u - num_informative) / (u.shape[1] - num_informative)
    projection = torch.linalg.qr(v[:, :k_v]).Q.T @ u  # |P u_j| is the length of column j
    return float(weights @ projection.square().sum(0) / (weights @ u.square().sum(0)))


# ------------------------------------------------------------------ the eigenproblem
def informative_directions(whitened_factor: Tensor, row_errors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of W' F, largest first, without those that are zero.

    Zero means below sqrt(rank * eps) of the largest: what an eigen-decomposition of W' F F' W can tell from zero; or
    what random errors of F give a direction: at most twice the length of their combination, with half to spare.

    Args:
        whitened_factor: (rank, c), float64.
        row_errors: length of the error of each row, (rank,); None: exact.

    Returns:
        (rank, r) and (r,).
    """
    if whitened_factor.shape[0] <= whitened_factor.shape[1]:  # wide: one symmetric problem is cheaper than an SVD
        eigenvalues, vectors = torch.linalg.eigh(whitened_factor @ whitened_factor.T)
        values, vectors = eigenvalues.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    else:
        vectors, values, _ = torch.linalg.svd(whitened_factor, full_matrices=False)
    kept = values > math.sqrt(rounding(len(whitened_factor))) * values[:1]
    if row_errors is not None:
        kept &= values > 3 * (vectors.square().T @ row_errors.square()).sqrt()
    return vectors[:, kept], values[kept]


def solve_generalized_eigenproblem(
    factor: Tensor, denominator: Tensor, noise: Noise | None = None, factor_error: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Solves F F' u = lambda C u in the range of C, largest eigenvalue first.

    Differs from the paper: the released script takes the smallest first (`--eigenvectors smallest`).

    Args:
        factor: F, (d, c), float64.
        denominator: C, (d, d), symmetric, positive semi-definite, float64.
        noise: what of C is rounding; None: of float64 alone.
        factor_error: the error of F Z for random signs Z, (d, p); None: exact.

    Returns:
        Eigenvectors with lambda > 0, (d, r), C-orthonormal; their eigenvalues, (r,); the whitener W of C, (d, rank),
        whose columns span these and the tied eigenvectors with lambda = 0.
    """
    whitener = whiten(denominator, noise=noise)
    row_errors = None
    if factor_error is not None:
        row_errors = (whitener.square().T @ factor_error.square().mean(1)).sqrt()
    vectors, singular_values = informative_directions(whitener.T @ factor, row_errors)
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


# ------------------------------------------------------------------ U and V of a layer
@dataclass(frozen=True)
class Perception:
    """The perception problem of a layer: what the labels need, in the space that M whitens (Sigma, with --center)."""

    whitener: Tensor  # W_M, (d, rank M)
    labels: Tensor  # W_M' U, (rank M, r): orthonormal, largest eigenvalue first
    eigenvalues: Tensor  # (r,)
    mean: Tensor  # W_M' mu, (rank M,); zeros where the means are subtracted
    covariance_whitener: Tensor  # W of Sigma, (d, rank Sigma)
    change: Tensor  # W_M' Sigma W, (rank M, rank Sigma): from the space that Sigma whitens to that of M


def solve_perception(moments: LayerMoments, center: bool) -> Perception:
    """U of a layer, and the whiteners of M and of Sigma.

    At full rank M = Sigma + mu mu' is a rank-one update of what W whitens: W_M = W (I + a a')^{-1/2}, a = W' mu.
    """
    sigma, mean = moments.pooled_covariance, moments.pooled_mean
    whitener = whiten(sigma, noise=moments.pooled_noise(center=True))
    identity = torch.eye(whitener.shape[1]).to(sigma)
    if center:
        labels, values = informative_directions(whitener.T @ moments.pooled_label_covariance)
        return Perception(whitener, labels, values.square(), torch.zeros_like(identity[:, 0]), whitener, identity)
    if whitener.shape[1] < whitener.shape[0]:
        uncentred = whiten(moments.pooled_second_moment, noise=moments.pooled_noise(center=False))
        change = uncentred.T @ sigma @ whitener
    else:
        a = whitener.T @ mean
        squared = (a @ a).clamp(min=torch.finfo(a.dtype).tiny)
        update = torch.outer(a * ((1 + squared).rsqrt() - 1) / squared, a)
        uncentred, change = whitener + whitener @ update, identity + update
    labels, values = informative_directions(uncentred.T @ moments.pooled_label_cross_moment)
    return Perception(uncentred, labels, values.square(), uncentred.T @ mean, whitener, change)


def subspace_directions(moments: LayerMoments, config: Config, layer: int) -> Tensor:
    """The columns of V, first one first, (d, rank C0), float64.

    Those of the autoregression, or of a control: of as many directions of largest variance of the pooled states
    (second moment, without --center), or drawn from a rotation-invariant law.
    """
    prefix_moment, next_moment = moments.autoregression(config.center)
    noise = moments.prefix_noise(config.center)
    if config.subspace == "autoregression":
        error = moments.rounding.prefix_next_error if moments.rounding else None
        v, _, whitener = solve_generalized_eigenproblem(next_moment, prefix_moment, noise, error)
        v = complete_by_variance(v, whitener, prefix_moment)
        return v if config.eigenvectors == "largest" else v.flip(1)
    rank = whiten(prefix_moment, noise=noise).shape[1]  # so that K is the same as for the autoregression
    if config.subspace == "pca":
        pooled = moments.pooled_covariance if config.center else moments.pooled_second_moment
        v = torch.linalg.eigh(pooled).eigenvectors.flip(1)[:, :rank]
    else:
        v = random_directions(rank, prefix_moment, (config.data.seed, layer))
    return v if config.eigenvectors == "largest" else v.flip(1)


def random_directions(rank: int, like: Tensor, seed: tuple[int, int]) -> Tensor:
    """Columns of a rotation-invariant law, (d, rank), on the device of `like`, (d, d)."""
    random = np.random.default_rng([*seed, 1])  # another stream than the draws'
    return torch.from_numpy(random.standard_normal((len(like), rank))).to(like)


def num_directions(fractions: tuple[float, ...], rank: int) -> list[int]:
    """K for each fraction of the rank: floor(f * rank), at least 1."""
    return [max(1, math.floor(fraction * rank + 1e-9)) for fraction in fractions]  # .15 * 20 is 2.9999999999999996


# ------------------------------------------------------------------ the scores
@dataclass(frozen=True)
class Lengths:
    """|P x|^2 of vectors x, P the projector on V_K, and |x|^2 itself."""

    inside: Tensor
    whole: Tensor


def average_over_ties(k: int, informative: Lengths, tied: Lengths, num_tied: int, largest: bool) -> Tensor:
    """NTPS of the first k columns of U, averaged over all bases of its tied space (eigenvalue 0).

    (|P U_r|^2 + g |P Z|^2) / (|U_r|^2 + g |Z|^2), g the share of the tied space Z within U_k.

    Differs from the paper: the released script takes the tied vectors in whatever basis the solver returns.

    Args:
        k: columns of U.
        informative: of each of the r informative columns, largest eigenvalue first, (r,).
        tied: of the whole tied space Z, scalars.
        num_tied: dimension of Z.
        largest: whether U starts with the largest eigenvalues or with the smallest.
    """
    num_informative = len(informative.whole)
    taken = min(k, num_informative) if largest else k - min(k, num_tied)
    columns = slice(0, taken) if largest else slice(num_informative - taken, None)
    share = (k - taken) / num_tied if num_tied else 0.0
    inside = informative.inside[columns].sum() + share * tied.inside
    return inside / (informative.whole[columns].sum() + share * tied.whole)


def mean_over_equal(values: Tensor, eigenvalues: Tensor) -> Tensor:
    """Each of `values` (r,) as the mean over the directions of the same eigenvalue, given in order.

    Any basis of an eigenspace is a solution: with n <= d the eigenvalues are the class frequencies, often equal.
    """
    group = (eigenvalues.diff().abs() > 1e-9 * eigenvalues[:-1]).cumsum(0)
    group = torch.cat([group.new_zeros(1), group])
    same = (group[:, None] == group).to(values)
    return same @ values / same.sum(1)


def ntps(
    labels: Tensor,
    perception: Tensor,
    k_us: list[int],
    k_vs: list[int],
    largest: bool = True,
    eigenvalues: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The paper's score over all k_U directions, and the same ratio over the r informative ones only.

    Args:
        labels: Q' U_r, (d, r), Q the nested basis of V, U largest eigenvalue first.
        perception: Q' W, (d, rank M), W the whitener of M: it spans U_r and the tied space.
        k_us: columns of U for each fraction.
        k_vs: columns of Q for each fraction.
        largest: order of U (V's is that of Q).
        eigenvalues: of the columns of U_r, (r,), so that equal ones count as tied; None: all differ.

    Returns:
        `ntps` and `ntps_label`, (fractions,).
    """
    inside, whole = captured(labels, k_vs), labels.square().sum(0)
    tied_inside = captured(perception, k_vs).sum(1) - inside.sum(1)  # Z itself is never formed
    tied_whole = perception.square().sum() - whole.sum()
    num_tied = perception.shape[1] - len(whole)
    eigenvalues = torch.arange(len(whole), 0, -1).to(whole) if eigenvalues is None else eigenvalues
    of_each = [Lengths(mean_over_equal(row, eigenvalues), mean_over_equal(whole, eigenvalues)) for row in inside]
    scores = [
        average_over_ties(k_u, of_each[i], Lengths(tied_inside[i], tied_whole), num_tied, largest)
        for i, k_u in enumerate(k_us)
    ]
    return torch.stack(scores).clamp(0, 1), inside.sum(1) / whole.sum()


LAYER_SCORES = (
    *("ntps", "ntps_label", "chance", "ntps_whitened", "retained"),
    *("excess_loss", "excess_lower", "excess_upper", "excess_lower_euclidean", "excess_upper_euclidean"),
)


@dataclass(frozen=True)
class Spanned:
    """What the first columns of a V span, as every score needs it."""

    ks: list[int]  # columns of V for each fraction
    basis: NestedBasis  # of V
    whitened_basis: NestedBasis  # of W' Sigma V, W the whitener of Sigma
    dims: list[int]  # columns of Q that the first ks span, Q the nested basis of V
    perception: Tensor  # Q' W_M, (d, rank M)

    @classmethod
    def of(cls, v: Tensor, moments: LayerMoments, solved: "Perception", fractions: tuple[float, ...]) -> "Spanned":
        """Of the columns of V, (d, rank C0), first one first."""
        ks, sigma = num_directions(fractions, v.shape[1]), moments.pooled_covariance
        v = v[:, : max(ks)]
        basis = NestedBasis.of(v)
        whitened_basis = NestedBasis.of(solved.covariance_whitener.T @ (sigma @ v), pooled_sizes(sigma, v))
        return cls(ks, basis, whitened_basis, basis.spanned(ks), basis.coordinates(solved.whitener))


def euclidean_scores(solved: Perception, spanned: Spanned, config: Config) -> tuple[Tensor, Tensor]:
    """`ntps` and `ntps_label`, (fractions,)."""
    k_us, largest = num_directions(config.fractions, solved.whitener.shape[1]), config.eigenvectors == "largest"
    labels = spanned.perception @ solved.labels
    return ntps(labels, spanned.perception, k_us, spanned.dims, largest, solved.eigenvalues)


def whitened_scores(p: Tensor, s: Tensor, spanned: Spanned) -> tuple[Tensor, Tensor]:
    """`ntps_whitened` and `retained`, (fractions,): shares of P, and of P diag(s), where W' S = P diag(s) Q'."""
    inside = captured(spanned.whitened_basis.coordinates(p), spanned.whitened_basis.spanned(spanned.ks))
    return inside.mean(1), inside @ s.square() / s.square().sum()


def excess_scores(moments: LayerMoments, whitener: Tensor, spanned: Spanned) -> dict[str, Tensor]:
    """What a linear probe with intercept loses inside V_K: the exact excess loss, its shares and its bounds.

    With W' S = P diag(s) Q' and Pi the projector on the whitened span of V_K, the excess of the least-squares loss
    (summed over labels) is sum_j s_j^2 (1 - |Pi p_j|^2); the bounds replace every s_j by the largest or the smallest.

    Args:
        moments: of the layer.
        whitener: W of Sigma, (d, rank).
        spanned: what V spans.
    """
    p, s = informative_directions(whitener.T @ moments.pooled_label_covariance)
    ntps_whitened, retained = whitened_scores(p, s, spanned)
    directions = spanned.basis.coordinates(whitener @ p)
    missing = directions.square().sum() - captured(directions, spanned.dims).sum(1)
    smallest, largest = extreme_eigenvalues(moments.pooled_covariance, whitener)
    return {
        "ntps_whitened": ntps_whitened,
        "retained": retained,
        "excess_loss": s.square().sum() * (1 - retained),
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
    [largest] = eigsh(covariance, k=1, which="LA", v0=start, return_eigenvectors=False)
    if w.shape[1] < w.shape[0]:
        return 0.0, largest
    [largest_of_inverse] = eigsh(inverse, k=1, which="LA", v0=start, return_eigenvectors=False)
    return 1 / largest_of_inverse, largest


# ------------------------------------------------------------------ one layer
def label_directions(moments: LayerMoments, whitener: Tensor) -> Tensor:
    """Singular values of W' S, W the whitener of Sigma: none where the pooled state says nothing of the labels."""
    return informative_directions(whitener.T @ moments.pooled_label_covariance)[1]


def pooled_sizes(sigma: Tensor, v: Tensor) -> Tensor:
    """The largest deviation that v' m could have, were its coordinates to vary together, for each column of V."""
    return v.abs().T @ sigma.diagonal().clamp(min=0).sqrt()


def sweep_layer(
    moments: LayerMoments, held_out: LayerMoments | None, config: Config, layer: int, num_random_draws: int = 0
) -> dict:
    """Every score of one layer over all fractions, as the JSON entry of that layer; `null_draws` still as tensors.

    A layer has no score (None) where its pooled states do not vary, or not with the labels, or no text has two tokens.
    """
    solved, v = solve_perception(moments, config.center), subspace_directions(moments, config, layer)
    whitener, rank, rank_v = solved.covariance_whitener, solved.covariance_whitener.shape[1], v.shape[1]
    ranks = {"layer": layer, "rank_u": solved.whitener.shape[1], "rank_v": rank_v, "rank_label": solved.labels.shape[1]}
    probe = probe_scores(moments, held_out, whitener @ (whitener.T @ moments.pooled_label_covariance))
    if not rank or not rank_v or not label_directions(moments, whitener).numel():
        return ranks | dict.fromkeys(LAYER_SCORES) | probe | {"null_draws": None}
    spanned = Spanned.of(v, moments, solved, config.fractions)
    ntps_all, ntps_label = euclidean_scores(solved, spanned, config)

    random = np.random.default_rng([config.data.seed, layer])
    draws = draw_permuted_factors(rank, moments.num_samples, moments.label_covariance, config.num_null_draws, random)
    offset = torch.outer(solved.mean, moments.label_mean)
    null_draws = {
        "ntps_label": euclidean_null(
            draws, spanned.whitened_basis.change_of(solved.change), offset, spanned.perception, spanned.dims
        ),
        **whitened_null(draws, spanned.whitened_basis.spanned(spanned.ks)),
    }
    random_v = {}
    if num_random_draws:
        explained = informative_directions(whitener.T @ moments.pooled_label_covariance)
        random = np.random.default_rng([config.data.seed, layer, 2])
        u = solved.whitener @ solved.labels
        random_v["random"] = random_scores(
            u, whitener.T @ moments.pooled_covariance, explained, spanned.ks, num_random_draws, random
        )
    return {
        **ranks,
        "ntps": ntps_all,
        "ntps_label": ntps_label,
        "chance": torch.tensor(spanned.ks) / len(moments.pooled_mean),
        **excess_scores(moments, whitener, spanned),
        **probe,
        "null_draws": null_draws,
        **random_v,
    }


# ------------------------------------------------------------------ run
def output_path(config: Config) -> Path:
    """Where the result goes; options other than the default are in the name."""
    return result_path("ntps", config.run, config.model, config.data, f"{option_suffix(result_settings(config))}.json")


def sweep(config: Config, path: Path, held_out_path: Path | None) -> dict:
    """The result of all layers, one in memory at a time; the stored one where it was made from the same moments.

    Raises:
        UserError: the labels are all equal.
    """
    device = pick_device(config.run.device)
    with contextlib.ExitStack() as stack:
        file, metadata = stack.enter_context(open_tensors(path))
        other, other_metadata = stack.enter_context(open_tensors(held_out_path)) if held_out_path else (None, None)
        # not the environment: the same rows and settings give the same moments on any machine, at any commit
        identity = {
            "config": result_settings(config),
            "moments": {name: value for name, value in metadata.items() if name != "environment"},
            "held_out": other_metadata and {"fingerprint": other_metadata["fingerprint"]},
        }
        if stored := find_result(output_path(config), identity, config.run):
            return stored
        numbers = metadata["layers"]
        check_has_layer(metadata, metadata["num_layers"] - 1)  # the score is that of the last layer
        layers = []
        for layer in tqdm(numbers, unit="layer", desc="K_sweep"):
            moments = load_layer(file, metadata, layer, device)
            if not moments.labels_vary:
                raise UserError(f"The labels of {path} are all equal. See --split, --label_column or --max_samples.")
            held_out = None
            if other_metadata and layer in other_metadata["layers"]:
                held_out = load_layer(other, other_metadata, layer, device)
            # of the last layer only, for the score of the run; a control of V would repeat them
            is_compared = layer == numbers[-1] and config.subspace == "autoregression"
            entry = sweep_layer(moments, held_out, config, layer, config.num_random_draws if is_compared else 0)
            if not option_suffix({**result_settings(config), "split": "train"}):  # a control of V would repeat them
                folds = load_folds(path, layer, device) if layer == numbers[-1] else None
                entry["closed_form"] = layer_scores(moments, held_out, folds, (config.data.seed, layer)).scores
            layers.append(entry)
    return {
        **identity,
        "environment": environment(),
        "num_samples": metadata["num_samples"],
        "num_classes": len(metadata["label_names"]),
        "hidden_size": len(moments.pooled_mean),
        "fractions": list(config.fractions),
        "score": summarize(layers, config.fractions),
        "layers": [to_json(layer) for layer in layers],
    }


def run(config: Config) -> dict:
    """Writes the scores and a picture of them, prints their table, and returns the result."""
    pick_device(config.run.device)  # before a pass through the model, not after it
    wanted = cache.Config(split=config.split, model=config.model, data=config.data, run=config.run)
    path, found = cache.find_moments(wanted, splits=("train", "test") if config.split != "all" else ("all",))
    config = with_values(config, model=found.model, data=found.data)
    other = {"train": "test", "test": "train"}.get(config.split)
    held_out_path = moments_path(config.run, config.model, config.data, other) if other else None
    result = sweep(config, path, held_out_path if held_out_path and held_out_path.is_file() else None)
    print_table(result)
    target = output_path(config)
    if config.output.picture:
        save_figure(plot_sweep(result), target)
    save_json(target, result)  # last: where the JSON is, the picture is
    print(target)
    return result


def main(config: Config) -> None:
    """Writes the scores and a picture of them, and prints their table."""
    run(config)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
