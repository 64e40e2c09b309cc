"""Stream a labelled text dataset through a causal LM and save the second moments of its hidden states, layer by layer.

    python cache.py                                                  # embedded model and data
    python cache.py --dataset_name docstrings/kind --split test
    python cache.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion --dtype bfloat16
    python cache.py --dataset_name my_rows.jsonl --text_column body --label_column topic

Reads the dataset and the model.
Writes results/moments/<model>/<dataset>/<split>.safetensors and, with --save_pooled, <split>.pooled.safetensors.

Symbols: n texts, t tokens, d hidden size, c classes (or regression targets), l = layers + 1. x_t is the state of a
token, s_t = x_1 + ... + x_t a prefix sum, m the pooled state, y the one-hot label. Layer 0 is the embeddings, the
last layer comes after the final norm. Everything is an average over texts, in float64, uncentred as in the paper:

    pooled_second_moment       M   (l, d, d)   mean of m m'
    pooled_label_cross_moment  B   (l, d, c)   mean of m y'
    prefix_second_moment       C0  (l, d, d)   mean over texts of the sum over t = 1..T-1 of s_t s_t'
    prefix_next_cross_moment   C1  (l, d, d)   mean over texts of the sum over t = 1..T-1 of s_t x_{t+1}'

Beside them is what tells rounding from rank: the errors of C0 Z and C1 Z that float32 products leave, for a few
fixed random signs Z, and token_square (l, d), the mean over texts of the sum over t = 1..T of x_t^2.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import functools
import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from utils.batches import Batch, assign_folds, one_hot_targets, share_of, token_batches, token_steps
from utils.data import LabelledTexts, load_splits, load_texts
from utils.distributed import processes
from utils.hidden_states import input_device, layer_devices, pool, visit_hidden_states
from utils.host_sums import HostSums
from utils.identity import load_config, model_fingerprint, stored_as
from utils.io import FORMAT_VERSION, UserError, check_writable, environment, pick_device, run_script, save_tensors
from utils.linalg import NUM_PROBES, noise_probes
from utils.memory import Need, batch_bytes, check_fits, keep_on_host, matrix_bytes, num_parameters
from utils.models import TokenizedTexts, load_base_model, load_tokenizer, tokenize
from utils.moments import (
    check_embedded,
    describe,
    is_complete,
    moments_path,
    numbers_of_layers,
    pooled_path,
    settings_as_stored,
    settings_found,
)
from utils.self_check import self_check
from utils.settings import (
    Data,
    Model,
    Placement,
    Run,
    Unrecorded,
    all_settings,
    check_at_least_one,
    result_settings,
    with_values,
)
from utils.unfinished import PooledFile, Unfinished, check_states, remove_states, run_steps, states_beside


@dataclass(frozen=True)
class Output(Unrecorded):
    """What is written beside the moments."""

    save_pooled: Literal["none", "last", "all"] = "none"  # also save each text's pooled state, of these layers
    folds: Literal["none", "last", "all"] = "last"  # layers whose pooled moments are also kept fold by fold
    layers: tuple[int, ...] | None = None  # layers whose moments are kept, 0 the embeddings, -1 the last; None: all
    minutes_per_state: float = 3.0  # time between two saved states of an unfinished pass

    def __post_init__(self) -> None:
        if self.layers is not None and self.save_pooled != "none":
            raise ValueError("--layers is for moments: --save_pooled keeps the last layer, or all of them")


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    split: Literal["train", "test", "all"] = "train"  # rows the moments are taken over
    pooling: Literal["mean", "last"] = "mean"  # pooled state m of a text: mean of its tokens, or its last token
    num_folds: int = 5  # folds whose pooled moments are kept apart for cross-validation
    product_dtype: Literal["auto", "float32", "float64"] = "auto"  # of products; auto: by the number of tokens
    model: Model = Model()
    data: Data = Data()
    output: Output = Output()
    placement: Placement = Placement()
    run: Run = Run()

    def __post_init__(self) -> None:
        check_at_least_one(self, "num_folds")


PAIRS_PER_BLOCK = 8192  # so many products are added up in their own dtype, as in one large batch
CHANGING_STATES = ("layers", "folds", "save_pooled", "accumulate_on", "device_map")  # besides what identifies a result
LARGE = ("products", "pooled_second_moment", "fold_pooled_second_moment")  # sums that can be in the host's memory
NUM_STRIPES = 3  # of rows of the products; what of C0 lies left of a stripe's diagonal block is not computed


# ------------------------------------------------------------------ moments
@dataclass(frozen=True)
class Prefixes:
    """The pairs (t, t+1) of a batch around a centre c: with x_t = a_t + c and s_t = q_t + t c, q and a alone.

    Only these are multiplied in the dtype of the products; what the centre adds is exact, and due once at the end.
    float32 then rounds relative to the spread of the states and not to their mean. The prefix sums themselves are
    float64: added up in float32 they cost ten times the precision of the products.
    """

    pairs: Tensor  # (pairs, 2d), [q_t ; a_{t+1}] in the dtype of the products; zeros for padding
    exact: Tensor  # (d, 2p), the two halves of the products times the probes Z, by thin float64 products
    sums: dict[str, Tensor]  # q, tq, a, ta: sums over the pairs of q_t, t q_t, a_{t+1}, t a_{t+1}, (d,) float64
    totals: Tensor  # (b, d), s_T of each text, of one token too


def centred_prefixes(
    hidden_states: Tensor, lengths: Tensor, centre: Tensor, probes: Tensor, dtype: torch.dtype
) -> Prefixes:
    """The prefix sums of a batch. What a product with Z should be is had cheaply: a_{t+1}' Z is the step of q_t' Z.

    Args:
        hidden_states: (b, t, d), right-padded, in the dtype of the model.
        lengths: tokens per text, (b,).
        centre: any vector near the mean state, (d,), float64; the moments do not depend on it.
        probes: Z, (d, p).
        dtype: of the products.
    """
    batch, num_tokens, d = hidden_states.shape
    position = torch.arange(1, num_tokens, device=lengths.device)
    has_next = position < lengths[:, None]
    t = has_next * position  # (b, T - 1), 0 on padding
    prefix = hidden_states - centre  # a_t for now, float64
    first = prefix[:, 0].clone()
    pairs = prefix.new_empty(batch, num_tokens - 1, 2 * d, dtype=dtype)
    pairs[..., d:] = prefix[:, 1:]
    prefix.cumsum_(1)
    pairs[..., :d] = prefix[:, :-1]
    pairs *= has_next[..., None]  # padding off, on both sides
    along = prefix @ probes  # q_t' Z
    weights = torch.cat([along[:, :-1], along.diff(dim=1), torch.ones_like(t)[..., None], t[..., None]], dim=-1)
    weights = torch.nn.functional.pad(weights * has_next[..., None], (0, 0, 0, 1))  # the last position has no next
    thin = prefix.flatten(0, 1).T @ weights.flatten(0, 1)
    totals = prefix[torch.arange(batch, device=lengths.device), lengths - 1]  # q_T
    sums = {"q": thin[:, -2], "tq": thin[:, -1], "a": (lengths > 1).double() @ (totals - first)}
    sums["ta"] = (lengths - 1).double() @ totals - sums["q"]  # summation by parts
    return Prefixes(pairs.flatten(0, 1), thin[:, :-2], sums, totals + lengths[:, None] * centre)


def choose_product_dtype(config: "Config", num_tokens: int, hidden_size: int) -> torch.dtype:
    """The dtype of the products: with `auto` float64 for few tokens.

    Few tokens span few directions, and the errors of float32 have not averaged out; there float64 costs seconds. It
    would cost a fifth of a long pass, where float32 errors are smaller and are measured.
    """
    few = num_tokens <= max(2**14, 32 * hidden_size)
    dtype = ("float64" if few else "float32") if config.product_dtype == "auto" else config.product_dtype
    return getattr(torch, dtype)


@dataclass(frozen=True)
class Sizes:
    """Of the sums."""

    num_layers: int
    hidden_size: int
    num_labels: int
    num_folds: int
    num_fold_layers: int  # the last layers, which keep their folds

    @property
    def of_layer(self) -> dict[str, tuple[int, ...]]:
        """What each layer has, by the symbols of the module docstring."""
        d, c = self.hidden_size, self.num_labels
        return {
            "pooled_second_moment": (d, d),
            "pooled_label_cross_moment": (d, c),
            "pooled_mean": (d,),
            "pooled_norm_fourth_power": (),  # |m|^4, for Ledoit-Wolf shrinkage
            "pooled_norm_squared_pooled": (d,),  # |m|^2 m, likewise
            "products": (d, 2 * d),  # of [q_t ; a_{t+1}]
            "errors": (d, 2 * NUM_PROBES),
            "exact": (d, 2 * NUM_PROBES),  # of the products of the current block
            **{name: (d,) for name in ("q", "tq", "a", "ta", "total_square")},
        }

    @property
    def of_fold_layer(self) -> dict[str, tuple[int, ...]]:
        """What each of the last layers has besides."""
        d, c, f = self.hidden_size, self.num_labels, self.num_folds
        return {
            "fold_pooled_second_moment": (f, d, d),
            "fold_pooled_label_cross_moment": (f, d, c),
            "fold_pooled_mean": (f, d),
        }

    @property
    def num_numbers(self) -> int:
        """Numbers in all sums."""
        parts = (self.of_layer, self.of_fold_layer, self.of_labels)
        whole, folds, labels = (sum(map(math.prod, of.values())) for of in parts)
        return self.num_layers * whole + self.num_fold_layers * folds + labels

    @property
    def of_labels(self) -> dict[str, tuple[int, ...]]:
        """What all layers share."""
        c, f = self.num_labels, self.num_folds
        return {"fold_label_mean": (f, c), "fold_label_second_moment": (f, c, c), "fold_num_samples": (f,)}


def num_fold_layers(config: Config, num_layers: int) -> int:
    """How many of the layers keep their folds."""
    return {"all": num_layers, "last": 1, "none": 0}[config.output.folds]


class MomentSums:
    """Running sums over texts, layer by layer; `averages` adds what the centres are due and divides by their number.

    Products of a batch are added up in place, in their own dtype, and in float64 at the end of a block of batches.
    """

    def __init__(
        self,
        sizes: Sizes,
        lengths: np.ndarray,
        devices: list[torch.device],
        product_dtype: torch.dtype,
        on_host: bool = False,
    ):
        """Zeros.

        Args:
            sizes: of the sums.
            lengths: tokens of all texts, (n,), whatever process adds them.
            devices: of the states of each layer.
            product_dtype: of the products.
            on_host: large sums are in the host's memory, and products of a batch are added to them at once.
        """
        d, self.first_fold_layer = sizes.hidden_size, sizes.num_layers - sizes.num_fold_layers
        self.host = HostSums() if on_host else None
        self.sums: dict[str, list[Tensor]] = {}
        for name, shape in (sizes.of_layer | sizes.of_fold_layer).items():
            of = devices[self.first_fold_layer :] if name in sizes.of_fold_layer else devices
            places = ["cpu"] * len(of) if on_host and name in LARGE else of
            self.sums[name] = [torch.zeros(shape, dtype=torch.float64, device=place) for place in places]
        self.labels = {
            name: torch.zeros(shape, dtype=torch.float64, device=devices[0]) for name, shape in sizes.of_labels.items()
        }
        self.product_dtype = product_dtype
        self.block = [torch.zeros((d, 2 * d), dtype=product_dtype, device=device) for device in devices if not on_host]
        self.centres = [torch.zeros(d, dtype=torch.float64, device=device) for device in devices]
        step = -(-d // NUM_STRIPES)
        self.stripes = [slice(start, min(start + step, d)) for start in range(0, d, step)]
        self.probes = {device: noise_probes(d).to(device) for device in set(devices)}
        self.is_centred = False  # on the mean states of the first batch
        n = lengths.astype(np.int64) - 1  # pairs of each text; t runs over 1..n
        self.num_pairs, self.t_sum = int(n.sum()), int((n * (n + 1) // 2).sum())
        self.t_squared_sum = int((n * (n + 1) * (2 * n + 1) // 6).sum())

    def tensors(self) -> dict[str, Tensor | list[Tensor]]:
        """Everything that changes during a pass, by name."""
        return {**self.sums, **self.labels, "centres": self.centres, "block": self.block}

    def clear(self) -> None:
        """Back to the start of a pass, but for the centres."""
        for tensor in (*itertools.chain.from_iterable(self.sums.values()), *self.labels.values(), *self.block):
            tensor.zero_()

    def add_labels(self, batch: "Batch") -> None:
        """Adds what is the same at every layer: labels and folds of a batch; after its layers."""
        self.labels["fold_label_mean"] += batch.folds.T @ batch.targets
        second_moment = torch.einsum("bf,bc,be->fce", batch.folds, batch.targets, batch.targets)
        self.labels["fold_label_second_moment"] += second_moment
        self.labels["fold_num_samples"] += batch.folds.sum(0)
        self.is_centred = True

    def add_tokens(self, layer: int, hidden_states: Tensor, lengths: Tensor) -> Tensor:
        """Adds one layer's states (b, t, d) of a batch; returns the mean state of each text, (b, d) float64."""
        if not self.is_centred:
            self.centres[layer].copy_(pool(hidden_states.double(), lengths, "mean").mean(0))
        probes, d = self.probes[hidden_states.device], hidden_states.shape[2]
        added = centred_prefixes(hidden_states, lengths, self.centres[layer], probes, self.product_dtype)
        block = self.block[layer] if self.block else added.pairs.new_zeros(d, 2 * d)
        for stripe in self.stripes:  # C0 is symmetric
            block[stripe, stripe.start :].addmm_(added.pairs[:, stripe].T, added.pairs[:, stripe.start :])
        self.sums["exact"][layer] += added.exact
        if not self.block:
            self.add_products(layer, block)
        for name, value in added.sums.items():
            self.sums[name][layer] += value
        self.sums["total_square"][layer] += added.totals.square().sum(0)
        return added.totals / lengths[:, None]

    def add_products(self, layer: int, products: Tensor) -> None:
        """Moves products into float64, and what their dtype has cost into the errors."""
        second = products[:, : len(products)]
        second.copy_(second.triu() + second.triu(1).T)
        halves = [half @ self.probes[products.device] for half in products.double().chunk(2, dim=1)]
        self.sums["errors"][layer] += torch.cat(halves, dim=1) - self.sums["exact"][layer]
        self.sums["exact"][layer].zero_()
        if self.host:
            self.host.add(self.sums["products"][layer], products)
        else:
            self.sums["products"][layer] += products

    def add_square(self, name: str, layer: int, rows: Tensor, *fold: int) -> None:
        """Adds X'X of rows X (b, d) to a large sum."""
        if self.host:
            self.host.add(self.sums[name][layer][fold], rows.T @ rows)
        else:
            self.sums[name][layer][fold].addmm_(rows.T, rows)

    def end_block(self) -> None:
        """Adds what has come together in the dtype of the products."""
        for layer, products in enumerate(self.block):
            self.add_products(layer, products)
            products.zero_()

    def settle(self) -> None:
        """Returns when the sums hold all that was added."""
        if self.host:
            self.host.wait()

    def add_pooled(self, layer: int, pooled: Tensor, batch: "Batch") -> None:
        """Adds one layer's pooled states of a batch, (b, d) float64."""
        sums, at = self.sums, layer - self.first_fold_layer
        norm_squared = pooled.square().sum(1)
        sums["pooled_norm_fourth_power"][layer] += norm_squared.square().sum()
        sums["pooled_norm_squared_pooled"][layer] += norm_squared @ pooled
        sums["pooled_mean"][layer] += pooled.sum(0)
        if at < 0:
            self.add_square("pooled_second_moment", layer, pooled)
            sums["pooled_label_cross_moment"][layer].addmm_(pooled.T, batch.targets)
            return
        sums["fold_pooled_mean"][at] += batch.folds.T @ pooled
        for fold, rows in enumerate(batch.rows_of_folds):
            self.add_square("fold_pooled_second_moment", at, pooled[rows], fold)
            sums["fold_pooled_label_cross_moment"][at][fold].addmm_(pooled[rows].T, batch.targets[rows])

    def prefix_moments(self, layer: int) -> dict[str, Tensor]:
        """C0, C1, their means and errors, summed over texts, with what the centre adds; once, at the end."""
        q, tq, a, ta = (self.sums[name][layer] for name in ("q", "tq", "a", "ta"))
        mu = self.centres[layer]
        second, following = self.sums["products"][layer].chunk(2, dim=1)
        # in place: nothing else of this size is needed
        second.addr_(tq, mu).addr_(mu, tq + self.t_squared_sum * mu)
        second.copy_((second + second.T) / 2)  # symmetric only up to rounding
        following.addr_(q, mu).addr_(mu, ta + self.t_sum * mu)
        second_error, next_error = self.sums["errors"][layer].chunk(2, dim=1)
        return {
            "prefix_second_moment": second,
            "prefix_next_cross_moment": following,
            "prefix_mean": q + self.t_sum * mu,
            "next_mean": a + self.num_pairs * mu,
            "prefix_second_error": second_error,
            "prefix_next_error": next_error,
            # s_{t+1}^2 - s_t^2 = 2 s_t x_{t+1} + x_{t+1}^2: the squares of the tokens without a pass over them
            "token_square": self.sums["total_square"][layer] - 2 * following.diagonal(),
        }

    def averages(self) -> dict[str, Tensor | list[Tensor]]:
        """Averages over texts, of each fold and, without `fold_`, of all folds together; once, at the end.

        What there is of each layer is a list over layers.
        """
        averages: dict[str, Tensor | list[Tensor]] = {}
        counts = self.labels["fold_num_samples"]
        num_samples = counts.sum().item()
        for name in ("pooled_second_moment", "pooled_label_cross_moment"):
            for at, of_folds in enumerate(self.sums[f"fold_{name}"]):
                self.sums[name][self.first_fold_layer + at] = of_folds.sum(0)
        for name in [name for name in self.sums if name.startswith("pooled_")]:
            averages[name] = [total.div_(num_samples) for total in self.sums[name]]
        of_layers = [self.prefix_moments(layer) for layer in range(len(self.centres))]
        for name in of_layers[0]:
            averages[name] = [moments[name].div_(num_samples) for moments in of_layers]
        for name in ("label_mean", "label_second_moment"):
            averages[name] = self.labels[f"fold_{name}"].sum(0) / num_samples

        def per_fold(total: Tensor) -> Tensor:
            return total.div_(counts.to(total.device).clamp(min=1).view(-1, *[1] * (total.ndim - 1)))

        averages["fold_num_samples"] = counts
        averages |= {name: per_fold(total) for name, total in self.labels.items() if name != "fold_num_samples"}
        for name in ("pooled_second_moment", "pooled_label_cross_moment", "pooled_mean"):
            of_layers_folds = [per_fold(total) for total in self.sums[f"fold_{name}"]]
            averages[f"fold_{name}"] = of_layers_folds or counts.new_zeros(0, len(counts), *self.sums[name][0].shape)
        return averages


