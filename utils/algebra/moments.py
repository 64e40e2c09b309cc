"""Read the moments of cache.py one layer at a time, and compare their settings with those asked for.

The pooled states of all texts are beside them, in `<split>.pooled.npy`: (layers saved, n, d) float32.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from utils import results
from utils.algebra.linalg import NO_NOISE, Noise
from utils.script import UserError
from utils.settings import Run

Coordinates = Literal["as_is", "standardized", "prefix_standardized"]
OF_LAYER = (
    *("pooled_second_moment", "pooled_label_cross_moment", "pooled_mean"),
    *("prefix_second_moment", "prefix_next_cross_moment", "prefix_mean", "next_mean"),
    *("pooled_norm_fourth_power", "pooled_norm_squared_pooled"),
)
EQUAL_LABELS = 1e-12  # labels are equal if their variance is at most this share of their mean square


@dataclass(frozen=True)
class PooledMoments:
    """The moments of pooled states and labels over some texts: enough to fit or to judge a linear probe."""

    pooled_second_moment: Tensor
    pooled_label_cross_moment: Tensor
    pooled_mean: Tensor
    label_mean: Tensor
    label_second_moment: Tensor
    num_samples: int

    @property
    def pooled_covariance(self) -> Tensor:
        """Sigma, the covariance of the pooled states, (d, d)."""
        return self.pooled_second_moment - torch.outer(self.pooled_mean, self.pooled_mean)

    @property
    def pooled_label_covariance(self) -> Tensor:
        """S, the covariance of pooled states and labels, (d, c)."""
        return self.pooled_label_cross_moment - torch.outer(self.pooled_mean, self.label_mean)

    @property
    def label_covariance(self) -> Tensor:
        """The covariance of the labels, (c, c)."""
        return self.label_second_moment - torch.outer(self.label_mean, self.label_mean)

    @property
    def labels_vary(self) -> bool:
        """True if the labels of these texts differ by more than rounding."""
        return bool(self.label_covariance.trace() > EQUAL_LABELS * self.label_second_moment.trace())


@dataclass(frozen=True)
class LayerMoments(PooledMoments):
    """The moments of one layer, float64, averaged over texts; names and shapes as in cache.py."""

    prefix_second_moment: Tensor
    prefix_next_cross_moment: Tensor
    prefix_mean: Tensor
    next_mean: Tensor
    num_pairs: int
    class_counts: list[int] | None = None  # texts of each class; None: regression
    pooled_norm_fourth_power: Tensor | None = None  # mean of |m|^4
    pooled_norm_squared_pooled: Tensor | None = None  # mean of |m|^2 m, (d,)
    pooled_rounding: Noise = NO_NOISE  # rounding in M, beyond that of float64
    prefix_rounding: Noise = NO_NOISE  # rounding in C0
    next_rounding: Noise = NO_NOISE  # rounding in C1: its error alone

    @property
    def covariance_rounding(self) -> Noise:
        """The rounding in Sigma."""
        return self.pooled_rounding.centred(self.pooled_second_moment.diagonal())

    def centred(self) -> "LayerMoments":
        """The moments about the means of pooled states, prefixes and next tokens: Sigma for M, S for B, and so on."""
        zeros = torch.zeros_like(self.pooled_mean)
        # the stored means are sums over pairs divided by texts: the mean over pairs is n / pairs times them
        prefix_mean_of_pairs = self.prefix_mean * self.num_samples / max(self.num_pairs, 1)
        return dataclasses.replace(
            self,
            pooled_second_moment=self.pooled_covariance,
            pooled_label_cross_moment=self.pooled_label_covariance,
            prefix_second_moment=self.prefix_second_moment - torch.outer(prefix_mean_of_pairs, self.prefix_mean),
            prefix_next_cross_moment=self.prefix_next_cross_moment - torch.outer(prefix_mean_of_pairs, self.next_mean),
            pooled_rounding=self.covariance_rounding,
            prefix_rounding=self.prefix_rounding.centred(self.prefix_second_moment.diagonal()),
            pooled_mean=zeros,
            prefix_mean=zeros,
            next_mean=zeros,
        )

    def unit_scale(self, coordinates: Coordinates) -> Tensor:
        """The scale of `coordinates`, (d,): 1 / deviation of pooled states, or of C0; 1 if it is rounding alone."""
        squares, noise = self.prefix_second_moment.diagonal(), self.prefix_rounding.diagonal
        if coordinates == "standardized":
            squares, noise = self.pooled_covariance.diagonal(), self.covariance_rounding.diagonal
        return torch.where(squares > noise, squares, 1).rsqrt()

    def scaled(self, scale: Tensor) -> "LayerMoments":
        """The moments of states multiplied by `scale`, (d,), per coordinate: D M D, D B, ... with D = diag(`scale`)."""
        both, variances = scale * scale[:, None], self.prefix_second_moment.diagonal()
        factors = dict.fromkeys(("pooled_second_moment", "prefix_second_moment", "prefix_next_cross_moment"), both)
        factors |= dict.fromkeys(("pooled_mean", "prefix_mean", "next_mean"), scale)
        factors["pooled_label_cross_moment"] = scale[:, None]
        changes: dict[str, Any] = {name: getattr(self, name) * factor for name, factor in factors.items()}
        for name in ("pooled_rounding", "prefix_rounding", "next_rounding"):
            changes[name] = getattr(self, name).scaled(scale, variances)
        changes |= {"pooled_norm_fourth_power": None, "pooled_norm_squared_pooled": None}
        return dataclasses.replace(self, **changes)


# ------------------------------------------------------------------ files
def load_rounding(file: Any, metadata: dict, layer: int, device: torch.device) -> dict[str, Any]:
    """The fields of `LayerMoments` that describe rounding: variance of the states, and errors of the products.

    The model's dtype rounds x to multiples of eps 2^e, for |x| in 2^e [1, 2). This error has variance eps^2 4^e / 12,
    or eps^2 x^2 / 12 times 3 / (8 log 2) on average over mantissas with a uniform logarithm. Errors of tokens are
    independent: a mean of T tokens has 1/T of that variance, a prefix sum of t tokens t times it. The function returns
    four times the variance, because real mantissas can be less evenly spread.
    """
    names = ("token_square", "prefix_second_error", "prefix_next_error")
    square, second_error, next_error = (file.get_tensor(f"layer.{layer}.{name}").to(device) for name in names)
    config, found = metadata["config"], metadata["rounding"]
    relative = torch.finfo(getattr(torch, config["dtype"])).eps ** 2 / 12 * 3 / (8 * math.log(2))
    per_token = 4 * relative * square.clamp(min=0) * metadata["num_samples"] / metadata["num_tokens"]
    pooled = per_token * (1 if config["pooling"] == "last" else found["mean_inverse_length"])
    return {
        "pooled_rounding": Noise(pooled, max_rank=found["num_distinct_texts"]),
        "prefix_rounding": Noise(per_token * found["mean_prefix_tokens"], second_error, found["num_distinct_pairs"]),
        "next_rounding": Noise(error=next_error),
    }


def load_layer(file: Any, metadata: dict, layer: int, device: torch.device) -> LayerMoments:
    """The moments of one layer from an open file of cache.py. Raises UserError: the file does not hold the layer."""
    check_has_layer(metadata, layer)
    tensors = {name: file.get_tensor(f"layer.{layer}.{name}").to(device) for name in OF_LAYER}
    tensors |= {name: file.get_tensor(name).to(device) for name in ("label_mean", "label_second_moment")}
    counts = {name: metadata[name] for name in ("num_samples", "num_pairs", "class_counts")}
    return LayerMoments(**tensors, **counts, **load_rounding(file, metadata, layer, device))


def describe_texts(token_ids: np.ndarray, offsets: np.ndarray) -> dict[str, Any]:
    """Counts of n texts, text i being `token_ids[offsets[i] : offsets[i + 1]]`, and statistics for `load_rounding`."""
    lengths = np.diff(offsets)
    hashes = (hash(token_ids[start:end].tobytes()) for start, end in itertools.pairwise(offsets))
    distinct = np.unique(np.fromiter(hashes, np.int64, len(lengths)), return_index=True)[1]
    rounding = {
        "mean_inverse_length": float((1 / lengths).mean()),
        "mean_prefix_tokens": float((lengths * (lengths - 1) / 2).mean()),  # tokens in all prefixes of a text
        "num_distinct_texts": len(distinct),
        "num_distinct_pairs": int((lengths[distinct] - 1).sum()),
    }
    counts = {"num_samples": len(lengths), "num_tokens": int(lengths.sum()), "num_pairs": int((lengths - 1).sum())}
    return {**counts, "rounding": rounding}


def label_averages(labels_of_folds: Iterable[Tensor]) -> dict[str, Tensor]:
    """Averages of labels over all texts and over each fold, from the labels (n, c) of each fold; layers share them."""
    found = [(y.sum(0), y.T @ y, torch.tensor(len(y), dtype=torch.float64)) for y in labels_of_folds]
    mean, second, sizes = map(torch.stack, zip(*found, strict=True))
    return {
        "label_mean": mean.sum(0) / sizes.sum(),
        "label_second_moment": second.sum(0) / sizes.sum(),
        "fold_num_samples": sizes,
        "fold_label_mean": mean / sizes.clamp(min=1)[:, None],
        "fold_label_second_moment": second / sizes.clamp(min=1)[:, None, None],
    }


# ------------------------------------------------------------------ find
def is_complete(path: Path, identity: dict[str, Any], config: Any) -> bool:
    """True if the moments at `path` have this identity and hold the layers, folds and pooled states asked for.

    Raises UserError: the moments have another identity; with --overwrite the result is False instead.
    """
    if not path.is_file():
        return False
    output = config.output
    try:
        with results.open_tensors(path) as (file, metadata):
            results.check_identity(metadata, identity, path)
            keys, num_layers = file.keys(), metadata["num_layers"]
        asked = numbers_of_layers(output.layers, num_layers)
        needed = {f"layer.{layer}.pooled_mean" for layer in asked}
        needed |= {f"layer.{layer}.fold_pooled_mean" for layer in choose(output.folds, asked)}
        num_pooled, written = len(choose(output.save_pooled, range(num_layers))), metadata["pooled_crc32"]
        if not needed.issubset(keys) or len(written) < num_pooled:
            return False
        is_beside = pooled_path(path).is_file()
        return not num_pooled or (is_beside and checksums(open_pooled(path)[-1:]) == written[-1:])
    except UserError:
        if not config.run.overwrite:
            raise
        return False


def require_embedded(config: Any, path: Path) -> None:
    """Raises UserError for missing moments; for the embedded model and data, which take seconds, prints a sentence."""
    if config.model.path_name != "tiny" or not config.data.dataset_name.startswith("docstrings/"):
        flags = "the same flags (for <model>+lora: --model_name <model> --adapter_dir <folder>)"
        raise UserError(f"No moments at {path}. Run cache.py with {flags}.")
    print(f"No moments at {path}. cache.py makes them now; the embedded model takes seconds.")


def held_out_path(path: Path, split: str) -> Path | None:
    """The path of the other split's moments; None if missing or, with a sentence, if made with other settings."""
    other = {"train": "test", "test": "train"}.get(split)
    if other is None or not (held_out := path.with_stem(other)).is_file():
        return None
    stored = results.read_stored(path)
    identity = {name: stored[name] for name in ("config", "model_fingerprint", "label_names")}
    identity["config"] = {k: v for k, v in stored["config"].items() if k not in ("split", "num_folds", "product_dtype")}
    if how := results.difference(results.read_stored(held_out), identity):
        print(f"No held-out numbers: {held_out} was made {how}. Run cache.py anew with --split {other} --overwrite.")
    return None if how else held_out


