"""Read the moments of cache.py one layer at a time, and compare their settings with those asked for."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from utils import results
from utils.algebra.linalg import NO_NOISE, Noise
from utils.algebra.pooled import has_pooled
from utils.script import UserError
from utils.settings import Run, command_line, result_settings, with_values

Coordinates = Literal["as_is", "standardized", "prefix_standardized"]
OF_LAYER = (
    *("pooled_second_moment", "pooled_label_cross_moment", "pooled_mean"),
    *("prefix_second_moment", "prefix_next_cross_moment", "prefix_mean", "next_mean"),
    *("pooled_norm_fourth_power", "pooled_norm_squared_pooled"),
)
EQUAL_LABELS = 1e-12  # variance of labels beside their mean square that is rounding


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
    class_counts: list[int] | None = None  # texts of each class; None: regression
    pooled_norm_fourth_power: Tensor | None = None  # mean of |m|^4
    pooled_norm_squared_pooled: Tensor | None = None  # mean of |m|^2 m, (d,)
    pooled_rounding: Noise = NO_NOISE  # in M, beyond that of float64
    prefix_rounding: Noise = NO_NOISE  # in C0
    next_rounding: Noise = NO_NOISE  # in C1: its error alone

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

    def autoregression(self, center: bool) -> tuple[Tensor, Tensor]:
        """C0 and C1; if `center`, centred on the mean prefix and the mean next token."""
        if not center or not self.num_pairs:
            return self.prefix_second_moment, self.prefix_next_cross_moment
        # the stored means are sums over pairs divided by texts: the mean over pairs is n / pairs times them
        pairs_per_text = self.num_pairs / self.num_samples
        second_moment = torch.outer(self.prefix_mean, self.prefix_mean) / pairs_per_text
        cross_moment = torch.outer(self.prefix_mean, self.next_mean) / pairs_per_text
        return self.prefix_second_moment - second_moment, self.prefix_next_cross_moment - cross_moment

    def unit_scale(self, coordinates: Coordinates) -> Tensor:
        """The diagonal of D, (d,): 1 / deviation of each coordinate of the pooled states, or 1 / root of diag C0.

        It is 1 for a coordinate that is no more than rounding.
        """
        of_pooled = self.pooled_covariance.diagonal(), self.pooled_noise(center=True).diagonal
        of_prefixes = self.prefix_second_moment.diagonal(), self.prefix_rounding.diagonal
        squares, noise = of_pooled if coordinates == "standardized" else of_prefixes
        return torch.where(squares > noise, squares, 1).rsqrt()

    def scaled(self, scale: Tensor) -> "LayerMoments":
        """The moments of states with coordinates multiplied by `scale`, (d,), the diagonal of D: D M D, D B, ..."""
        both, variances = scale * scale[:, None], self.prefix_second_moment.diagonal()
        factors = dict.fromkeys(("pooled_second_moment", "prefix_second_moment", "prefix_next_cross_moment"), both)
        factors |= dict.fromkeys(("pooled_mean", "prefix_mean", "next_mean"), scale)
        factors["pooled_label_cross_moment"] = scale[:, None]
        changes: dict[str, Any] = {name: getattr(self, name) * factor for name, factor in factors.items()}
        for name in ("pooled_rounding", "prefix_rounding", "next_rounding"):
            changes[name] = getattr(self, name).scaled(scale, variances)
        changes |= {"pooled_norm_fourth_power": None, "pooled_norm_squared_pooled": None}
        return dataclasses.replace(self, **changes)

    def pooled_noise(self, center: bool) -> Noise:
        """The rounding in M, or in Sigma."""
        return self.pooled_rounding.centred(self.pooled_second_moment.diagonal()) if center else self.pooled_rounding

    def prefix_noise(self, center: bool) -> Noise:
        """The rounding in C0, centred or not."""
        return self.prefix_rounding.centred(self.prefix_second_moment.diagonal()) if center else self.prefix_rounding


# ------------------------------------------------------------------ files
def load_rounding(file: Any, metadata: dict, layer: int, device: torch.device) -> dict[str, Any]:
    """The fields of `LayerMoments` that describe rounding: variance of the states, and errors of the products.

    A state in the model's dtype is off by up to half of its spacing, eps 2^e for |x| in 2^e [1, 2): a variance of
    eps^2 4^e / 12, on average over mantissas eps^2 x^2 / 12 times 3 / (8 log 2), as their logarithm is uniform. Errors
    of tokens are independent: a mean of T tokens has 1/T of the variance, a prefix sum of t tokens t times it. The
    result is four times that variance, to allow for mantissas that are less evenly spread.
    """
    square, second_error, next_error = (
        file.get_tensor(f"layer.{layer}.{name}").to(device)
        for name in ("token_square", "prefix_second_error", "prefix_next_error")
    )
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
    """The moments of one layer from an open file of cache.py; no other layer is read.

    Raises:
        UserError: the layer is not kept.
    """
    check_has_layer(metadata, layer)
    tensors = {name: file.get_tensor(f"layer.{layer}.{name}").to(device) for name in OF_LAYER}
    tensors |= {name: file.get_tensor(name).to(device) for name in ("label_mean", "label_second_moment")}
    counts = {name: metadata[name] for name in ("num_samples", "num_pairs", "class_counts")}
    return LayerMoments(**tensors, **counts, **load_rounding(file, metadata, layer, device))


def describe_texts(token_ids: np.ndarray, offsets: np.ndarray) -> dict[str, Any]:
    """Counts of n texts, text i being `token_ids[offsets[i] : offsets[i + 1]]`, and statistics for `load_rounding`."""
    lengths = np.diff(offsets)
    distinct = {hash(token_ids[start:end].tobytes()): end - start for start, end in itertools.pairwise(offsets)}
    rounding = {
        "mean_inverse_length": float((1 / lengths).mean()),
        "mean_prefix_tokens": float((lengths * (lengths - 1) / 2).mean()),  # tokens in all prefixes of a text
        "num_distinct_texts": len(distinct),
        "num_distinct_pairs": int(sum(distinct.values())) - len(distinct),
    }
    counts = {"num_samples": len(lengths), "num_tokens": int(lengths.sum()), "num_pairs": int((lengths - 1).sum())}
    return {**counts, "rounding": rounding}


def label_averages(labels_of_folds: Iterable[Tensor]) -> dict[str, Tensor]:
    """Averages of the labels (n, c) of each fold, over all texts and over each fold; the same at every layer."""
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

    Raises:
        UserError: the moments have another identity; with --overwrite the result is False instead.
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
        num_pooled = len(choose(output.save_pooled, range(num_layers)))
        return needed.issubset(keys) and has_pooled(path, metadata["pooled_crc32"], num_pooled)
    except UserError:
        if not config.run.overwrite:
            raise
        return False


def check_embedded(config: Any, path: Path) -> None:
    """Raises UserError with the command that makes missing moments; for the embedded model only prints a sentence."""
    if config.model.path_name != "tiny" or not config.data.dataset_name.startswith("docstrings/"):
        name, adapted, _ = config.model.model_name.partition("+lora")
        adapter = config.run.results_dir / "lora" / name / config.data.path_name / "adapter"
        asked = with_values(config, model_name=name, adapter_dir=adapter) if adapted else config
        flags = {*result_settings(asked), "results_dir", "trust_remote_code"}
        raise UserError(f"No moments at {path}. Run: {command_line('cache.py', asked, flags)}")
    print(f"No moments at {path}: making them, as the embedded model takes seconds.")


def held_out_path(path: Path, config: Any) -> Path | None:
    """The path of the other split's moments, made like those of `config` at `path`; None if missing or made otherwise.

    For moments of other settings it prints a sentence.
    """
    other = {"train": "test", "test": "train", "all": "none"}[config.split]
    if not (held_out := path.with_stem(other)).is_file():
        return None
    stored = results.read_identity(path)
    identity = {name: stored[name] for name in ("config", "model_fingerprint", "label_names")}
    not_compared = ("split", "num_folds", "product_dtype")
    identity["config"] = {name: value for name, value in identity["config"].items() if name not in not_compared}
    if not (how := results.difference(results.read_identity(held_out), identity)):
        return held_out
    wanted = with_values(config, split=other, overwrite=True)
    command = command_line("cache.py", wanted, {*result_settings(config), "results_dir", "overwrite"})
    print(f"No held-out numbers: {held_out} was made {how}. Run: {command}")
    return None


def find_scores(path: Path, identity: dict[str, Any], run: Run) -> dict[str, Any] | None:
    """The stored scores at `path`; None if missing, or if held-out moments were added or removed since."""
    held_out = identity["held_out"]
    stored = results.find_result(path, {name: value for name, value in identity.items() if name != "held_out"}, run)
    if stored and stored["held_out"] != held_out and None in (stored["held_out"], held_out):
        change = "has no held-out numbers yet" if held_out else "has held-out numbers of moments that are gone"
        print(f"{path} {change}: made again.")
        results.check_writable(path)
        return None
    if stored:
        results.check_identity(stored, identity, path)
    return stored


# ------------------------------------------------------------------ layers
def choose(which: str, layers: Sequence[int]) -> Sequence[int]:
    """The layers that "none", "last" or "all" stands for."""
    return {"none": [], "last": layers[-1:], "all": layers}[which]


def in_words(layers: Iterable[int]) -> str:
    """The layer numbers in the form that --layers takes."""
    return " ".join(map(str, sorted(layers)))


def check_has_layer(metadata: dict, layer: int) -> None:
    """Raises UserError if the moments do not hold a layer."""
    if layer not in (kept := metadata["layers"]):
        more = f"--layers {in_words({*kept, layer})}"
        raise UserError(f"The moments hold layer {in_words(kept)}, not {layer}. Run cache.py with {more}, or for all.")


def numbers_of_layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """The sorted numbers of the layers asked for, negative ones counted from the end; None: all layers."""
    layers = range(num_layers) if layers is None else layers
    if wrong := [layer for layer in layers if not -num_layers <= layer < num_layers]:
        last = num_layers - 1
        raise UserError(f"There is no layer {wrong[0]}: the model has layers 0 to {last}, or -{num_layers} to -1.")
    return sorted({layer % num_layers for layer in layers})