# ------------------------------------------------------------------ the pass
def accumulate_moments(
    model: PreTrainedModel,
    tokens: TokenizedTexts,
    targets: Tensor,
    folds: Tensor,
    config: Config,
    pooled_file: np.memmap | None = None,
    unfinished: Callable[[int], Unfinished] | None = None,
    advance: Callable[[float], object] | None = None,
) -> MomentSums:
    """One pass over the texts, every layer at once; only one layer's states are alive at a time.

    Many processes take a share each; the sums of all are those of the first process at the end.

    Args:
        model: base model without lm_head.
        tokens: n texts.
        targets: (n, c) float64.
        folds: (n, f) float64, one-hot.
        config: pooling, product_dtype, tokens_per_batch, layers, folds and accumulate_on ("cpu" or not) are read.
        pooled_file: (layers saved, n, d), filled in place; holds the last layers, at most all.
        unfinished: gives the state on disk of a pass of so many steps; None: none is kept.
        advance: told the share of the tokens in each batch, instead of a progress bar.

    Raises:
        UserError: a non-finite state, naming layer and text.
    """
    device, devices, team = input_device(model), layer_devices(model), processes()
    kept = numbers_of_layers(config.output.layers, len(devices))
    of_folds = num_fold_layers(config, len(kept))
    sizes = Sizes(len(kept), model.config.hidden_size, targets.shape[1], folds.shape[1], of_folds)
    product_dtype = choose_product_dtype(config, int(tokens.lengths.sum()), sizes.hidden_size)
    on_host = config.placement.accumulate_on == "cpu"
    sums = MomentSums(sizes, tokens.lengths, [devices[layer] for layer in kept], product_dtype, on_host)
    first_saved = len(devices) - len(pooled_file) if pooled_file is not None else len(devices)
    finite: list[Tensor] = []  # of the current batch, (b,) a layer

    def add_layer(batch: Batch, layer: int, hidden_states: Tensor) -> None:
        if layer not in kept:
            return
        at, batch = kept.index(layer), batch.on(hidden_states.device)
        mean = sums.add_tokens(at, hidden_states, batch.lengths)
        pooled = mean if config.pooling == "mean" else pool(hidden_states, batch.lengths, "last").double()
        finite.append(mean.isfinite().all(1).to(device))  # a sum over all tokens shows any of them; read once a batch
        sums.add_pooled(at, pooled, batch)
        if pooled_file is not None and layer >= first_saved:
            pooled_file[layer - first_saved, batch.rows] = pooled.float().cpu().numpy()

    def add_batch(rows: np.ndarray) -> None:
        input_ids, lengths = (tensor.to(device) for tensor in tokens.pad(rows))
        finite.clear()
        batch = Batch(rows, lengths, targets[rows].to(device), folds[rows].to(device))
        visit_hidden_states(model, input_ids, functools.partial(add_layer, batch))
        sums.add_labels(batch.on(devices[kept[0]]))
        if not (all_finite := torch.stack(finite)).all():
            at, text = (~all_finite).nonzero()[0].tolist()
            raise UserError(
                f"Non-finite hidden states at layer {kept[at]}, row {rows[text]} of the split ({config.model.dtype}). "
                "Half precision overflows on some models: try --dtype float32 or bfloat16."
            )

    blocks = token_steps(tokens.lengths, config.run.batch_tokens(device), PAIRS_PER_BLOCK)
    run_steps(
        share_of(blocks, tokens.lengths, team.rank, team.size), tokens.lengths, sums, add_batch, unfinished, advance
    )
    team.sum_at_first([*itertools.chain.from_iterable(sums.sums.values()), *sums.labels.values()])
    return sums


