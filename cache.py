"""Stream a labelled text dataset through a causal LM and save the second moments of its hidden states, layer by layer.

    python cache.py                                                  # embedded model and data
    python cache.py --dataset_name docstrings/kind --split test
    python cache.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion --dtype bfloat16
    python cache.py --dataset_name my_rows.jsonl --text_column body --label_column topic

Writes results/moments/<model>/<dataset>/<split>.safetensors and, with --save_pooled, <split>.pooled.npy.

Symbols: n texts, T tokens of a text, d hidden size, c classes (or regression targets). x_t is the state of a token,
s_t = x_1 + ... + x_t a prefix sum, m the pooled state, y the one-hot label. Layer 0 is the embeddings, the last layer
comes after the final norm. Each layer k has, averaged over texts, in float64, uncentred as in the paper:

    layer.<k>.pooled_second_moment       M   (d, d)   mean of m m'
    layer.<k>.pooled_label_cross_moment  B   (d, c)   mean of m y'
    layer.<k>.prefix_second_moment       C0  (d, d)   mean over texts of the sum over t = 1..T-1 of s_t s_t'
    layer.<k>.prefix_next_cross_moment   C1  (d, d)   mean over texts of the sum over t = 1..T-1 of s_t x_{t+1}'

K_sweep.py tells rounding from rank by the errors of C0 Z and C1 Z for fixed random signs Z, and by token_square (d,).
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from utils import results
from utils.algebra import moments as stored
from utils.algebra.linalg import NUM_PROBES
from utils.algebra.memory import keep_on_host
from utils.algebra.partial import PartialPass, remaining_batches, remove_partial, resumable_pass
from utils.algebra.pooled import checksums
from utils.algebra.products import CentredProducts, Precision, ProductDtype, choose_precision
from utils.data.load import LabelledTexts, load_splits, load_texts, one_hot_targets
from utils.models.batches import assign_folds, share_of, token_batches, token_blocks
from utils.models.check import self_check
from utils.models.load import (
    known_fingerprint,
    load_base_model,
    load_config,
    load_tokenizer,
    model_fingerprint,
    stored_as,
)
from utils.models.states import input_device, layer_devices, pool, visit_hidden_states
from utils.models.tokens import TokenizedTexts, tokenize
from utils.parallel import num_started, object_of_first, rank, sum_at_first
from utils.script import UserError, environment, pick_device, run_script
from utils.settings import Data, Model, Placement, Run, Unrecorded, check, result_settings, with_values

PAIRS_PER_BLOCK = 8192  # so many products are added up in their own precision before they move to float64
FOLD_MOMENTS = ("pooled_second_moment", "pooled_label_cross_moment", "pooled_mean")
WITHOUT_FLOAT64 = ("mps",)  # devices whose states move to the CPU for the sums


@dataclass(frozen=True)
class Output(Unrecorded):
    """Parts of the result that are optional."""

    save_pooled: Literal["none", "last", "all"] = "none"  # also save each text's pooled state, of these layers
    folds: Literal["none", "last", "all"] = "last"  # layers whose pooled moments are also kept fold by fold
    layers: tuple[int, ...] | None = None  # layers whose moments are kept, 0 the embeddings, -1 the last; None: all
    minutes_per_state: float = 3.0  # time between two saved states of an unfinished pass

    def __post_init__(self) -> None:
        if self.layers == ():
            raise ValueError("--layers needs the number of a layer, such as -1 for the last")
        if self.layers is not None and self.save_pooled != "none":
            raise ValueError("--layers is for moments: --save_pooled keeps the last layer, or all of them")


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    split: Literal["train", "test", "all"] = "train"  # rows the moments are taken over
    pooling: Literal["mean", "last"] = "mean"  # pooled state m of a text: mean of its tokens, or its last token
    num_folds: int = 5  # folds whose pooled moments are kept apart for cross-validation
    product_dtype: ProductDtype = "auto"  # of the products s_t s_t' and s_t x_{t+1}'; auto: by the number of tokens
    model: Model = Model()
    data: Data = Data()
    output: Output = Output()
    placement: Placement = Placement()
    run: Run = Run()

    def __post_init__(self) -> None:
        check(self, "at least 1", "num_folds")


# ------------------------------------------------------------------ the moments
def prefix_moments(x: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """C0 and C1 of a batch, and the sums of s_t and x_{t+1}, each summed over its texts and t = 1..T-1.

    Args:
        x: hidden states (b, T, d) float64, right-padded.
        lengths: tokens per text, (b,).
    """
    has_next = torch.arange(1, x.shape[1], device=x.device) < lengths[:, None]
    s = (x.cumsum(1)[:, :-1] * has_next[..., None]).flatten(0, 1)
    following = (x[:, 1:] * has_next[..., None]).flatten(0, 1)
    return {
        "prefix_second_moment": s.T @ s,
        "prefix_next_cross_moment": s.T @ following,
        "prefix_mean": s.sum(0),
        "next_mean": following.sum(0),
    }


def pooled_moments(m: Tensor, y: Tensor) -> dict[str, Tensor]:
    """M and B summed over texts, with the sums of m and, for Ledoit-Wolf shrinkage, of |m|^4 and |m|^2 m.

    Args:
        m: pooled states (b, d) float64.
        y: one-hot labels, or regression targets, (b, c) float64.
    """
    norm_squared = m.square().sum(1)
    return {
        "pooled_second_moment": m.T @ m,
        "pooled_label_cross_moment": m.T @ y,
        "pooled_mean": m.sum(0),
        "pooled_norm_fourth_power": norm_squared.square().sum(),
        "pooled_norm_squared_pooled": norm_squared @ m,
    }


class LayerSums:
    """The sums of one layer over texts, in float64."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        precision: Precision = "float64",
        pooling: Literal["mean", "last"] = "mean",
        on_host: bool = False,
    ) -> None:
        """Zeros, of shape (d, c, f): hidden size, labels, and folds that are kept apart (1: none are).

        The hidden states come from `device`; `on_host` keeps the sums in main memory.
        """
        (d, c, f), self.pooling, self.on_host = shape, pooling, on_host
        self.device = torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device
        self.products = None if precision == "float64" else CentredProducts(d, precision, self.device)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device="cpu" if on_host else self.device)

        no_texts = pooled_moments(zeros(0, d), zeros(0, c))  # zeros of the right shapes
        self.sums = {name: zeros(f, *zero.shape) for name, zero in no_texts.items()}
        self.sums |= prefix_moments(zeros(0, 1, d), zeros(0)) | {"total_square": zeros(d)}
        self.sums |= {f"prefix_{name}_error": zeros(d, NUM_PROBES) for name in ("second", "next")}

    def tensors(self) -> dict[str, Tensor]:
        """All that changes during a pass, by name."""
        return self.sums | (self.products.tensors() if self.products else {})

    def add(self, x: Tensor, lengths: Tensor, y: Tensor, folds: list[slice]) -> tuple[Tensor, Tensor]:
        """Adds the texts of a batch; returns the mean and the pooled state of each, (b, d) float64.

        Args:
            x: hidden states (b, T, d), right-padded.
            lengths: tokens per text, (b,).
            y: labels (b, c) float64.
            folds: the texts of each fold.
        """
        x, lengths, y = (tensor.to(self.device) for tensor in (x, lengths, y))
        if self.products:
            totals = self.products.add(x, lengths)  # s_T
        else:
            x = x.double()
            totals = pool(x, lengths, "mean") * lengths[:, None]
            self.add_up(prefix_moments(x, lengths))
        self.add_up({"total_square": totals.square().sum(0)})
        mean = totals / lengths[:, None]
        m = mean if self.pooling == "mean" else pool(x, lengths, "last").double()
        for fold, texts in enumerate(folds if len(self.sums["pooled_mean"]) > 1 else [slice(None)]):
            self.add_up(pooled_moments(m[texts], y[texts]), fold)
        if self.on_host:
            self.end_block()
        return mean, m

    def add_up(self, values: dict[str, Tensor], *fold: int) -> None:
        """Adds values to the sums of these names, of a fold where one is given."""
        for name, value in values.items():
            self.sums[name][fold].add_(value.to(self.sums[name].device))

    def end_block(self) -> None:
        """Moves the products of lower precision to the float64 sums."""
        if self.products:
            self.add_up(self.products.flush())

    def averages(self, num_samples: int, fold_sizes: Tensor) -> dict[str, Tensor]:
        """The moments, by the names in the docstring of this file, of n texts, (f,) of them in each fold."""
        found: dict[str, Tensor] = {}
        for name, total in self.sums.items():
            found[name] = (total.sum(0) if name.startswith("pooled_") else total) / num_samples
            if name in FOLD_MOMENTS and len(total) > 1:
                sizes = fold_sizes.to(total).clamp(min=1)
                found[f"fold_{name}"] = total / sizes.view(-1, *[1] * (total.ndim - 1))
        # s_{t+1}^2 - s_t^2 = 2 s_t x_{t+1} + x_{t+1}^2: the squares of the tokens without a pass over them
        found["token_square"] = found.pop("total_square") - 2 * found["prefix_next_cross_moment"].diagonal()
        return found


