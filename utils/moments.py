"""The moments that cache.py writes, read back one layer at a time, and the least-squares probe they hold."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.io import open_tensors
from utils.linalg import Noise, rounding
from utils.models import TokenizedTexts
from utils.results import check_identity, result_path
from utils.settings import Data, Model, Run

PER_LAYER = (
    *("pooled_second_moment", "pooled_label_cross_moment", "pooled_mean"),
    *("prefix_second_moment", "prefix_next_cross_moment", "prefix_mean", "next_mean"),
)
NORMS = ("pooled_norm_fourth_power", "pooled_norm_squared_pooled")  # for Ledoit-Wolf shrinkage
OF_ROUNDING = ("prefix_second_error", "prefix_next_error")
SHARED = ("label_mean", "label_second_moment")  # the labels are the same at every layer


def moments_path(run: Run, model: Model, data: Data, split: str) -> Path:
    """Where the moments of a split are."""
    return result_path("moments", run, model, data) / f"{split}.safetensors"


def pooled_path(moments: Path) -> Path:
    """Where the pooled states are that belong to a file of moments."""
    return moments.with_suffix(".pooled.safetensors")


@dataclass(frozen=True)
class Rounding:
    """What in the moments of one layer can be rounding."""

    pooled: Tensor  # (d,), variance that the rounding of the states to the model's dtype gives the pooled state
    prefix: Tensor  # (d,), what it adds to the diagonal of C0
    prefix_second_error: Tensor  # (d, p), error of C0 Z
    prefix_next_error: Tensor  # (d, p), error of C1 Z
    num_distinct_texts: int
    num_distinct_pairs: int


@dataclass(frozen=True)
class LayerMoments:
    """The moments of one layer, float64, averaged over texts; names and shapes as in cache.py."""

    pooled_second_moment: Tensor
    pooled_label_cross_moment: Tensor
    pooled_mean: Tensor
    prefix_second_moment: Tensor
    prefix_next_cross_moment: Tensor
    prefix_mean: Tensor
    next_mean: Tensor
    label_mean: Tensor
    label_second_moment: Tensor
    num_samples: int
    num_pairs: int
    class_counts: Tensor | None = None  # texts of each class, (c,); None: regression
    pooled_norm_fourth_power: Tensor | None = None  # mean of |m|^4
    pooled_norm_squared_pooled: Tensor | None = None  # mean of |m|^2 m, (d,)
    rounding: Rounding | None = None  # None: of float64 alone

    @property
    def pooled_covariance(self) -> Tensor:
        """Sigma, (d, d)."""
        return self.pooled_second_moment - torch.outer(self.pooled_mean, self.pooled_mean)

    @property
    def pooled_label_covariance(self) -> Tensor:
        """S, (d, c)."""
        return self.pooled_label_cross_moment - torch.outer(self.pooled_mean, self.label_mean)

    @property
    def label_covariance(self) -> Tensor:
        """(c, c)."""
        return self.label_second_moment - torch.outer(self.label_mean, self.label_mean)

    def autoregression(self, center: bool) -> tuple[Tensor, Tensor]:
        """C0 and C1; centred on the mean prefix and the mean next token if asked."""
        if not center or not self.num_pairs:
            return self.prefix_second_moment, self.prefix_next_cross_moment
        # the means are sums over pairs divided by texts, so that the mean over pairs is n / pairs times them
        pairs_per_text = self.num_pairs / self.num_samples
        second_moment = torch.outer(self.prefix_mean, self.prefix_mean) / pairs_per_text
        cross_moment = torch.outer(self.prefix_mean, self.next_mean) / pairs_per_text
        return self.prefix_second_moment - second_moment, self.prefix_next_cross_moment - cross_moment

    def pooled_noise(self, center: bool) -> Noise:
        """What of M, or of Sigma, is rounding."""
        diagonal = torch.zeros_like(self.pooled_mean)
        if center:  # Sigma is a difference of two float64 matrices that can be much larger than it
            diagonal += rounding(len(diagonal)) * self.pooled_second_moment.diagonal()
        if self.rounding is None:
            return Noise(diagonal)
        return Noise(diagonal + self.rounding.pooled, max_rank=self.rounding.num_distinct_texts - center)

    def prefix_noise(self, center: bool) -> Noise:
        """What of C0 is rounding."""
        diagonal = torch.zeros_like(self.pooled_mean)
        if center:
            diagonal += rounding(len(diagonal)) * self.prefix_second_moment.diagonal()
        if self.rounding is None:
            return Noise(diagonal)
        max_rank = max(0, self.rounding.num_distinct_pairs - center)
        return Noise(diagonal + self.rounding.prefix, self.rounding.prefix_second_error, max_rank)


def load_rounding(file: Any, metadata: dict, layer: int, device: torch.device) -> Rounding:
    """What in the moments of a layer can be rounding.

    A state of the model's dtype is off by up to half of its spacing, eps 2^e for |x| in 2^e [1, 2): a variance of
    eps^2 4^e / 12, which is eps^2 x^2 / 12 times 3 / (8 log 2) on average over mantissas (their logarithm is
    uniform). The errors of tokens are independent: a mean of T tokens has 1/T of the variance, a prefix sum t times.
    Four times that is taken, which also covers mantissas that are less evenly spread.
    """
    statistics, config = metadata["rounding"], metadata["config"]
    relative = torch.finfo(getattr(torch, config["dtype"])).eps ** 2 / 12 * 3 / (8 * math.log(2))
    tokens_per_text = metadata["num_tokens"] / metadata["num_samples"]
    per_token = 4 * relative * file.get_slice("token_square")[layer].to(device).clamp(min=0) / tokens_per_text
    return Rounding(
        pooled=per_token * (1 if config["pooling"] == "last" else statistics["mean_inverse_length"]),
        prefix=per_token * statistics["mean_prefix_tokens"],
        **{name: file.get_slice(name)[layer].to(device) for name in OF_ROUNDING},
        **{name: statistics[name] for name in ("num_distinct_texts", "num_distinct_pairs")},
    )


def load_layer(file: Any, metadata: dict, layer: int, device: torch.device) -> LayerMoments:
    """The moments of one layer from an open file of cache.py; no other layer is read."""
    tensors = {name: file.get_slice(name)[layer].to(device) for name in PER_LAYER}
    tensors |= {name: file.get_slice(name)[layer].to(device) for name in NORMS}
    tensors |= {name: file.get_tensor(name).to(device) for name in SHARED}
    if metadata["class_counts"] is not None:
        tensors["class_counts"] = torch.tensor(metadata["class_counts"], device=device)
    counts = {name: metadata[name] for name in ("num_samples", "num_pairs")}
    return LayerMoments(**tensors, **counts, rounding=load_rounding(file, metadata, layer, device))


def probe_error(moments: LayerMoments, weights: Tensor, intercept: Tensor) -> float:
    """Mean squared error of y ~ w' m + b over these texts, averaged over targets, from the moments alone."""
    residual = (
        moments.label_second_moment.trace()
        - 2 * (weights * moments.pooled_label_cross_moment).sum()
        + (weights * (moments.pooled_second_moment @ weights)).sum()
        - 2 * intercept @ moments.label_mean
        + 2 * intercept @ (weights.T @ moments.pooled_mean)
        + intercept @ intercept
    )
    return residual.item() / len(intercept)