# ------------------------------------------------------------------ find or make
def config_path(config: Config) -> Path:
    """Where the moments of a config go."""
    return moments_path(config.run, config.model, config.data, config.split)


def as_stored(config: Config, free: Collection[str]) -> Config:
    """The config with the settings in `free` as the moments at its place have them, if there are any."""
    return settings_as_stored(config, config_path(config), free)


def find_moments(config: Config, splits: tuple[Literal["train", "test", "all"], ...]) -> tuple[Path, Config]:
    """The moments of a config, and the config as they have it: what it leaves at its default is as it is stored.

    Those of the embedded model are made, of each of `splits`, if they are not there.

    Raises:
        UserError: no moments, naming the command that makes them; or of other settings, or of another model.
    """
    path = config_path(config)
    if not path.is_file():
        check_embedded(config, path)
        data = load_splits(config.data, config.run, "all" if "all" in splits else "both")
        for split in splits:
            ensure(with_values(config, split=split), data[split])
    return path, settings_found(config, path)


def ensure(
    config: Config,
    data: LabelledTexts,
    free: Collection[str] = (),
    renew: bool = False,
    advance: Callable[[float], object] | None = None,
) -> Path:
    """The moments of `data`, with the pooled states beside them if asked for; made where they are not there.

    Args:
        config: what does not fit it is refused, or replaced with --overwrite.
        data: the texts of its split.
        free: settings that are as the stored moments have them, if there are any.
        renew: make them also where they are there.
        advance: of `accumulate_moments`.

    Raises:
        UserError: moments of another identity are there; or what the pass itself refuses.
    """
    config = as_stored(config, free)
    path, output = config_path(config), config.output
    identity = {
        "config": result_settings(config),
        "model_fingerprint": model_fingerprint(config.model, config.run),
        "fingerprint": data.fingerprint,
        "label_names": data.label_names,
    }

    def is_there() -> bool:
        try:
            return not renew and is_complete(path, identity, output.folds, output.save_pooled, output.layers)
        except UserError:
            if not config.run.overwrite:
                raise
            return False

    if processes().object_of_first(is_there):
        print(f"reused, already complete with these settings:\n{path}")
        remove_states(path)  # of a run that was killed when it had written the result
    else:
        make(config, data, identity, advance)
        print(path)
    return path


