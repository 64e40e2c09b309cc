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

import zlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from utils.batches import token_batches
from utils.data import LabelledTexts, load_texts
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
from utils.models import (
    TokenizedTexts,
    known_fingerprint,
    load_base_model,
    load_config,
    load_tokenizer,
    model_fingerprint,
    pool,
    stored_as,
    tokenize,
    visit_hidden_states,
)
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


# ------------------------------------------------------------------ moments
@dataclass(frozen=True)
class PrefixSums:
    """What the texts of a batch add to the sums over t = 1..T-1; float64. A text of one token adds nothing."""

    products: Tensor  # (d, 2d), of s_t [s_t ; x_{t+1}]'
    prefixes: Tensor  # (d,), of s_t
    following: Tensor  # (d,), of x_{t+1}
    errors: Tensor  # (2, d, p), of products @ Z, the two halves apart: what the dtype of the products costs
    totals: Tensor  # (b, d), s_T of each text, of one token too


def prefix_products(
    hidden_states: Tensor, lengths: Tensor, centre: Tensor, probes: Tensor, dtype: torch.dtype
) -> PrefixSums:
    """The sums over the pairs of a batch; summed, not averaged.

    With x_t = a_t + centre and s_t = q_t + t centre, only a_t and q_t are multiplied in `dtype`; what `centre` adds is
    exact. float32 then rounds relative to the spread of the states and not to their mean. The prefix sums themselves
    are float64: added up in float32 they cost ten times the precision of the products.

    What a product with Z should be is had from thin float64 products: a_{t+1}' Z is the step of q_t' Z.

    Args:
        hidden_states: (b, t, d), right-padded, float64.
        lengths: tokens per text, (b,).
        centre: any vector near the mean state, (d,), float64; the result does not depend on it.
        probes: Z, (d, p).
        dtype: of the products.
    """
    batch, num_tokens, d = hidden_states.shape
    position = torch.arange(1, num_tokens, device=lengths.device)
    has_next = position < lengths[:, None]
    t = has_next * position  # (b, T - 1), 0 on padding
    prefix = hidden_states - centre  # a_t for now
    pairs = prefix.new_empty(batch, num_tokens - 1, 2 * d, dtype=dtype)  # [q_t ; a_{t+1}]
    pairs[..., d:] = prefix[:, 1:]
    prefix.cumsum_(1)
    pairs[..., :d] = prefix[:, :-1]
    pairs *= has_next[..., None]  # padding off, on both sides
    pairs = pairs.flatten(0, 1)
    products = (pairs[:, :d].T @ pairs).double()
    along = prefix @ probes  # q_t' Z
    weights = torch.cat([along[:, :-1], along.diff(dim=1), torch.ones_like(t)[..., None], t[..., None]], dim=-1)
    weights = torch.nn.functional.pad(weights * has_next[..., None], (0, 0, 0, 1))  # the last position has no next
    sums = prefix.flatten(0, 1).T @ weights.flatten(0, 1)
    exact, q_sum, tq_sum = sums[:, :-2].chunk(2, dim=1), sums[:, -2], sums[:, -1]
    errors = torch.stack([part @ probes - of for part, of in zip(products.chunk(2, dim=1), exact, strict=True)])
    totals = prefix[torch.arange(batch, device=lengths.device), lengths - 1]  # q_T
    has_pairs = (lengths > 1).double()
    a_sum = has_pairs @ (totals - hidden_states[:, 0] + centre)
    ta_sum = (lengths - 1).double() @ totals - q_sum  # summation by parts
    num_pairs, t_sum, t_squared_sum = has_next.sum(), t.sum(), t.square().sum()
    products[:, :d] += torch.outer(tq_sum, centre) + torch.outer(centre, tq_sum + t_squared_sum * centre)
    products[:, d:] += torch.outer(q_sum, centre) + torch.outer(centre, ta_sum + t_sum * centre)
    return PrefixSums(
        products, q_sum + t_sum * centre, a_sum + num_pairs * centre, errors, totals + lengths[:, None] * centre
    )


def choose_product_dtype(config: "Config", tokens: TokenizedTexts, hidden_size: int) -> torch.dtype:
    """The dtype of the products: with `auto` float64 for few tokens.

    Few tokens span few directions, and the errors of float32 have not averaged out; there float64 costs seconds. It
    would cost a fifth of a long pass, where float32 errors are smaller and are measured.
    """
    few = int(tokens.lengths.sum()) <= max(2**14, 32 * hidden_size)
    dtype = ("float64" if few else "float32") if config.product_dtype == "auto" else config.product_dtype
    return getattr(torch, dtype)