# ------------------------------------------------------------------ the pass
def make_sums(config: Config, devices: list[torch.device], num_tokens: int, d: int, c: int) -> dict[int, LayerSums]:
    """Zeros for each layer k that is kept, of whose hidden states `devices[k]` is the device.

    Raises:
        UserError: the sums do not fit the free memory, or there is no such layer.
    """
    precision = choose_precision(config.product_dtype, num_tokens, d)
    kept = stored.numbers_of_layers(config.output.layers, len(devices))
    with_folds = stored.choose(config.output.folds, kept)
    shapes = {k: (d, c, config.num_folds if k in with_folds else 1) for k in kept}
    on_meta = (LayerSums(shape, torch.device("meta"), precision) for shape in shapes.values())  # takes no memory
    num_bytes = [sum(tensor.nbytes for tensor in sums.tensors().values()) for sums in on_meta]
    on_host = keep_on_host(num_bytes, [devices[k] for k in kept], config.placement.accumulate_on)
    return {k: LayerSums(shapes[k], devices[k], precision, config.pooling, on_host) for k in kept}


@torch.inference_mode()
def accumulate(
    model: PreTrainedModel,
    tokens: TokenizedTexts,
    data: LabelledTexts,
    folds: np.ndarray,
    config: Config,
    pooled: np.ndarray | None = None,
    partial: PartialPass | None = None,
) -> dict[str, Tensor]:
    """The moments of n texts by one pass: `layer.<k>.<name>` and, of labels, `<name>`; processes share the texts.

    Args:
        model: base model without lm_head; one layer's states are alive at a time.
        tokens, data, folds: the texts, their labels, and the number of the fold of each, (n,).
        config: pooling, num_folds, product_dtype, tokens_per_batch, layers, folds, accumulate_on are read.
        pooled: (layers saved, n, d), filled in place; holds the last layers, at most all.
        partial: the sums of an unfinished pass; None: the pass cannot be continued.

    Raises:
        UserError: a state is not finite, naming layer and text.
    """
    device, devices = input_device(model), layer_devices(model)
    sums = make_sums(config, devices, int(tokens.lengths.sum()), model.config.hidden_size, data.num_labels)
    tensors = {f"layer.{k}.{name}": value for k in sums for name, value in sums[k].tensors().items()}

    def add_batch(rows: np.ndarray) -> None:
        rows = rows[np.argsort(folds[rows], kind="stable")]  # so that the texts of a fold are neighbours
        ends = np.searchsorted(folds[rows], np.arange(config.num_folds + 1)).tolist()
        fold_texts = [slice(start, end) for start, end in itertools.pairwise(ends)]
        input_ids, lengths = (tensor.to(device) for tensor in tokens.pad(rows))
        targets = one_hot_targets(data, rows).to(device)
        finite: dict[int, Tensor] = {}

        def add_layer(layer: int, x: Tensor) -> None:
            if layer in sums:
                mean, m = sums[layer].add(x, lengths, targets, fold_texts)
                finite[layer] = mean.isfinite().all(1).to(device)  # a mean over all tokens shows any of them
                if pooled is not None and layer >= len(devices) - len(pooled):
                    pooled[layer - len(devices), rows] = m.float().cpu().numpy()

        visit_hidden_states(model, input_ids, add_layer)
        if not (all_finite := torch.stack(list(finite.values()))).all():  # read once a batch: a GPU waits for it
            at, text = (~all_finite).nonzero()[0].tolist()
            raise UserError(
                f"Non-finite hidden states at layer {list(finite)[at]}, row {rows[text]} of the split "
                f"({model.dtype}). Half precision overflows on some models: try --dtype float32 or bfloat16."
            )

    batches = token_batches(tokens.lengths, config.run.batch_tokens(device), tokens.rope_limit)
    blocks = token_blocks(batches, tokens.lengths, PAIRS_PER_BLOCK)
    steps = share_of(blocks, tokens.lengths, rank(), num_started())
    num_tokens = [int(tokens.lengths[rows].sum()) for rows, _ in steps]
    for number in remaining_batches(partial, tensors, num_tokens):
        rows, ends_block = steps[number]
        add_batch(rows)
        if ends_block:
            for layer in sums.values():
                layer.end_block()
    sum_at_first([total for layer in sums.values() for total in layer.sums.values()])
    averages = stored.label_averages(one_hot_targets(data, folds == fold) for fold in range(config.num_folds))
    tensors.clear()
    for k in list(sums):  # the sums of a layer go before the moments of the next are made
        found = sums.pop(k).averages(len(folds), averages["fold_num_samples"])
        averages |= {f"layer.{k}.{name}": value for name, value in found.items()}
    return averages


