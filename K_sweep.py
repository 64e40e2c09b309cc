"""Solve the two eigenproblems of each layer and write the Next Token Perception Score over K.

    python K_sweep.py                                                # embedded model and data
    python K_sweep.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion --device cuda
    python K_sweep.py --eigenvectors smallest                        # the order of the released script
    python K_sweep.py --coordinates standardized                     # every coordinate of unit variance first
    python K_sweep.py --subspace pca                                 # control: directions of largest variance as V

Reads results/moments/<model>/<dataset>/<split>.safetensors (and the other split's, for the held-out probe).
Writes results/ntps/<model>/<dataset>.json and a picture beside it (.png, .pdf). The name shows options that differ from
the default: <dataset>.smallest.json, <dataset>.centered.json, <dataset>.standardized.json, <dataset>.test.json.

Symbols, per layer: M, B, C0, C1 the moments of cache.py; mu, p the means of the pooled state m and of the label y;
Sigma = M - mu mu', S = B - mu p'. W whitens: W' M W = I.

    perception      B B' u   = lambda M u     U: largest lambda first, r = rank B informative, the rest tied at 0
    autoregression  C1 C1' v = lambda C0 v    V: largest lambda first
    NTPS(K) = |P U|^2 / |U|^2                 P: Euclidean projector on span V, Frobenius norms
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

import cache
from utils.algebra.features import feature_scores
from utils.algebra.linalg import NO_NOISE, Eigenspace, NestedBasis, Noise, rounding, whiten
from utils.algebra.moments import Coordinates, LayerMoments, check_has_layer, find_scores, held_out_path, load_layer
from utils.algebra.nulls import permuted_scores, random_scores, random_stream
from utils.algebra.ridge import load_folds, probe_scores
from utils.algebra.scores import LayerScores, option_suffix, print_table, summarize
from utils.pictures import plot_sweep, save_figure
from utils.results import one_run_at_a_time, open_tensors, result_path, save_json
from utils.script import UserError, environment, pick_device, run_script
from utils.settings import Data, Model, Run, Unrecorded, result_settings, with_values


@dataclass(frozen=True)
class Output(Unrecorded):
    """Optional picture; it cannot affect results."""

    picture: bool = True  # also draw the picture; it takes longer than the scores of a small model


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override them from the shell; moments give the model and data settings you omit."""

    split: Literal["train", "test", "all"] = "train"  # rows that give U and V
    eigenvectors: Literal["largest", "smallest"] = "largest"  # smallest: as in the released script
    subspace: Literal["autoregression", "pca", "random"] = "autoregression"  # columns of V; pca and random are controls
    center: bool = False  # subtract the means first; the paper does not
    coordinates: Coordinates = "as_is"  # standardized: unit variance of pooled states; prefix_standardized: unit C0_ii
    fractions: tuple[float, ...] = tuple(i / 20 for i in range(1, 20))  # K, as shares of the ranks of M and C0
    num_null_draws: int = 100  # draws of permuted labels, for the null band and z
    num_random_draws: int = 20  # random V at the last layer, for a z of V; 0: none
    model: Model = Model()
    data: Data = Data()
    output: Output = Output()
    run: Run = Run(device="cpu")  # Device, folders and speed; the numbers are float64 on any device.

    def __post_init__(self) -> None:
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"--fractions must be in (0, 1], not {self.fractions}")
        if self.num_null_draws < 2 or self.num_random_draws < 0 or self.num_random_draws == 1:
            raise ValueError("--num_null_draws and --num_random_draws must be at least 2; 0 draws no random V")


