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
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from utils.batches import token_batches
from utils.data import LabelledTexts, load_splits, load_texts
from utils.hidden_states import pool, visit_hidden_states
from utils.identity import known_fingerprint, load_config, model_fingerprint, stored_as
from utils.io import (
    FORMAT_VERSION,
    UserError,
    check_writable,
    create_tensor_file,
    environment,
    open_tensors,
    pick_device,
    run_script,
    save_tensors,
    write_atomically,
)
from utils.linalg import NUM_PROBES, noise_probes
from utils.models import TokenizedTexts, load_base_model, load_tokenizer, tokenize
from utils.moments import moments_path, pooled_path
from utils.results import check_identity, read_identity
from utils.self_check import self_check
from utils.settings import (
    Data,
    Model,
    Run,
    Unrecorded,
    check_at_least_one,
    command_line,
    flatten,
    result_settings,
    with_values,
)


@dataclass(frozen=True)
class Output(Unrecorded):
    """What is written beside the moments."""

    save_pooled: Literal["none", "last", "all"] = "none"  # also save each text's pooled state, of these layers
    folds: Literal["none", "last", "all"] = "last"  # layers whose pooled moments are also kept fold by fold


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
    run: Run = Run()

    def __post_init__(self) -> None:
        check_at_least_one(self, "num_folds")


PAIRS_PER_FLUSH = 8192  # so many products are added up in their own dtype, as in one large batch
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


def choose_product_dtype(config: "Config", tokens: TokenizedTexts, hidden_size: int) -> torch.dtype:
    """The dtype of the products: with `auto` float64 for few tokens.

    Few tokens span few directions, and the errors of float32 have not averaged out; there float64 costs seconds. It
    would cost a fifth of a long pass, where float32 errors are smaller and are measured.
    """
    few = int(tokens.lengths.sum()) <= max(2**14, 32 * hidden_size)
    dtype = ("float64" if few else "float32") if config.product_dtype == "auto" else config.product_dtype
    return getattr(torch, dtype)


