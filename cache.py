"""Stream a labelled text dataset through a causal LM and save the second moments of its hidden states, layer by layer.

    python cache.py                                                  # embedded model and data
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

Each layer also has token_square (d,) and the errors of C0 Z and C1 Z for random signs Z: K_sweep.py finds ranks so.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from utils import results
from utils.algebra import moments, products
from utils.algebra.partial import PartialPass, keep_on_host, remaining_batches, remove_partial, resumable_pass
from utils.algebra.products import NUM_SIGNS, CentredProducts, Precision, ProductDtype
from utils.data.load import LabelledTexts, load_splits, load_texts, one_hot_targets
from utils.models import load as models
from utils.models.batches import assign_folds, share_of, token_batches
from utils.models.check import self_check
from utils.models.load import load_base_model
from utils.models.states import input_device, layer_devices, pool, visit_hidden_states
from utils.models.tokens import TokenizedTexts, load_tokens
from utils.parallel import num_started, object_of_first, rank, sum_at_first
from utils.script import UserError, environment, pick_device, run_script
from utils.settings import Data, Model, Placement, Run, Unrecorded, check, result_settings, with_values

TOKENS_PER_BLOCK = 4096  # tokens of a block: it adds up low-precision products, then joins the float64 sums
FOLD_MOMENTS = ("pooled_second_moment", "pooled_label_cross_moment", "pooled_mean")
Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class Output(Unrecorded):
    """Optional parts of the result."""

    save_pooled: Literal["none", "last", "all"] = "none"  # also save the pooled state of each text, at these layers
    folds: Literal["none", "last", "all"] = "last"  # layers that also keep their pooled moments fold by fold
    layers: tuple[int, ...] | None = None  # layers to keep the moments of: 0 the embeddings, -1 the last; None: all
    minutes_per_state: float = 3.0  # time between two saved states of an unfinished pass

    def __post_init__(self) -> None:
        if self.layers == ():
            raise ValueError("--layers needs the number of a layer, such as -1 for the last")
        if self.layers is not None and self.save_pooled != "none":
            raise ValueError("--layers selects moments only: --save_pooled keeps the last layer, or all of them")


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    split: Literal["train", "test", "all"] = "train"  # rows that enter the moments
    pooling: Pooling = "mean"  # pooled state m of a text: mean of its tokens, or its last token
    num_folds: int = 5  # folds with pooled moments of their own, for cross-validation
    product_dtype: ProductDtype = "auto"  # dtype of s_t s_t' and s_t x_{t+1}'; auto: by the number of tokens
    model: Model = Model()
    data: Data = Data()
    output: Output = Output()
    placement: Placement = Placement()
    run: Run = Run()

    def __post_init__(self) -> None:
        check(self, "at least 1", "num_folds")


# ------------------------------------------------------------------ the moments
def prefix_moments(x: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """C0 and C1 of a batch, and s_t and x_{t+1}, each summed (not averaged) over its texts and t = 1..T-1.

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

    m: pooled states (b, d); y: one-hot labels, or regression targets, (b, c); both float64.
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
        self, shape: tuple[int, int, int], device: torch.device, precision: Precision, pooling: Pooling, on_host: bool
    ) -> None:
        """Makes zeros, in main memory if `on_host`; `shape` is (d, c, number of folds), with 1 for no folds."""
        (d, c, self.num_folds), self.precision, self.pooling, self.on_host = shape, precision, pooling, on_host
        self.device = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
        self.products: CentredProducts | None = None  # products of the current block
        self.batches: list[tuple[Tensor, ...]] = []  # its s_T, m, y and fold numbers

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device="cpu" if on_host else self.device)

        no_texts = pooled_moments(zeros(0, d), zeros(0, c))  # zeros of the right shapes
        self.sums = {name: zeros(self.num_folds, *zero.shape) for name, zero in no_texts.items()}
        self.sums |= prefix_moments(zeros(0, 1, d), zeros(0)) | {"total_square": zeros(d)}
        self.sums |= {f"prefix_{name}_error": zeros(d, NUM_SIGNS) for name in ("second", "next")}

    def add(
        self, x: Tensor, lengths: Tensor, weights: Tensor, y: Tensor, folds: Tensor, *, flush: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Adds right-padded states x (b, T, d), labels y (b, c) and folds (b,); returns s_T and m, (b, d) float64."""
        x, lengths, weights, y, folds = (tensor.to(self.device) for tensor in (x, lengths, weights, y, folds))
        if self.precision == "float64":
            x = x.double()
            totals = pool(x, lengths, "mean") * lengths[:, None]  # s_T
            self.add_up(prefix_moments(x, lengths))
        else:
            if not self.products:  # the centre is the mean state of the first batch of a block
                self.products = CentredProducts(pool(x, lengths, "mean").mean(0), self.precision)
            totals = self.products.add(x, lengths, weights)
        m = totals / lengths[:, None] if self.pooling == "mean" else pool(x, lengths, "last").double()
        self.batches.append((totals, m, y, folds))
        if flush or self.on_host:
            self.flush()
        return totals, m

    def add_up(self, values: dict[str, Tensor], *fold: int) -> None:
        """Adds values to the sums of the same names; with a fold, to the sums of that fold."""
        for name, value in values.items():
            self.sums[name][fold].add_(value.to(self.sums[name].device))

    def flush(self) -> None:
        """Adds the low-precision products and the pooled moments of the current block to the sums; ends the block."""
        if self.products:
            self.add_up(self.products.sums())
        totals, m, y, folds = map(torch.cat, zip(*self.batches, strict=True))
        self.add_up({"total_square": totals.square().sum(0)})
        for fold in range(self.num_folds):
            rows = folds == fold if self.num_folds > 1 else slice(None)
            self.add_up(pooled_moments(m[rows], y[rows]), fold)
        self.products, self.batches = None, []

    def averages(self, num_samples: int, fold_sizes: Tensor) -> dict[str, Tensor]:
        """Returns the moments, named as in this file's docstring: sums / n texts, and per fold sums / (f,) sizes."""
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
    """Zero sums by number of each kept layer; `devices[k]` holds the states of layer k. Raises UserError: no memory."""
    precision = products.choose_precision(config.product_dtype, num_tokens, d)
    kept = moments.numbers_of_layers(config.output.layers, len(devices))
    with_folds = moments.choose(config.output.folds, kept)
    shapes = {k: (d, c, config.num_folds if k in with_folds else 1) for k in kept}
    on_meta = [LayerSums(shape, torch.device("meta"), precision, config.pooling, False) for shape in shapes.values()]
    of_block = 0 if precision == "float64" else 12 * d * d  # a block has at most three float32 matrices
    num_bytes = [of_block + sum(tensor.nbytes for tensor in layer.sums.values()) for layer in on_meta]
    on_host = keep_on_host(num_bytes, [devices[k] for k in kept], config.placement.accumulate_on)
    return {k: LayerSums(shapes[k], devices[k], precision, config.pooling, on_host) for k in kept}


def check_finite(found: dict[int, Tensor], rows: np.ndarray, dtype: torch.dtype) -> None:
    """Raises UserError for the first layer and row with non-finite states; `found[layer]` is True if finite, (b,)."""
    finite = torch.stack(list(found.values()))
    if not finite.all():  # read once a batch: a GPU waits for it
        layer, text = (~finite).nonzero()[0].tolist()
        raise UserError(
            f"Non-finite hidden states at layer {list(found)[layer]}, row {rows[text]} of the split ({dtype}). "
            "Half precision overflows on some models: try --dtype float32 or bfloat16."
        )


@torch.inference_mode()
def accumulate(
    model: Any,
    tokens: TokenizedTexts,
    data: LabelledTexts,
    folds: np.ndarray,
    config: Config,
    pooled: np.ndarray | None = None,
    partial: PartialPass | None = None,
) -> dict[str, Tensor]:
    """Runs one pass over n texts, which processes share; returns moments `layer.<k>.<name>` and label means `<name>`.

    Args:
        folds: number of the fold of each text, (n,).
        pooled: (layers saved, n, d), filled in place with the states of the last layers.
        partial: saves and continues the sums of an unfinished pass; None: a killed pass starts anew.
    """
    device, devices = input_device(model), layer_devices(model)
    sums = make_sums(config, devices, int(tokens.lengths.sum()), model.config.hidden_size, data.num_labels)
    batches = token_batches(tokens.lengths, config.run.batch_tokens(device), tokens.rope_limit)
    steps = share_of(batches, tokens.lengths, TOKENS_PER_BLOCK, rank(), num_started())
    tensors = {f"layer.{k}.{name}": total for k, layer in sums.items() for name, total in layer.sums.items()}
    num_tokens = [int(tokens.lengths[rows].sum()) for rows, _ in steps]

    def add_batch(rows: np.ndarray, ends_block: bool) -> None:
        """Adds the texts `rows` to the sums of each layer, and their pooled states to `pooled`."""
        input_ids, lengths = tokens.pad(rows)
        weights, y = products.position_weights(lengths, input_ids.shape[1]), one_hot_targets(data, rows)
        shared = [tensor.to(sums[min(sums)].device) for tensor in (lengths, weights, y, torch.from_numpy(folds[rows]))]
        finite: dict[int, Tensor] = {}

        def add_layer(k: int, x: Tensor) -> None:
            if k in sums:
                totals, m = sums[k].add(x, *shared, flush=ends_block)
                finite[k] = totals.isfinite().all(1).to(device)  # one bad token shows in the sum over all
                if pooled is not None and k >= len(devices) - len(pooled):
                    pooled[k - len(devices), rows] = m.float().cpu().numpy()

        visit_hidden_states(model, input_ids.to(device), add_layer)
        check_finite(finite, rows, model.dtype)

    for number in remaining_batches(partial, tensors, num_tokens, [ends_block for _, ends_block in steps]):
        add_batch(*steps[number])
    sum_at_first(list(tensors.values()))
    averages = moments.label_averages(one_hot_targets(data, folds == fold) for fold in range(config.num_folds))
    tensors.clear()
    for k in list(sums):  # frees the sums of a layer before it makes the next averages
        found = sums.pop(k).averages(len(folds), averages["fold_num_samples"])
        averages |= {f"layer.{k}.{name}": value for name, value in found.items()}
    return averages


# ------------------------------------------------------------------ find or make
def config_path(config: Config) -> Path:
    """The path of a config's moments."""
    return results.result_path("moments", config.run, config.model, config.data) / f"{config.split}.safetensors"


def find_moments(config: Config, splits: tuple[Literal["train", "test", "all"], ...]) -> tuple[Path, Config]:
    """The path of a config's moments, and the config with the settings that you omitted read from that file.

    Makes missing moments of the embedded model. Raises UserError: missing, or of other settings, rows or weights.
    """
    path = config_path(config)
    if not path.is_file():
        moments.require_embedded(config, path)
        data = load_splits(config.data, config.run, "all" if "all" in splits else "both")
        for split in splits:
            ensure(with_values(config, split=split), data[split])
    config, made = results.settings_from_moments(config, path), results.read_stored(path)
    identity: dict[str, Any] = {"config": {}}
    with contextlib.suppress(UserError):  # the moments are enough, without a model on this machine
        identity["model_fingerprint"] = models.model_fingerprint(config.model, config.run)
    if Path(config.data.dataset_name).exists():  # not on the hub: its rows may have changed, or be a copy
        identity["fingerprint"] = load_texts(config.data, config.run, config.split).fingerprint
    results.check_identity(made, identity, path)
    return path, config


def identity_of(config: Config, data: LabelledTexts) -> dict[str, Any]:
    """The identity of the moments of `data`: settings, rows, classes and model."""
    of_model = {"model_fingerprint": models.model_fingerprint(config.model, config.run)}
    of_rows = {"fingerprint": data.fingerprint, "label_names": data.label_names}
    return {"config": result_settings(config), **of_model, **of_rows}


def ensure(config: Config, data: LabelledTexts, anew: bool = False) -> Path:
    """Makes the moments of `data` (and pooled states) unless they are complete or `anew` is set; returns their path."""
    path, identity = config_path(config), identity_of(config, data)
    with results.one_run_at_a_time(path):
        if object_of_first(lambda: not anew and moments.is_complete(path, identity, config)):
            remove_partial(path)  # from a run that died after it wrote the result
            print("reused, already complete with these settings:")
        else:
            results.check_writable(path)
            tokens = load_tokens(data.texts, config.model, config.run)
            folds = assign_folds(data.texts, config.num_folds)
            data = replace(data, texts=[])  # frees the texts
            compute(config, data, tokens, folds, identity)
    print(path)
    return path


def compute(config: Config, data: LabelledTexts, tokens: TokenizedTexts, folds: np.ndarray, identity: dict) -> None:
    """Runs the model over the texts and writes the moments."""
    path, device = config_path(config), pick_device(config.run.device)
    model = load_base_model(config.model, config.run, device, config.placement.device_map)
    self_check(model, tokens, config.model.model_name)
    num_layers, d = model.config.num_hidden_layers + 1, model.config.hidden_size
    output, batch_tokens = replace(config.output, minutes_per_state=0), config.run.batch_tokens(device)
    metadata = {
        **identity,
        **models.stored_as(config.model),
        **moments.describe_texts(tokens.token_ids, tokens.offsets),
        **{"num_texts_cut": tokens.num_cut, "max_length": tokens.max_length},
        **{"num_layers": num_layers, "hidden_size": d, "layers": moments.numbers_of_layers(output.layers, num_layers)},
        "class_counts": None if data.is_regression else np.bincount(data.labels, minlength=data.num_labels).tolist(),
        "environment": environment(),
    }
    run_settings = (output, config.placement, batch_tokens, device.type, num_started(), metadata["environment"])
    partial = PartialPass(path, identity, repr(run_settings), config.output.minutes_per_state)
    num_saved = len(moments.choose(config.output.save_pooled, range(num_layers)))
    with resumable_pass(partial, (num_saved, len(folds), d), config.run.overwrite) as pooled:
        tensors = accumulate(model, tokens, data, folds, config, pooled, partial)
        tensors |= {"labels": torch.as_tensor(data.labels), "folds": torch.from_numpy(folds)}
        if rank() == 0:
            results.save_tensors(path, tensors, metadata | {"pooled_crc32": moments.checksums(pooled)})


def main(config: Config) -> None:
    """Computes and writes the moments, unless they exist."""
    models.load_config(config.model, config.run)  # refuses a wrong name before it reads the data
    ensure(config, load_texts(config.data, config.run, config.split), anew=config.run.overwrite)


if __name__ == "__main__":
    run_script(main, Config, __doc__, share_work=True)
