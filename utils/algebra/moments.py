"""The moments that cache.py writes, read back one layer at a time, with the settings they were made with."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.algebra.linalg import Noise, rounding
from utils.algebra.pooled import has_pooled
from utils.results import check_identity, difference, find_result, open_tensors, read_identity, result_path
from utils.script import UserError
from utils.settings import Data, Model, Run, command_line, result_settings, with_values

PER_LAYER = (
    *("pooled_second_moment", "pooled_label_cross_moment", "pooled_mean"),
    *("prefix_second_moment", "prefix_next_cross_moment", "prefix_mean", "next_mean"),
)
NORMS = ("pooled_norm_fourth_power", "pooled_norm_squared_pooled")  # for Ledoit-Wolf shrinkage
OF_ROUNDING = ("prefix_second_error", "prefix_next_error")
EQUAL_LABELS = 1e-12  # variance of labels beside their mean square that is rounding
COMPARED = ("config", "label_names", "model_fingerprint")  # of the moments of two splits
SHARED = ("label_mean", "label_second_moment")  # the labels are the same at every layer


def moments_path(run: Run, model: Model, data: Data, split: str) -> Path:
    """Where the moments of a split are."""
    return result_path("moments", run, model, data) / f"{split}.safetensors"


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

    @property
    def labels_vary(self) -> bool:
        """Whether the labels of these texts differ by more than rounding."""
        return bool(self.label_covariance.trace() > EQUAL_LABELS * self.label_second_moment.trace())

    def autoregression(self, center: bool) -> tuple[Tensor, Tensor]:
        """C0 and C1; centred on the mean prefix and the mean next token if asked."""
        if not center or not self.num_pairs:
            return self.prefix_second_moment, self.prefix_next_cross_moment
        # the means are sums over pairs divided by texts, so that the mean over pairs is n / pairs times them
        pairs_per_text = self.num_pairs / self.num_samples
        second_moment = torch.outer(self.prefix_mean, self.prefix_mean) / pairs_per_text
        cross_moment = torch.outer(self.prefix_mean, self.next_mean) / pairs_per_text
        return self.prefix_second_moment - second_moment, self.prefix_next_cross_moment - cross_moment

    @property
    def pooled_deviation(self) -> Tensor:
        """Standard deviation of each coordinate of the pooled states, (d,); 1 for one that varies by rounding alone."""
        variance = self.pooled_covariance.diagonal()
        return torch.where(variance > self.pooled_noise(center=True).diagonal, variance, 1).sqrt()

    def scaled(self, scale: Tensor) -> "LayerMoments":
        """The moments of states with coordinates multiplied by `scale`, (d,), the diagonal of D: D M D, D B, ..."""
        rows, both, errors = scale[:, None], scale * scale[:, None], self.rounding
        if errors is not None:  # an element's error is in proportion to the sizes of its two coordinates, as in `Noise`
            variances = self.prefix_second_moment.diagonal()
            growth = rows * (variances @ scale.square() / variances.sum()).sqrt()
            errors = dataclasses.replace(
                errors,
                **{name: getattr(errors, name) * scale.square() for name in ("pooled", "prefix")},
                **{name: getattr(errors, name) * growth for name in OF_ROUNDING},
            )
        changes: dict[str, Any] = dict.fromkeys(NORMS)
        changes |= {name: getattr(self, name) * scale for name in ("pooled_mean", "prefix_mean", "next_mean")}
        for name in ("pooled_second_moment", "prefix_second_moment", "prefix_next_cross_moment"):
            changes[name] = getattr(self, name) * both
        changes["pooled_label_cross_moment"] = self.pooled_label_cross_moment * rows
        return dataclasses.replace(self, **changes, rounding=errors)

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
    per_token = 4 * relative * file.get_tensor(f"layer.{layer}.token_square").to(device).clamp(min=0) / tokens_per_text
    return Rounding(
        pooled=per_token * (1 if config["pooling"] == "last" else statistics["mean_inverse_length"]),
        prefix=per_token * statistics["mean_prefix_tokens"],
        **{name: file.get_tensor(f"layer.{layer}.{name}").to(device) for name in OF_ROUNDING},
        **{name: statistics[name] for name in ("num_distinct_texts", "num_distinct_pairs")},
    )


def load_layer(file: Any, metadata: dict, layer: int, device: torch.device) -> LayerMoments:
    """The moments of one layer from an open file of cache.py; no other layer is read.

    Raises:
        UserError: the layer is not kept.
    """
    check_has_layer(metadata, layer)
    tensors = {name: file.get_tensor(f"layer.{layer}.{name}").to(device) for name in (*PER_LAYER, *NORMS)}
    tensors |= {name: file.get_tensor(name).to(device) for name in SHARED}
    if metadata["class_counts"] is not None:
        tensors["class_counts"] = torch.tensor(metadata["class_counts"], device=device)
    counts = {name: metadata[name] for name in ("num_samples", "num_pairs")}
    return LayerMoments(**tensors, **counts, rounding=load_rounding(file, metadata, layer, device))


def describe_texts(token_ids: np.ndarray, offsets: np.ndarray) -> dict[str, Any]:
    """Counts of n texts, and the statistics from which `load_rounding` tells rounding from rank.

    Args:
        token_ids: of all texts, end to end, (num_tokens,).
        offsets: text i is token_ids[offsets[i] : offsets[i + 1]], (n + 1,).
    """
    lengths = np.diff(offsets)
    digests = bytearray()  # 16 bytes a text instead of a copy of it
    for start, end in itertools.pairwise(offsets):
        digests += hashlib.blake2b(token_ids[start:end].tobytes(), digest_size=16).digest()
    _, first = np.unique(np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2), axis=0, return_index=True)
    rounding_statistics = {
        "mean_inverse_length": float((1 / lengths).mean()),
        "mean_prefix_tokens": float((lengths * (lengths - 1) / 2).mean()),  # tokens in all prefixes of a text
        "num_distinct_texts": len(first),
        "num_distinct_pairs": int((lengths[first] - 1).sum()),
    }
    counts = {"num_samples": len(lengths), "num_tokens": int(lengths.sum()), "num_pairs": int((lengths - 1).sum())}
    return {**counts, "rounding": rounding_statistics}


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
def is_complete(path: Path, identity: dict[str, Any], output: Any, overwrite: bool) -> bool:
    """Whether the moments at `path` have this identity and hold the layers, folds and pooled states asked for.

    Args:
        path: of the moments.
        identity: as `check_identity` compares it.
        output: `layers`, `folds` and `save_pooled` of cache.py's config.
        overwrite: moments that would be refused are incomplete.

    Raises:
        UserError: moments of another identity, or of layers that are not among those asked for.
    """
    if not path.is_file():
        return False
    try:
        with open_tensors(path) as (file, metadata):
            check_identity(metadata, identity, path)
            keys, kept, num_layers = file.keys(), set(metadata["layers"]), metadata["num_layers"]
        asked = numbers_of_layers(output.layers, num_layers)
        if not kept.issuperset(asked) and not kept.issubset(asked):
            raise UserError(
                f"{path} has layers {in_words(kept)}, which would be lost. Keep them with --layers "
                f"{in_words(kept.union(asked))}, replace them with --overwrite, or write elsewhere with --results_dir."
            )
        return (
            kept.issuperset(asked)
            and all(f"layer.{layer}.fold_pooled_mean" in keys for layer in choose(output.folds, asked))
            and has_pooled(path, metadata["pooled_crc32"], len(choose(output.save_pooled, range(num_layers))))
        )
    except UserError:
        if not overwrite:
            raise
        return False


def check_embedded(config: Any, path: Path) -> None:
    """Says that moments of the embedded model are made because they are not there.

    Raises:
        UserError: they are of another model; names the command that makes them.
    """
    if config.model.path_name != "tiny" or not config.data.dataset_name.startswith("docstrings/"):
        name, adapted, _ = config.model.model_name.partition("+lora")
        adapter = config.run.results_dir / "lora" / name / config.data.path_name / "adapter"
        asked = with_values(config, model_name=name, adapter_dir=adapter) if adapted else config
        flags = {*result_settings(asked), "results_dir", "trust_remote_code"}
        raise UserError(f"No moments at {path}. Run: {command_line('cache.py', asked, flags)}")
    print(f"No moments at {path}: making them, as the embedded model takes seconds.")


def held_out_path(path: Path, config: Any) -> Path | None:
    """The moments of the other split, None where it has none; those of other settings are left out with a sentence.

    Args:
        path: of the moments.
        config: of cache.py, as these moments have it.
    """
    other = {"train": "test", "test": "train"}.get(path.stem)
    held_out = path.with_stem(other or path.stem)
    if other is None or not held_out.is_file():
        return None
    identity = {name: value for name, value in read_identity(path).items() if name in COMPARED}
    not_compared = ("split", "num_folds", "product_dtype")
    identity["config"] = {name: value for name, value in identity["config"].items() if name not in not_compared}
    if not (how := difference(read_identity(held_out), identity)):
        return held_out
    wanted = with_values(config, split=other, overwrite=True)
    command = command_line("cache.py", wanted, {*result_settings(config), "results_dir", "overwrite"})
    print(f"No held-out numbers: {held_out} was made {how}. Run: {command}")
    return None


def find_scores(path: Path, identity: dict[str, Any], run: Run) -> dict[str, Any] | None:
    """The stored scores at `path`; None where they have to be made, also as their held-out moments have come or gone.

    Args:
        path: of the result of K_sweep.py.
        identity: as for `difference`; its `held_out` is None without held-out moments.
        run: `overwrite` is read.
    """
    held_out = identity["held_out"]
    stored = find_result(path, {name: value for name, value in identity.items() if name != "held_out"}, run)
    if stored and stored["held_out"] != held_out and None in (stored["held_out"], held_out):
        change = "has no held-out numbers yet" if held_out else "has held-out numbers of moments that are gone"
        print(f"{path} {change}: made again.")
        return find_result(path, identity, dataclasses.replace(run, overwrite=True))
    if stored:
        check_identity(stored, identity, path)
    return stored


# ------------------------------------------------------------------ layers
def choose(which: str, layers: Sequence[int]) -> Sequence[int]:
    """The layers that "none", "last" or "all" means."""
    return {"none": [], "last": layers[-1:], "all": layers}[which]


def in_words(layers: Iterable[int]) -> str:
    """The numbers as --layers takes them."""
    return " ".join(map(str, sorted(layers)))


def check_has_layer(metadata: dict, layer: int) -> None:
    """Raises UserError where the moments do not hold a layer."""
    kept = metadata["layers"]
    if layer not in kept:
        raise UserError(
            f"The moments hold layer {in_words(kept)}, not {layer}. Run cache.py with --layers "
            f"{in_words({*kept, layer})}, or without --layers for all of them."
        )


def numbers_of_layers(layers: tuple[int, ...] | None, num_layers: int) -> list[int]:
    """Layers as asked for, negative ones counted from the end, in order and each once; all without any.

    Raises:
        UserError: there is no such layer.
    """
    if layers is None:
        return list(range(num_layers))
    if wrong := [layer for layer in layers if not -num_layers <= layer < num_layers]:
        last = num_layers - 1
        raise UserError(f"There is no layer {wrong[0]}: the model has layers 0 to {last}, or -{num_layers} to -1.")
    return sorted({layer % num_layers for layer in layers})