def find_scores(path: Path, identity: dict[str, Any], run: Run) -> dict[str, Any] | None:
    """The stored scores at `path`; None if missing, or if held-out moments were added, changed or removed since."""
    stored = results.find_result(path, {name: value for name, value in identity.items() if name != "held_out"}, run)
    if stored and stored["held_out"] != identity["held_out"]:
        print(f"{path} was made with other held-out moments, or without any. It is made again.")
        return None
    return stored


# ------------------------------------------------------------------ pooled states
def pooled_path(moments: Path) -> Path:
    """The path of the pooled states that belong to a file of moments."""
    return moments.with_suffix(".pooled.npy")


def checksums(pooled: np.ndarray) -> list[int]:
    """CRC-32 of each layer of pooled states (layers, n, d), which the moments keep."""
    return [zlib.crc32(np.ascontiguousarray(layer).data) for layer in pooled]


def open_pooled(moments: Path) -> np.ndarray:
    """The pooled states beside a file of moments as a memory map. Raises UserError if missing or damaged."""
    path = pooled_path(moments)
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or missing ({error}). {results.REMEDY}") from None


def load_pooled(moments: Path, layer: int) -> Tensor:
    """The pooled states of one layer (-1: the last), (n, d) float32. Raises UserError for states of other moments."""
    pooled, written = open_pooled(moments)[layer].copy(), results.read_stored(moments)["pooled_crc32"]
    if not written or checksums(pooled[None]) != [written[layer]]:
        raise UserError(f"{pooled_path(moments)} is damaged or belongs to other moments. {results.REMEDY}")
    return torch.from_numpy(pooled)


# ------------------------------------------------------------------ layers
def choose(which: str, layers: Sequence[int]) -> Sequence[int]:
    """The layers selected by "none", "last" or "all"."""
    return {"none": [], "last": layers[-1:], "all": layers}[which]


def check_has_layer(metadata: dict, layer: int) -> None:
    """Raises UserError if the moments do not hold this layer."""
    if layer not in (kept := metadata["layers"]):
        held, more = (" ".join(map(str, layers)) for layers in (kept, sorted([*kept, layer])))
        raise UserError(f"The moments hold layer {held}, not {layer}. Run cache.py with --layers {more}, or without.")


def numbers_of_layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """The sorted numbers of the layers asked for, negative ones counted from the end; None: all layers."""
    layers = range(num_layers) if layers is None else layers
    if wrong := [layer for layer in layers if not -num_layers <= layer < num_layers]:
        last = num_layers - 1
        raise UserError(f"There is no layer {wrong[0]}: the model has layers 0 to {last}, or -{num_layers} to -1.")
    return sorted({layer % num_layers for layer in layers})