# ------------------------------------------------------------------ the score, from its definition
def ntps_reference(moments: LayerMoments, fraction: float) -> float:
    """NTPS of one layer at one K by a slow, dense formula; the rest of this file computes every K at once."""

    def solve(factor: Tensor, denominator: Tensor) -> tuple[Tensor, int]:
        """All eigenvectors of F F' u = lambda C u in the range of C, largest first; and how many have lambda > 0."""
        scale = denominator.diagonal().rsqrt()
        spread, axes = torch.linalg.eigh(denominator * scale * scale[:, None])
        kept = spread > len(scale) * torch.finfo(torch.float64).eps * spread[-1]
        whitener = scale[:, None] * axes[:, kept] * spread[kept].rsqrt()  # W' C W = I
        _, vectors = torch.linalg.eigh(whitener.T @ factor @ factor.T @ whitener)
        lengths = torch.linalg.svdvals(whitener.T @ factor)  # roots of the eigenvalues, more exact than these
        smallest = math.sqrt(whitener.shape[1] * torch.finfo(torch.float64).eps) * lengths[0]
        num_informative = int((lengths > smallest).sum())
        return whitener @ vectors.flip(1), num_informative

    u, num_informative = solve(moments.pooled_label_cross_moment, moments.pooled_second_moment)
    v, _ = solve(moments.prefix_next_cross_moment, moments.prefix_second_moment)
    k_u, k_v = (max(1, math.floor(fraction * vectors.shape[1] + 1e-9)) for vectors in (u, v))
    # the first k_u columns of U; columns with lambda = 0 have the mean weight over all bases of their space
    weights = torch.zeros(u.shape[1], dtype=torch.float64)
    weights[: min(k_u, num_informative)] = 1
    if k_u > num_informative:
        weights[num_informative:] = (k_u - num_informative) / (u.shape[1] - num_informative)
    projection = torch.linalg.qr(v[:, :k_v]).Q.T @ u  # |P u_j| is the length of column j
    return float(weights @ projection.square().sum(0) / (weights @ u.square().sum(0)))


# ------------------------------------------------------------------ the eigenproblem
def solve_generalized_eigenproblem(
    factor: Tensor, denominator: Tensor, noise: Noise = NO_NOISE, factor_error: Tensor | None = None
) -> Eigenspace:
    """Solves F F' u = lambda C u in the range of C, largest eigenvalue first.

    With W the whitener of C, the left singular vectors of W' F are the coordinates. A singular value is zero below
    sqrt(rank * eps) of the largest, or below three times the length of the errors of F in its direction.

    Differs from the paper: the released script takes the smallest first (`--eigenvectors smallest`).

    Args:
        factor, denominator: F, (d, c), and C, (d, d), symmetric and positive semi-definite, float64.
        noise, factor_error: rounding in C, beyond that of float64; and the error of F Z for random signs Z, (d, p).
    """
    whitener = whiten(denominator, noise=noise)
    whitened = whitener.T @ factor
    if whitened.shape[0] <= whitened.shape[1]:  # wide: one symmetric problem is cheaper than an SVD
        squares, vectors = torch.linalg.eigh(whitened @ whitened.T)
        values, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    else:
        vectors, values, _ = torch.linalg.svd(whitened, full_matrices=False)
    kept = values > math.sqrt(rounding(len(whitened))) * values[:1]
    if factor_error is not None:
        row_variances = whitener.square().T @ factor_error.square().mean(1)
        kept &= values > 3 * (vectors.square().T @ row_variances).sqrt()
    return Eigenspace(whitener, vectors[:, kept], values[kept].square(), vectors[:, ~kept])


def complete_by_variance(solved: Eigenspace) -> Tensor:
    """The eigenvectors of a wide F, (d, rank): those with lambda > 0, then the tied ones, largest v' C v / |v|^2 first.

    V has tied ones only if the next tokens span fewer directions than the prefixes, as in a handful of short texts.
    Any order of them is a solution; this one is the same on every machine.
    """
    rest = solved.whitener @ solved.tied
    axes = torch.linalg.svd(rest, full_matrices=False).Vh
    return torch.cat([solved.vectors, rest @ axes.T.flip(1)], dim=1)


