"""The moments that cache.py writes, read back one layer at a time, with the settings they were made with."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.algebra.linalg import Noise, rounding
from utils.data.load import LabelledTexts
from utils.models.load import TokenizedTexts
from utils.results import check_identity, difference, open_tensors, read_identity, remedy, result_path
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
        changes = {name: getattr(self, name) * scale for name in ("pooled_mean", "prefix_mean", "next_mean")}
        for name in ("pooled_second_moment", "prefix_second_moment", "prefix_next_cross_moment"):
            changes[name] = getattr(self, name) * both
        changes["pooled_label_cross_moment"] = self.pooled_label_cross_moment * rows
        return dataclasses.replace(self, **changes, **dict.fromkeys(NORMS), rounding=errors)

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


def rounding_statistics(tokens: TokenizedTexts) -> dict[str, float]:
    """Of the token counts T and of the distinct texts: what K_sweep.py needs to tell rounding from rank."""
    lengths = tokens.lengths.astype(float)
    digests = bytearray()  # 16 bytes a text, which no two texts share: a copy of each would be another corpus
    for start, end in itertools.pairwise(tokens.offsets):
        digests += hashlib.blake2b(tokens.token_ids[start:end].tobytes(), digest_size=16).digest()
    _, first = np.unique(np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2), axis=0, return_index=True)
    return {
        "mean_inverse_length": float((1 / lengths).mean()),
        "mean_prefix_tokens": float((lengths * (lengths - 1) / 2).mean()),  # tokens in all prefixes of a text
        "num_distinct_texts": len(first),
        "num_distinct_pairs": int((tokens.lengths[first] - 1).sum()),
    }


def describe(data: LabelledTexts, tokens: TokenizedTexts) -> dict[str, Any]:
    """What is kept beside the moments about the texts they were taken over."""
    return {
        "num_samples": len(tokens.lengths),
        "num_tokens": int(tokens.lengths.sum()),
        "num_pairs": int((tokens.lengths - 1).sum()),
        "num_texts_at_max_length": int((tokens.lengths == tokens.max_length).sum()),
        "max_length": tokens.max_length,
        "rounding": rounding_statistics(tokens),
        "class_counts": None if data.is_regression else np.bincount(data.labels, minlength=data.num_labels).tolist(),
    }


def is_complete(
    path: Path, identity: dict[str, Any], folds: str, save_pooled: str, layers: tuple[int, ...] | None = None
) -> bool:
    """Whether the moments, and the folds and pooled states that are asked for, are there with this identity.

    Args:
        path: of the moments.
        identity: of what is asked for.
        folds: layers whose folds are asked for, "none", "last" or "all".
        save_pooled: layers whose pooled states are asked for, likewise.
        layers: those whose moments are asked for; None: all.

    Raises:
        UserError: moments of another identity are there, or of layers that are not among those asked for.
    """
    if not path.is_file():
        return False
    with open_tensors(path) as (file, metadata):
        check_identity(metadata, identity, path)
        asked, there = numbers_of_layers(layers, metadata["num_layers"]), metadata["layers"]
        num_fold_layers = sum(key.endswith(".fold_pooled_mean") for key in file.keys())  # noqa: SIM118, no dict
    lacking = set(asked) - set(there)
    if lacking and set(there) - set(asked):
        both = " ".join(map(str, sorted({*there, *asked})))
        raise UserError(
            f"{path} has layers {' '.join(map(str, there))}, which would be lost. Keep them with --layers {both}, "
            "replace them with --overwrite, or write elsewhere with --results_dir."
        )
    if lacking or (folds == "last" and there[-1] != asked[-1]):
        return False
    num_layers = len(there)
    if num_fold_layers < {"none": 0, "last": 1, "all": num_layers}[folds]:
        return False
    if save_pooled == "none":
        return True
    if not pooled_path(path).is_file():
        return False
    with open_pooled(path) as (pooled, stored):
        is_all = pooled.get_shape()[0] > 1
        same = all(stored.get(name) == value for name, value in identity.items())
        return same and (is_all or save_pooled == "last")


# ------------------------------------------------------------------ pooled states
@contextlib.contextmanager
def open_pooled(moments: Path) -> Iterator[tuple[Any, dict]]:
    """Yields the pooled states beside a file of moments, (layers, n, d), read as they are sliced, and their metadata.

    Raises:
        UserError: they are damaged.
    """
    path = pooled_path(moments)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            pooled, metadata = file.get_slice("pooled"), json.loads(file.metadata()["json"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}). {remedy(moments)}") from None
        yield pooled, metadata


def load_pooled(moments: Path, layer: int) -> Tensor:
    """Pooled states of one of the layers saved beside a file of moments, (n, d) float32; -1 is the last layer."""
    with open_pooled(moments) as (pooled, _):
        return pooled[layer % pooled.get_shape()[0]]


# ------------------------------------------------------------------ find
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


# ------------------------------------------------------------------ layers
def by_layer(averages: Mapping[str, Tensor | list[Tensor]], layers: list[int]) -> dict[str, Tensor]:
    """Tensors as a file of moments has them: `layer.<k>.<name>`, and those that all layers share by their name.

    Args:
        averages: a list holds one tensor for each of the last of `layers`, at most all.
        layers: numbers of the layers kept.
    """
    tensors = {}
    for name, value in averages.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            numbers = layers[len(layers) - len(value) :]
            tensors |= {f"layer.{layer}.{name}": part for layer, part in zip(numbers, value, strict=True)}
    return tensors


def check_has_layer(metadata: dict, layer: int) -> None:
    """Raises UserError where the moments do not hold a layer."""
    layers = metadata["layers"]
    if layer not in layers:
        raise UserError(
            f"The moments hold layer {', '.join(map(str, layers))}, not {layer}. Run cache.py with --layers "
            f"{' '.join(map(str, sorted({*layers, layer})))}, or without --layers for all of them."
        )


def check_has_every_layer(metadata: dict, who: str) -> None:
    """Raises UserError where the moments do not hold every layer."""
    if len(metadata["layers"]) < metadata["num_layers"]:
        kept = ", ".join(map(str, metadata["layers"]))
        raise UserError(f"{who} needs every layer, the moments hold {kept}. Run cache.py without --layers.")


def numbers_of_layers(layers: tuple[int, ...] | None, num_layers: int) -> list[int]:
    """Layers as asked for, negative ones counted from the end, in order and each once; all without any.

    Raises:
        UserError: there is no such layer.
    """
    if layers is None:
        return list(range(num_layers))
    if wrong := [layer for layer in layers if not -num_layers <= layer < num_layers]:
        raise UserError(f"--layers {wrong[0]}: the model has layers 0 to {num_layers - 1}, or -{num_layers} to -1.")
    return sorted({layer % num_layers for layer in layers})