def place(config: Config, model_config: PreTrainedConfig, tokens: TokenizedTexts, num_labels: int) -> Config:
    """The config with the place of the sums decided; prints what the pass needs.

    Raises:
        UserError: that does not fit, or there is no such layer.
    """
    device, item = pick_device(config.run.device), getattr(torch, config.model.dtype).itemsize
    num_layers = len(numbers_of_layers(config.output.layers, model_config.num_hidden_layers + 1))
    of_folds = num_fold_layers(config, num_layers)
    sizes = Sizes(num_layers, model_config.hidden_size, num_labels, config.num_folds, of_folds)
    product_item = choose_product_dtype(config, int(tokens.lengths.sum()), sizes.hidden_size).itemsize
    num_tokens = max(
        int(tokens.lengths[rows].max()) * len(rows)
        for rows in token_batches(tokens.lengths, config.run.batch_tokens(device))
    )
    num_saved = {"none": 0, "last": 1, "all": model_config.num_hidden_layers + 1}[config.output.save_pooled]
    need = Need(
        weights=item * num_parameters(config.model, config.run),
        sums=8 * sizes.num_numbers,
        block=product_item * num_layers * 2 * sizes.hidden_size**2,
        batch=batch_bytes(model_config, num_tokens, item, product_item),
        matrices=matrix_bytes(model_config, product_item),
        pooled=4 * num_saved * len(tokens.lengths) * sizes.hidden_size,
        num_tokens=num_tokens,
    )
    on_host = keep_on_host(need, device, config.placement.accumulate_on)
    check_fits(need, device, config_path(config), on_host, config.placement.device_map != "none")
    return with_values(config, accumulate_on="cpu" if on_host else "device")