# ------------------------------------------------------------------ find or make
def config_path(config: Config) -> Path:
    """The file of the moments of a config."""
    return stored.moments_path(config.run, config.model, config.data, config.split)


def find_moments(config: Config, splits: tuple[Literal["train", "test", "all"], ...]) -> tuple[Path, Config]:
    """The moments of a config, and the config with the settings that it leaves at their default read from them.

    Raises:
        UserError: no moments (those of the embedded model are made), of another setting, or of other weights.
    """
    path = config_path(config)
    if not path.is_file():
        stored.check_embedded(config, path)
        data = load_splits(config.data, config.run, "all" if "all" in splits else "both")
        for split in splits:
            ensure(with_values(config, split=split), data[split])
    config = results.settings_from_moments(config, path)
    if fingerprint := known_fingerprint(config.model, config.run):
        results.check_identity(results.read_identity(path), {"config": {}, "model_fingerprint": fingerprint}, path)
    return path, config


def identity_of(config: Config, data: LabelledTexts) -> dict[str, Any]:
    """The settings, rows, classes and model that tell moments of one path apart."""
    return {
        "config": result_settings(config),
        "model_fingerprint": model_fingerprint(config.model, config.run),
        "fingerprint": data.fingerprint,
        "label_names": data.label_names,
    }