class MomentSums:
    """Running float64 sums over texts; `averages` divides them by the number of texts at the end."""

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        num_labels: int,
        num_folds: int,
        device: torch.device,
        product_dtype: torch.dtype,
    ):
        l, f, d, c = num_layers, num_folds, hidden_size, num_labels  # noqa: E741, the symbols of the module docstring
        shapes = {
            "fold_pooled_second_moment": (l, f, d, d),
            "fold_pooled_label_cross_moment": (l, f, d, c),
            "fold_pooled_mean": (l, f, d),
            "prefix_second_moment": (l, d, d),
            "prefix_next_cross_moment": (l, d, d),
            "prefix_mean": (l, d),
            "next_mean": (l, d),
            "prefix_second_error": (l, d, NUM_PROBES),
            "prefix_next_error": (l, d, NUM_PROBES),
            "token_square": (l, d),
            "pooled_norm_fourth_power": (l,),  # |m|^4, for Ledoit-Wolf shrinkage
            "pooled_norm_squared_pooled": (l, d),  # |m|^2 m, likewise
            "fold_label_mean": (f, c),
            "fold_label_second_moment": (f, c, c),
            "fold_num_samples": (f,),
        }
        self.centres: dict[int, Tensor] = {}  # of each layer: the mean state of its first batch
        self.probes, self.product_dtype = noise_probes(d).to(device), product_dtype
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    def add_labels(self, targets: Tensor, folds: Tensor) -> None:
        """Adds the labels y (b, c) of a batch; `folds` (b, f) is the one-hot fold of each text; both float64."""
        self.sums["fold_label_mean"] += folds.T @ targets
        self.sums["fold_label_second_moment"] += torch.einsum("bf,bc,be->fce", folds, targets, targets)
        self.sums["fold_num_samples"] += folds.sum(0)

    def add_states(self, layer: int, hidden_states: Tensor, pooled: Tensor, lengths: Tensor, targets: Tensor,
                   folds: Tensor) -> None:  # fmt: skip
        """Adds one layer's states of a batch: (b, t, d), and `pooled` (b, d), both float64."""
        sums = self.sums
        for fold, weights in enumerate(folds.T):
            weighted = (weights[:, None] * pooled).T
            sums["fold_pooled_second_moment"][layer, fold].addmm_(weighted, pooled)
            sums["fold_pooled_label_cross_moment"][layer, fold].addmm_(weighted, targets)
        sums["fold_pooled_mean"][layer] += folds.T @ pooled
        norm_squared = pooled.square().sum(1)
        sums["pooled_norm_fourth_power"][layer] += norm_squared.square().sum()
        sums["pooled_norm_squared_pooled"][layer] += norm_squared @ pooled
        if layer not in self.centres:
            self.centres[layer] = pool(hidden_states, lengths, "mean").mean(0)
        added = prefix_products(hidden_states, lengths, self.centres[layer], self.probes, self.product_dtype)
        prefix_second, prefix_next = added.products.chunk(2, dim=1)
        sums["prefix_second_moment"][layer] += prefix_second
        sums["prefix_next_cross_moment"][layer] += prefix_next
        sums["prefix_mean"][layer] += added.prefixes
        sums["next_mean"][layer] += added.following
        sums["prefix_second_error"][layer] += added.errors[0]
        sums["prefix_next_error"][layer] += added.errors[1]
        # s_{t+1}^2 - s_t^2 = 2 s_t x_{t+1} + x_{t+1}^2: the squares of the tokens without a pass over them
        sums["token_square"][layer] += added.totals.square().sum(0) - 2 * prefix_next.diagonal()

    def averages(self) -> dict[str, Tensor]:
        """Averages over texts, of each fold and, without the prefix `fold_`, of all folds together."""
        counts = self.sums["fold_num_samples"]
        averages = {}
        for name, total in self.sums.items():
            if name == "fold_num_samples":
                averages[name] = counts
            elif not name.startswith("fold_"):
                averages[name] = total / counts.sum()
            else:
                axis = 0 if name.startswith("fold_label") else 1
                averages[name.removeprefix("fold_")] = total.sum(axis) / counts.sum()
                shape = [-1 if dim == axis else 1 for dim in range(total.ndim)]
                averages[name] = total / counts.clamp(min=1).view(shape)
        second_moment = averages["prefix_second_moment"]
        second_moment.copy_((second_moment + second_moment.mT) / 2)  # the products are symmetric only up to rounding
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
    dtype = choose_product_dtype(config, tokens, hidden_size)
    sums = MomentSums(num_layers, hidden_size, targets.shape[1], folds.shape[1], device, dtype)
    first_saved = num_layers - len(pooled_file) if pooled_file is not None else num_layers
    finite: list[Tensor] = []  # of the current batch, (b,) a layer

    def add_layer(batch: Batch, layer: int, hidden_states: Tensor) -> None:
        hidden_states = hidden_states.double()  # exact; float32 sums over tokens would be rounding as large as a rank
        pooled = pool(hidden_states, batch.lengths, config.pooling)
        mean = pooled if config.pooling == "mean" else pool(hidden_states, batch.lengths, "mean")
        finite.append(mean.isfinite().all(1))  # a sum over all tokens shows any of them; read once a batch
        sums.add_states(layer, hidden_states, pooled, batch.lengths, batch.targets, batch.folds)
        if pooled_file is not None and layer >= first_saved:
            pooled_file[layer - first_saved, batch.rows] = pooled.float().cpu().numpy()

    with tqdm(total=int(tokens.lengths.sum()), unit="token", unit_scale=True, desc="cache") as progress:
        for rows in token_batches(tokens.lengths, config.run.tokens_per_batch):
            input_ids, lengths = (tensor.to(device) for tensor in tokens.pad(rows))
            batch = Batch(rows, lengths, targets[rows].to(device), folds[rows].to(device))
            finite.clear()
            visit_hidden_states(model, input_ids, partial(add_layer, batch))
            sums.add_labels(batch.targets, batch.folds)
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
        for split in splits:
            main(with_values(config, split=split))
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
    check_identity(read_identity(path), identity, path)
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