def probe_scores(moments: LayerMoments, held_out: LayerMoments | None, weights: Tensor) -> dict[str, float | None]:
    """MSE and R2 of the least-squares probe with intercept, on its own rows and on the held-out ones (None without)."""
    intercept = moments.label_mean - weights.T @ moments.pooled_mean
    scores: dict[str, float | None] = {}
    for suffix, rows in (("", moments), ("_held_out", held_out)):
        scores[f"probe_mse{suffix}"] = scores[f"probe_r2{suffix}"] = None
        if rows is not None:
            error = probe_error(rows, weights, intercept)
            scores[f"probe_mse{suffix}"] = error
            variance = rows.label_covariance.trace().item() / len(intercept)
            scores[f"probe_r2{suffix}"] = 1 - error / variance if variance > 0 else None
    return scores


def rounding_statistics(tokens: TokenizedTexts) -> dict[str, float]:
    """Of the token counts T and of the distinct texts: what K_sweep.py needs to tell rounding from rank."""
    lengths = tokens.lengths.astype(float)
    distinct = {part.tobytes(): len(part) for part in np.split(tokens.token_ids, tokens.offsets[1:-1])}
    return {
        "mean_inverse_length": float((1 / lengths).mean()),
        "mean_prefix_tokens": float((lengths * (lengths - 1) / 2).mean()),  # tokens in all prefixes of a text
        "num_distinct_texts": len(distinct),
        "num_distinct_pairs": sum(length - 1 for length in distinct.values()),
    }


def is_complete(path: Path, identity: dict[str, Any], folds: str, save_pooled: str) -> bool:
    """Whether the moments, and the folds and pooled states that are asked for, are there with this identity.

    Args:
        path: of the moments.
        identity: of what is asked for.
        folds: layers whose folds are asked for, "none", "last" or "all".
        save_pooled: layers whose pooled states are asked for, likewise.

    Raises:
        UserError: moments of another identity are there.
    """
    if not path.is_file():
        return False
    with open_tensors(path) as (file, metadata):
        check_identity(metadata, identity, path)
        num_layers = file.get_slice("pooled_mean").get_shape()[0]
        num_fold_layers = file.get_slice("fold_pooled_mean").get_shape()[0]
    if num_fold_layers < {"none": 0, "last": 1, "all": num_layers}[folds]:
        return False
    if save_pooled == "none":
        return True
    if not pooled_path(path).is_file():
        return False
    with open_tensors(pooled_path(path)) as (file, metadata):
        is_all = file.get_slice("pooled").get_shape()[0] > 1
        same = all(metadata.get(name) == value for name, value in identity.items())
        return same and (is_all or save_pooled == "last")