def ensure(config: Config, data: LabelledTexts, anew: bool = False) -> Path:
    """The moments of `data`, with the pooled states beside them if asked for; made where they are missing, or `anew`.

    Raises:
        UserError: moments of another identity, without --overwrite; or of `compute`.
    """
    path = config_path(config)
    identity = identity_of(config, data)

    def is_current() -> bool:
        current = not anew and stored.is_complete(path, identity, config.output, config.run.overwrite)
        if current:
            remove_partial(path)  # of a run that was killed with the result written
        return current

    with results.one_run_at_a_time(path):
        if object_of_first(is_current):
            print("reused, already complete with these settings:")
        else:
            compute(config, data, identity)
    print(path)
    return path


def compute(config: Config, data: LabelledTexts, identity: dict[str, Any]) -> None:
    """Runs the model over the texts and writes the moments."""
    path, device = config_path(config), pick_device(config.run.device)
    results.check_writable(path)
    model_config = load_config(config.model, config.run)
    tokenizer = load_tokenizer(config.model, config.run, model_config)
    tokens = tokenize(data.texts, tokenizer, model_config, config.model.max_length)
    folds = assign_folds(data.texts, config.num_folds)
    model = load_base_model(config.model, config.run, device, config.placement.device_map)
    self_check(model, tokens, config.model.model_name)
    num_layers, d = model.config.num_hidden_layers + 1, model.config.hidden_size
    num_saved = len(stored.choose(config.output.save_pooled, range(num_layers)))
    metadata = {
        **identity,
        **stored_as(config.model),
        **stored.describe_texts(tokens.token_ids, tokens.offsets),
        "num_texts_cut": tokens.num_cut,
        "max_length": tokens.max_length,
        "class_counts": None if data.is_regression else np.bincount(data.labels, minlength=data.num_labels).tolist(),
        "num_layers": num_layers,
        "layers": stored.numbers_of_layers(config.output.layers, num_layers),
        "hidden_size": d,
        "environment": environment(),
    }
    run_settings = {
        "output": repr(replace(config.output, minutes_per_state=0)),
        "placement": repr(config.placement),
        "tokens_per_batch": config.run.batch_tokens(device),
        "device": device.type,
        "num_processes": num_started(),
        "environment": metadata["environment"],
    }
    partial = PartialPass(path, identity, run_settings, config.output.minutes_per_state)
    shape = (num_saved, len(folds), d) if num_saved else None
    with resumable_pass(partial, shape, config.run.overwrite) as pooled:
        tensors = accumulate(model, tokens, data, folds, config, pooled, partial)
        tensors |= {"labels": torch.as_tensor(data.labels), "folds": torch.from_numpy(folds)}
        if rank() == 0:
            metadata["pooled_crc32"] = checksums(pooled) if num_saved else []
            results.save_tensors(path, tensors, metadata)


def main(config: Config) -> None:
    """Computes and writes the moments, unless they are there already."""
    load_config(config.model, config.run)  # its name is wrong or right before the data are read
    ensure(config, load_texts(config.data, config.run, config.split), anew=config.run.overwrite)


if __name__ == "__main__":
    run_script(main, Config, __doc__, share_work=True)