def make(config: Config, data: LabelledTexts, identity: dict, advance: Callable[[float], object] | None = None) -> None:
    """Runs the model over the texts and writes the moments, and the pooled states if asked for."""
    path, device, team = config_path(config), pick_device(config.run.device), processes()
    check_writable(path)
    team.object_of_first(lambda: check_states(path, identity, config.run.overwrite))
    model_config = load_config(config.model, config.run)
    tokenizer = load_tokenizer(config.model, config.run, model_config)
    tokens = tokenize(data.texts, tokenizer, model_config, config.model.max_length)
    targets, folds = one_hot_targets(data), assign_folds(data.texts, config.num_folds)
    config = place(config, model_config, tokens, targets.shape[1])
    model = load_base_model(config.model, config.run, device, config.placement.device_map)
    self_check(model, tokens, config.model.model_name)
    metadata = {
        "format_version": FORMAT_VERSION,
        **identity,
        **stored_as(config.model),
        "environment": environment(),
        **describe(data, tokens),
    }
    num_layers = model.config.num_hidden_layers + 1
    if config.output.layers is not None:
        metadata |= {"layers": numbers_of_layers(config.output.layers, num_layers), "num_layers": num_layers}
    pooled_file = None
    if config.output.save_pooled != "none":
        num_saved = num_layers if config.output.save_pooled == "all" else 1
        shapes = {"pooled": (num_saved, len(data.texts), model.config.hidden_size), "labels": (len(data.texts),)}
        pooled_file = PooledFile(pooled_path(path), shapes, metadata, team)
        pooled_file.tensors["labels"][:] = data.labels

    def unfinished(num_steps: int) -> Unfinished:
        way = {"num_steps": num_steps, "tokens_per_batch": config.run.batch_tokens(device), "device": device.type}
        way |= {name: value for name, value in all_settings(config).items() if name in CHANGING_STATES}
        way |= {"environment": metadata["environment"]}
        usable = pooled_file is None or pooled_file.is_old
        return Unfinished(path, identity, way, team, config.output.minutes_per_state, usable)

    try:
        pooled = pooled_file.tensors["pooled"] if pooled_file else None
        sums = accumulate_moments(model, tokens, targets, folds, config, pooled, unfinished, advance)
    except BaseException:
        if pooled_file and not states_beside(path):
            pooled_file.discard()
        raise
    if pooled_file:
        pooled_file.finish()
    if team.rank == 0:
        save_tensors(path, sums.averages(), metadata)
        remove_states(path)
    team.wait()


def main(config: Config) -> None:
    """Computes and writes the moments, unless they are there already."""
    load_config(config.model, config.run)  # its name is wrong or right before the data are read
    ensure(config, load_texts(config.data, config.run, config.split), renew=config.run.overwrite)


if __name__ == "__main__":
    run_script(main, Config, __doc__, share_work=True)