# ------------------------------------------------------------------ U and V of a layer
def perception(moments: LayerMoments) -> Eigenspace:
    """U of a layer, from B and M; if the moments are centred, as for a probe with intercept, from S and Sigma."""
    cross_moment, second_moment = moments.pooled_label_cross_moment, moments.pooled_second_moment
    return solve_generalized_eigenproblem(cross_moment, second_moment, moments.pooled_rounding)


def next_token_subspace(moments: LayerMoments) -> Tensor:
    """V of a layer, from C1 and C0, largest eigenvalue first, (d, rank C0)."""
    next_moment, prefix_moment = moments.prefix_next_cross_moment, moments.prefix_second_moment
    noise, error = moments.prefix_rounding, moments.next_rounding.error
    return complete_by_variance(solve_generalized_eigenproblem(next_moment, prefix_moment, noise, error))


def control_subspace(moments: LayerMoments, config: Config, rank: int, layer_index: int) -> Tensor:
    """A control in place of V, (d, rank): directions of largest pooled variance, or random directions."""
    if config.subspace == "pca":
        return torch.linalg.eigh(moments.pooled_second_moment).eigenvectors.flip(1)[:, :rank]
    random = random_stream("control of V", config.data.seed, layer_index)
    return torch.from_numpy(random.standard_normal((len(moments.pooled_mean), rank))).to(moments.pooled_mean)


def num_directions(fractions: tuple[float, ...], rank: int) -> list[int]:
    """K for each fraction of the rank: floor(f * rank), at least 1."""
    return [max(1, math.floor(fraction * rank + 1e-9)) for fraction in fractions]  # .7 * 90 is 62.99999999999999


# ------------------------------------------------------------------ the scores
def tie_weights(k_us: list[int], eigenvalues: Tensor, num_tied: int, largest: bool) -> Tensor:
    """Share of each informative direction, and of the tied space, within U_k, averaged over all bases: (ks, r + 1).

    Any basis of an eigenspace is a solution, so U_k holds an equal share of each of its directions: (k - directions
    before it) / its dimension. Eigenvalue 0 has `num_tied` directions; with n <= d, equal class frequencies tie too.

    Differs from the paper: the released script takes the one basis that the solver returns.
    """
    is_next = eigenvalues.diff().abs() > 1e-9 * eigenvalues[:-1]
    eigenspace = torch.cat([is_next.new_zeros(min(1, len(eigenvalues))), is_next]).cumsum(0)
    sizes = torch.cat([eigenspace.bincount(), eigenspace.new_tensor([num_tied])])
    before = sizes.cumsum(0) - sizes if largest else sizes.sum() - sizes.cumsum(0)
    k = torch.tensor(k_us, device=sizes.device)[:, None]
    weights = (k - before).clamp(min=0).minimum(sizes).to(eigenvalues) / sizes.clamp(min=1)
    return torch.cat([weights[:, eigenspace], weights[:, -1:]], dim=1)


def ntps(u: Eigenspace, basis: NestedBasis, fractions: tuple[float, ...], largest: bool = True) -> dict[str, Tensor]:
    """The paper's score over all k_U directions, and the same ratio over the r informative ones only, (fractions,).

    NTPS = (|P U_r|^2 + g |P Z|^2) / (|U_r|^2 + g |Z|^2), each direction of U_r weighted, Z the tied space, g its share.
    """
    space, (rank, num_informative) = u.whitener, u.coordinates.shape
    inside, whole = basis.projected_norms(u.vectors), u.vectors.square().sum(0)
    tied_inside = basis.projected_norms(space).sum(1) - inside.sum(1)  # Z itself is never formed
    tied_whole = space.square().sum() - whole.sum()
    weights = tie_weights(num_directions(fractions, rank), u.eigenvalues, rank - num_informative, largest)
    informative, share = weights[:, :-1], weights[:, -1]
    score = ((informative * inside).sum(1) + share * tied_inside) / (informative @ whole + share * tied_whole)
    return {"ntps": score.clamp(0, 1), "ntps_label": inside.sum(1) / whole.sum()}