class MomentSums:
    """Running sums over texts; `averages` adds what the centres are due and divides by the number of texts.

    Products of a batch are added up in place, in their own dtype, and every `PAIRS_PER_FLUSH` pairs in float64.
    """

    def __init__(
        self, sizes: tuple[int, int, int, int], num_fold_layers: int, device: torch.device, product_dtype: torch.dtype
    ):
        """`sizes` are layers l, hidden size d, labels c and folds; the last `num_fold_layers` layers keep folds."""
        l, d, c, f = sizes  # noqa: E741, the symbols of the module docstring
        shapes = {
            "pooled_second_moment": (l, d, d),
            "pooled_label_cross_moment": (l, d, c),
            "pooled_mean": (l, d),
            "pooled_norm_fourth_power": (l,),  # |m|^4, for Ledoit-Wolf shrinkage
            "pooled_norm_squared_pooled": (l, d),  # |m|^2 m, likewise
            "fold_pooled_second_moment": (num_fold_layers, f, d, d),
            "fold_pooled_label_cross_moment": (num_fold_layers, f, d, c),
            "fold_pooled_mean": (num_fold_layers, f, d),
            "fold_label_mean": (f, c),
            "fold_label_second_moment": (f, c, c),
            "fold_num_samples": (f,),
            "products": (l, d, 2 * d),  # of [q_t ; a_{t+1}]
            "errors": (l, d, 2 * NUM_PROBES),
            "exact": (l, d, 2 * NUM_PROBES),  # since the last flush
            **{name: (l, d) for name in ("q", "tq", "a", "ta", "total_square")},
        }
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        self.block = torch.zeros((l, d, 2 * d), dtype=product_dtype, device=device)  # products since the last flush
        self.centres = torch.zeros((l, d), dtype=torch.float64, device=device)  # mean state of the first batch
        self.probes, self.num_layers = noise_probes(d).to(device), l
        step = -(-d // NUM_STRIPES)
        self.stripes = [slice(start, min(start + step, d)) for start in range(0, d, step)]
        self.first_fold_layer, self.pairs_in_block = l - num_fold_layers, 0
        self.num_batches = self.num_pairs = self.t_sum = self.t_squared_sum = 0

    def add_labels(self, batch: "Batch") -> None:
        """Adds what is the same at every layer: labels, folds and token counts of a batch; after its layers."""
        sums = self.sums
        sums["fold_label_mean"] += batch.folds.T @ batch.targets
        sums["fold_label_second_moment"] += torch.einsum("bf,bc,be->fce", batch.folds, batch.targets, batch.targets)
        sums["fold_num_samples"] += batch.folds.sum(0)
        n = batch.lengths - 1  # pairs of each text; t runs over 1..n
        self.num_batches += 1
        self.num_pairs += int(n.sum())
        self.t_sum += int((n * (n + 1) // 2).sum())
        self.t_squared_sum += int((n * (n + 1) * (2 * n + 1) // 6).sum())
        self.pairs_in_block += int(n.sum())
        if self.pairs_in_block >= PAIRS_PER_FLUSH:
            self.flush()

    def add_tokens(self, layer: int, hidden_states: Tensor, lengths: Tensor) -> Tensor:
        """Adds one layer's states (b, t, d) of a batch; returns the mean state of each text, (b, d) float64."""
        if not self.num_batches:
            self.centres[layer] = pool(hidden_states.double(), lengths, "mean").mean(0)
        added = centred_prefixes(hidden_states, lengths, self.centres[layer], self.probes, self.block.dtype)
        for stripe in self.stripes:  # C0 is symmetric
            self.block[layer, stripe, stripe.start :].addmm_(added.pairs[:, stripe].T, added.pairs[:, stripe.start :])
        self.sums["exact"][layer] += added.exact
        for name, value in added.sums.items():
            self.sums[name][layer] += value
        self.sums["total_square"][layer] += added.totals.square().sum(0)
        return added.totals / lengths[:, None]

    def flush(self) -> None:
        """Moves the products into float64, and what their dtype has cost into the errors."""
        for layer in range(self.num_layers):
            products = self.block[layer].double()
            second = products[:, : len(products)]
            second.copy_(second.triu() + second.triu(1).T)
            halves = [half @ self.probes for half in products.chunk(2, dim=1)]
            self.sums["products"][layer] += products
            self.sums["errors"][layer] += torch.cat(halves, dim=1) - self.sums["exact"][layer]
        self.block.zero_()
        self.sums["exact"].zero_()
        self.pairs_in_block = 0

    def add_pooled(self, layer: int, pooled: Tensor, batch: "Batch") -> None:
        """Adds one layer's pooled states of a batch, (b, d) float64."""
        sums, at = self.sums, layer - self.first_fold_layer
        norm_squared = pooled.square().sum(1)
        sums["pooled_norm_fourth_power"][layer] += norm_squared.square().sum()
        sums["pooled_norm_squared_pooled"][layer] += norm_squared @ pooled
        sums["pooled_mean"][layer] += pooled.sum(0)
        if at < 0:
            sums["pooled_second_moment"][layer].addmm_(pooled.T, pooled)
            sums["pooled_label_cross_moment"][layer].addmm_(pooled.T, batch.targets)
            return
        sums["fold_pooled_mean"][at] += batch.folds.T @ pooled
        for fold, rows in enumerate(batch.rows_of_folds):
            sums["fold_pooled_second_moment"][at, fold].addmm_(pooled[rows].T, pooled[rows])
            sums["fold_pooled_label_cross_moment"][at, fold].addmm_(pooled[rows].T, batch.targets[rows])

    def prefix_moments(self) -> dict[str, Tensor]:
        """C0, C1, their means and errors, summed over texts, with what the centres add; once, at the end."""
        self.flush()
        q, tq, a, ta, mu = (*(self.sums[name] for name in ("q", "tq", "a", "ta")), self.centres)
        second, following = self.sums["products"].chunk(2, dim=2)
        for layer in range(self.num_layers):  # in place: nothing else of this size is needed
            second[layer].addr_(tq[layer], mu[layer]).addr_(mu[layer], tq[layer] + self.t_squared_sum * mu[layer])
            second[layer].copy_((second[layer] + second[layer].T) / 2)  # symmetric only up to rounding
            following[layer].addr_(q[layer], mu[layer]).addr_(mu[layer], ta[layer] + self.t_sum * mu[layer])
        second_error, next_error = self.sums["errors"].chunk(2, dim=2)
        return {
            "prefix_second_moment": second,
            "prefix_next_cross_moment": following,
            "prefix_mean": q + self.t_sum * mu,
            "next_mean": a + self.num_pairs * mu,
            "prefix_second_error": second_error,
            "prefix_next_error": next_error,
            # s_{t+1}^2 - s_t^2 = 2 s_t x_{t+1} + x_{t+1}^2: the squares of the tokens without a pass over them
            "token_square": self.sums["total_square"] - 2 * following.diagonal(dim1=1, dim2=2),
        }

    def averages(self) -> dict[str, Tensor]:
        """Averages over texts, of each fold and, without `fold_`, of all folds together; once, at the end."""
        sums, counts = self.sums, self.sums["fold_num_samples"]
        for name in ("pooled_second_moment", "pooled_label_cross_moment"):
            sums[name][self.first_fold_layer :] = sums[f"fold_{name}"].sum(1)
        whole = {name: total for name, total in sums.items() if name.startswith("pooled_")} | self.prefix_moments()
        whole |= {name: sums[f"fold_{name}"].sum(0) for name in ("label_mean", "label_second_moment")}
        averages = {name: total / counts.sum() for name, total in whole.items()} | {"fold_num_samples": counts}
        for name in ("label_mean", "label_second_moment", "pooled_second_moment", "pooled_label_cross_moment",
                     "pooled_mean"):  # fmt: skip
            total, axis = sums[f"fold_{name}"], 0 if name.startswith("label") else 1
            shape = [-1 if dim == axis else 1 for dim in range(total.ndim)]
            averages[f"fold_{name}"] = total / counts.clamp(min=1).view(shape)
        return averages


# ------------------------------------------------------------------ the pass
def one_hot_targets(data: LabelledTexts) -> Tensor:
    """Labels as y, (n, c) float64: one-hot rows of classes, or the regression target as it is."""
    labels = torch.from_numpy(np.asarray(data.labels))
    if data.is_regression:
        return labels.double().reshape(len(labels), -1)
    return torch.nn.functional.one_hot(labels.long(), data.num_labels).double()


def assign_folds(texts: list[str], num_folds: int) -> Tensor:
    """One-hot fold of each text, (n, f) float64, by a hash of the text: equal texts share a fold in any order."""
    folds = torch.tensor([zlib.crc32(text.encode()) % num_folds for text in texts])
    return torch.nn.functional.one_hot(folds, num_folds).double()


@dataclass(frozen=True)
class Batch:
    """What a layer's states are added up with: b texts of one forward pass, on the device."""

    rows: np.ndarray  # (b,) numbers of the texts
    lengths: Tensor  # (b,) tokens per text
    targets: Tensor  # (b, c) float64
    folds: Tensor  # (b, f) float64, one-hot

    @functools.cached_property
    def rows_of_folds(self) -> list[Tensor]:
        """The texts of each fold, as positions within the batch."""
        return [column.nonzero()[:, 0] for column in self.folds.T]


def accumulate_moments(
    model: PreTrainedModel,
    tokens: TokenizedTexts,
    targets: Tensor,
    folds: Tensor,
    config: Config,
    pooled_file: np.memmap | None = None,
) -> MomentSums:
    """One pass over the texts, every layer at once; only one layer's states are alive at a time.

    Args:
        model: base model without lm_head.
        tokens: n texts.
        targets: (n, c) float64.
        folds: (n, f) float64, one-hot.
        config: pooling, tokens_per_batch and product_dtype are read.
        pooled_file: (layers saved, n, d), filled in place; holds the last layers, at most all.

    Raises:
        UserError: a non-finite state, naming layer and text.
    """
    device = next(model.parameters()).device
    num_layers, hidden_size = model.config.num_hidden_layers + 1, model.config.hidden_size
    sizes = (num_layers, hidden_size, targets.shape[1], folds.shape[1])
    num_fold_layers = {"all": num_layers, "last": 1, "none": 0}[config.output.folds]
    sums = MomentSums(sizes, num_fold_layers, device, choose_product_dtype(config, tokens, hidden_size))
    first_saved = num_layers - len(pooled_file) if pooled_file is not None else num_layers
    finite: list[Tensor] = []  # of the current batch, (b,) a layer

    def add_layer(batch: Batch, layer: int, hidden_states: Tensor) -> None:
        mean = sums.add_tokens(layer, hidden_states, batch.lengths)
        pooled = mean if config.pooling == "mean" else pool(hidden_states, batch.lengths, "last").double()
        finite.append(mean.isfinite().all(1))  # a sum over all tokens shows any of them; read once a batch
        sums.add_pooled(layer, pooled, batch)
        if pooled_file is not None and layer >= first_saved:
            pooled_file[layer - first_saved, batch.rows] = pooled.float().cpu().numpy()

    with tqdm(total=int(tokens.lengths.sum()), unit="token", unit_scale=True, desc="cache") as progress:
        for rows in token_batches(tokens.lengths, config.run.batch_tokens(device)):
            input_ids, lengths = (tensor.to(device) for tensor in tokens.pad(rows))
            batch = Batch(rows, lengths, targets[rows].to(device), folds[rows].to(device))
            finite.clear()
            visit_hidden_states(model, input_ids, functools.partial(add_layer, batch))
            sums.add_labels(batch)
            if not (all_finite := torch.stack(finite)).all():
                layer, text = (~all_finite).nonzero()[0].tolist()
                raise UserError(
                    f"Non-finite hidden states at layer {layer}, row {rows[text]} of the split ({config.model.dtype}). "
                    "Half precision overflows on some models: try --dtype float32 or bfloat16."
                )
            progress.update(int(tokens.lengths[rows].sum()))
    return sums


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


# ------------------------------------------------------------------ find or make
def config_path(config: Config) -> Path:
    """Where the moments of a config go."""
    return moments_path(config.run, config.model, config.data, config.split)


def as_stored(config: Config, free: Collection[str]) -> Config:
    """The config with the settings in `free` as the moments at its place have them, if there are any."""
    path = config_path(config)
    if not path.is_file():
        return config
    stored = {name: value for name, value in read_identity(path)["config"].items() if name in free}
    if stored.get("adapter_dir"):
        stored["adapter_dir"] = Path(stored["adapter_dir"])
    return with_values(config, **stored)


def find_moments(config: Config, splits: tuple[Literal["train", "test", "all"], ...]) -> tuple[Path, Config]:
    """The moments of a config, and the config as they have it: what it leaves at its default is as it is stored.

    Those of the embedded model are made, of each of `splits`, if they are not there.

    Raises:
        UserError: no moments, naming the command that makes them; or of other settings, or of another model.
    """
    path = config_path(config)
    if not path.is_file():
        if config.model.path_name != "tiny" or not config.data.dataset_name.startswith("docstrings/"):
            name, adapted, _ = config.model.model_name.partition("+lora")
            adapter = config.run.results_dir / "lora" / name / config.data.path_name / "adapter"
            asked = with_values(config, model_name=name, adapter_dir=adapter) if adapted else config
            flags = {*result_settings(asked), "results_dir", "trust_remote_code"}
            raise UserError(f"No moments at {path}. Run: {command_line('cache.py', asked, flags)}")
        print(f"No moments at {path}: making them, as the embedded model takes seconds.")
        data = load_splits(config.data, config.run, "all" if "all" in splits else "both")
        for split in splits:
            ensure(with_values(config, split=split), data[split])
    default = flatten(Config())
    free = {name for name, value in flatten(config).items() if value == default[name]}
    if config.model.model_name.endswith("+lora"):  # the moments know the model and its adapter
        free.add("model_name")
    stored = read_identity(path)
    check_identity(stored, {"config": result_settings(config)}, path, free | {"seed"})
    config = as_stored(config, free - {"seed"})
    if fingerprint := known_fingerprint(config.model, config.run):
        check_identity(stored, {"config": {}, "model_fingerprint": fingerprint}, path)
    return path, config


def is_complete(config: Config, identity: dict) -> bool:
    """Whether the moments, and the pooled states if any are asked for, are there with this identity.

    Raises:
        UserError: moments of another identity are there.
    """
    path = config_path(config)
    if not path.is_file():
        return False
    with open_tensors(path) as (file, metadata):
        check_identity(metadata, identity, path)
        num_layers = file.get_slice("pooled_mean").get_shape()[0]
        num_fold_layers = file.get_slice("fold_pooled_mean").get_shape()[0]
    if num_fold_layers < {"none": 0, "last": 1, "all": num_layers}[config.output.folds]:
        return False
    if config.output.save_pooled == "none":
        return True
    if not pooled_path(path).is_file():
        return False
    with open_tensors(pooled_path(path)) as (file, metadata):
        is_all = file.get_slice("pooled").get_shape()[0] > 1
        same = all(metadata.get(name) == value for name, value in identity.items())
        return same and (is_all or config.output.save_pooled == "last")


def ensure(config: Config, data: LabelledTexts, free: Collection[str] = (), renew: bool = False) -> Path:
    """The moments of `data`, with the pooled states beside them if asked for; made where they are not there.

    Args:
        config: what does not fit it is refused, or replaced with --overwrite.
        data: the texts of its split.
        free: settings that are as the stored moments have them, if there are any.
        renew: make them also where they are there.

    Raises:
        UserError: moments of another identity are there; or what the pass itself refuses.
    """
    config = as_stored(config, free)
    identity = {
        "config": result_settings(config),
        "model_fingerprint": model_fingerprint(config.model, config.run),
        "fingerprint": data.fingerprint,
        "label_names": data.label_names,
    }
    try:
        complete = not renew and is_complete(config, identity)
    except UserError:
        if not config.run.overwrite:
            raise
        complete = False
    path = config_path(config)
    if complete:
        print(f"reused, already complete with these settings:\n{path}")
    else:
        make(config, data, identity)
        print(path)
    return path


def make(config: Config, data: LabelledTexts, identity: dict) -> None:
    """Runs the model over the texts and writes the moments, and the pooled states if asked for."""
    path, device = config_path(config), pick_device(config.run.device)
    check_writable(path)
    model_config = load_config(config.model, config.run)
    tokenizer = load_tokenizer(config.model, config.run, model_config)
    tokens = tokenize(data.texts, tokenizer, model_config, config.model.max_length)
    model = load_base_model(config.model, config.run, device)
    self_check(model, tokens, config.model.model_name)
    targets, folds = one_hot_targets(data), assign_folds(data.texts, config.num_folds)
    metadata = {
        "format_version": FORMAT_VERSION,
        **identity,
        **stored_as(config.model),
        "environment": environment(),
        "num_samples": len(data.texts),
        "num_tokens": int(tokens.lengths.sum()),
        "num_pairs": int((tokens.lengths - 1).sum()),
        "num_texts_at_max_length": int((tokens.lengths == tokens.max_length).sum()),
        "max_length": tokens.max_length,
        "rounding": rounding_statistics(tokens),
        "class_counts": None if data.is_regression else np.bincount(data.labels, minlength=data.num_labels).tolist(),
    }
    if config.output.save_pooled == "none":
        sums = accumulate_moments(model, tokens, targets, folds, config)
    else:
        num_saved = model.config.num_hidden_layers + 1 if config.output.save_pooled == "all" else 1
        shapes = {"pooled": (num_saved, len(data.texts), model.config.hidden_size), "labels": (len(data.texts),)}
        with write_atomically(pooled_path(path)) as temporary:
            files = create_tensor_file(temporary, shapes, metadata)
            files["labels"][:] = data.labels
            sums = accumulate_moments(model, tokens, targets, folds, config, files["pooled"])
            files["pooled"].flush()
            files["labels"].flush()
    save_tensors(path, sums.averages(), metadata)


def main(config: Config) -> None:
    """Computes and writes the moments, unless they are there already."""
    load_config(config.model, config.run)  # its name is wrong or right before the data are read
    ensure(config, load_texts(config.data, config.run, config.split), renew=config.run.overwrite)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