def retained(labels: Eigenspace, whitened: NestedBasis) -> dict[str, Tensor]:
    """Two overlaps after whitening by Sigma: `ntps_whitened`, and `retained`, which weights directions by eigenvalue.

    `retained` is the share of the explained label variance that a linear probe with intercept keeps within V_K.
    """
    inside = whitened.projected_norms(labels.coordinates)
    return {"ntps_whitened": inside.mean(1), "retained": inside @ labels.eigenvalues / labels.eigenvalues.sum()}


def excess_loss(sigma: Tensor, labels: Eigenspace, basis: NestedBasis, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The extra loss of a linear probe with intercept that sees only V_K, and its bounds, (fractions,) each.

    With W' S = P diag(s) R' and Pi the projector on the whitened span of V_K, the excess of the least-squares loss
    (summed over labels) is sum_j s_j^2 (1 - |Pi p_j|^2); the bounds replace every s_j by the largest or the smallest.
    The theorem's Euclidean bounds also replace Sigma by its extreme eigenvalues. `found` are scores of `retained`.
    """
    missing = labels.vectors.square().sum() - basis.projected_norms(labels.vectors).sum(1)
    smallest, largest = torch.linalg.eigvalsh(sigma)[[0, -1]]
    if labels.whitener.shape[1] < len(sigma) or smallest <= rounding(len(sigma)) * largest:
        smallest = torch.zeros_like(smallest)  # it is no more than rounding
    squares, scores = labels.eigenvalues, {"excess_loss": labels.eigenvalues.sum() * (1 - found["retained"])}
    for name, square, of_sigma in (("lower", squares[-1], smallest), ("upper", squares[0], largest)):
        scores[f"excess_{name}"] = square * len(squares) * (1 - found["ntps_whitened"])
        scores[f"excess_{name}_euclidean"] = square * of_sigma * missing
    return scores


# ------------------------------------------------------------------ one layer
def sweep_layer(
    moments: LayerMoments, held_out: LayerMoments | None, config: Config, layer_index: int, num_random_draws: int = 0
) -> LayerScores:
    """Every score of one layer over all fractions.

    A layer has no score if its pooled states do not vary, or not with the labels, or if no text has two tokens.
    """
    if config.coordinates != "as_is":
        scale = moments.unit_scale(config.coordinates)  # D: the moments become D M D, D B, D C0 D, D C1 D
        moments, held_out = moments.scaled(scale), held_out and held_out.scaled(scale)
    centred = moments.centred()
    used = centred if config.center else moments
    sigma, labels = centred.pooled_second_moment, perception(centred)
    u = labels if config.center else perception(moments)
    v = next_token_subspace(used)
    if config.subspace != "autoregression":
        v = control_subspace(used, config, v.shape[1], layer_index)
    if config.eigenvectors == "smallest":
        v = v.flip(1)
    whitener, (rank_u, rank_label) = labels.whitener, u.coordinates.shape
    probe = probe_scores(moments, held_out, whitener @ (whitener.T @ moments.pooled_label_covariance))
    layer = LayerScores(layer_index, rank_u, v.shape[1], rank_label, probe)
    if not v.shape[1] or not len(labels.eigenvalues):
        return layer
    ks = num_directions(config.fractions, v.shape[1])
    v = v[:, : max(ks)]
    basis = NestedBasis.of(v, ks)
    # W' Sigma V_K spans the part of V_K that a probe sees after Sigma is whitened; a column along which the pooled
    # states do not vary is rounding: it is tiny beside `sizes`, the largest variation possible along that column
    sizes = v.abs().T @ sigma.diagonal().clamp(min=0).sqrt()
    to_whitened = whitener.T @ sigma
    whitened = NestedBasis.of(to_whitened @ v, ks, sizes)
    scores = ntps(u, basis, config.fractions, config.eigenvectors == "largest") | retained(labels, whitened)
    scores["chance"] = torch.tensor(ks).double() / len(sigma)
    scores |= excess_loss(sigma, labels, basis, scores)
    seed, space = (config.data.seed, layer_index), (u.whitener, to_whitened, basis, whitened)
    null = permuted_scores(used, space, config.num_null_draws, seed)
    random_v = random_scores(u.vectors, to_whitened, labels, ks, num_random_draws, seed)
    return dataclasses.replace(layer, scores=scores, null_draws=null, random=random_v)


# ------------------------------------------------------------------ run
def output_path(config: Config) -> Path:
    """The path of the result; its name holds the options that differ from the default."""
    return result_path("ntps", config.run, config.model, config.data, f"{option_suffix(result_settings(config))}.json")


def sweep(config: Config, path: Path, other_path: Path | None) -> dict[str, Any]:
    """The result: scores of all layers, one layer in memory at a time; or the stored result of the same moments.

    Raises UserError: all labels are equal.
    """
    device, is_default = pick_device(config.run.device), not option_suffix(result_settings(config) | {"split": "train"})
    with contextlib.ExitStack() as stack:
        file, metadata = stack.enter_context(open_tensors(path))
        other, other_metadata = stack.enter_context(open_tensors(other_path)) if other_path else (None, None)
        # the same rows and settings give the same moments on any machine, and with or without pooled states beside them
        identity = {
            "config": result_settings(config),
            "moments": {k: v for k, v in metadata.items() if k not in ("environment", "pooled_crc32")},
            "held_out": other_metadata and {"fingerprint": other_metadata["fingerprint"]},
        }
        if stored := find_scores(output_path(config), identity, config.run):
            return stored
        last, layers = metadata["num_layers"] - 1, []
        check_has_layer(metadata, last)  # the score is that of the last layer
        for layer_index in tqdm(metadata["layers"], unit="layer", desc="K_sweep"):
            moments = load_layer(file, metadata, layer_index, device)
            if not moments.labels_vary:
                raise UserError(f"The labels of {path} are all equal. Change --split, --label_column or --max_samples.")
            held_out = None
            if other_metadata and layer_index in other_metadata["layers"]:
                held_out = load_layer(other, other_metadata, layer_index, device)
            # random V is a control for V by autoregression only; only default options compute the closed forms
            is_compared = layer_index == last and config.subspace == "autoregression"
            layer = sweep_layer(moments, held_out, config, layer_index, config.num_random_draws if is_compared else 0)
            if is_default:
                folds = load_folds(file, layer_index, device) if layer_index == last else None
                layer = dataclasses.replace(layer, closed_form=feature_scores(moments, held_out, folds)[0])
            layers.append(layer)
    return {
        **identity,
        "environment": environment(),
        "num_samples": metadata["num_samples"],
        "num_classes": len(metadata["label_names"]),
        "hidden_size": len(moments.pooled_mean),
        "fractions": list(config.fractions),
        "score": summarize(layers[-1], len(config.fractions)),
        "layers": [layer.to_json() for layer in layers],
    }


def score(config: Config, path: Path, other_path: Path | None) -> dict[str, Any]:
    """Writes the scores of the moments at `path` and a picture of them, prints their table, and returns the result."""
    target = output_path(config)
    with one_run_at_a_time(target):
        result = sweep(config, path, other_path)
        print_table(result)
        save_json(target, result)  # before the picture: its failure loses no score
        if config.output.picture:
            save_figure(plot_sweep(result), target)
    print(target)
    return result


def main(config: Config) -> dict[str, Any]:
    """Scores the moments of a config, as `score` does; makes missing moments of the embedded model."""
    pick_device(config.run.device)  # before a pass through the model, not after it
    wanted = cache.Config(split=config.split, model=config.model, data=config.data, run=config.run)
    path, found = cache.find_moments(wanted, splits=("train", "test") if config.split != "all" else ("all",))
    if other_path := held_out_path(path, config.split):
        cache.find_moments(with_values(wanted, split=other_path.stem), ())  # refuses moments of other rows
    return score(with_values(config, model=found.model, data=found.data), path, other_path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
