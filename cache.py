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
"""

import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from utils.data import LabelledTexts, load_texts
from utils.io import (
    FORMAT_VERSION,
    UserError,
    check_same_settings,
    create_tensor_file,
    environment,
    model_path_name,
    open_tensors,
    pick_device,
    result_settings,
    run_script,
    save_tensors,
    write_atomically,
)
from utils.models import (
    Dtype,
    TokenizedTexts,
    load_base_model,
    load_config,
    load_tokenizer,
    run_base_model,
    token_batches,
    tokenize,
    visit_hidden_states,
)
from utils.moments import moments_path


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    # These change the result: stored in the file, compared when the file is reused.
    model_name: str = "tiny"  # hub id, local folder, or "tiny"
    dataset_name: str = "docstrings/library"  # key of the table, hub id, local file or folder, or docstrings/<task>
    split: Literal["train", "test", "all"] = "train"  # rows the moments are taken over
    pooling: Literal["mean", "last"] = "mean"  # pooled state m of a text: mean of its tokens, or its last token
    dtype: Dtype = "float32"  # of the model; sums are float64 in any case
    max_length: int | None = None  # tokens per text; None: the model's context
    max_samples: int | None = None  # stratified sample of the split; None: all rows
    text_column: str | None = None  # for your own data
    label_column: str | None = None  # for your own data
    text_template: str | None = None  # for your own data, such as "{question} {choices}"
    task: Literal["auto", "classification", "regression"] = "auto"  # auto: regression if the labels are fractions
    ungrouped_split: bool = False  # `medical` split as in the paper, with questions on both sides
    num_folds: int = 5  # folds whose pooled moments are kept apart for cross-validation
    seed: int = 0  # of sampling and of splits made here
    revision: str | None = None  # commit or tag of the model
    dataset_revision: str | None = None  # commit or tag of the dataset
    tokenizer_name: str | None = None  # another repository or folder for the tokenizer
    adapter_dir: Path | None = None  # LoRA adapter merged into the model; the result goes to <model>+lora
    product_dtype: Literal["float32", "float64"] = "float32"  # of the products within a batch
    # These change only speed or place.
    tokens_per_batch: int = 8192  # upper limit of padded tokens in one forward pass
    save_pooled: Literal["none", "last", "all"] = "none"  # also save each text's pooled state, of these layers
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    results_dir: Path = Path("results")  # where results go
    overwrite: bool = False  # recompute a file that is already complete
    trust_remote_code: bool = False  # let a model repository run its own code
    SPEED_OR_PLACE: ClassVar = (
        *("tokens_per_batch", "save_pooled", "device", "results_dir", "overwrite", "trust_remote_code"),
    )

    def __post_init__(self) -> None:
        for name in ("max_length", "max_samples", "num_folds", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}")


def shared_settings(config: Any) -> dict[str, Any]:
    """The settings of another script's Config that this one has too, by name."""
    return {field.name: getattr(config, field.name) for field in fields(Config) if hasattr(config, field.name)}


# ------------------------------------------------------------------ moments
def pool(hidden_states: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """The pooled state m of each text: mean over its tokens, or its last token.

    Args:
        hidden_states: (b, t, d), right-padded.
        lengths: tokens per text, (b,).
        pooling: "mean" or "last".

    Returns:
        (b, d), in the dtype of `hidden_states`.
    """
    if pooling == "last":
        return hidden_states[torch.arange(len(lengths), device=lengths.device), lengths - 1]
    positions = torch.arange(hidden_states.shape[1], device=lengths.device)
    inside = (positions < lengths[:, None]).to(hidden_states.dtype)
    return torch.bmm(inside[:, None], hidden_states)[:, 0] / lengths[:, None].to(hidden_states.dtype)


def prefix_products(hidden_states: Tensor, lengths: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over texts and over t = 1..T-1 of s_t [s_t ; x_{t+1}]', of s_t, and of x_{t+1}; summed, not averaged.

    With x_t = a_t + centre and s_t = q_t + t centre, only a_t and q_t are multiplied in the dtype of the states; what
    `centre` adds is exact. float32 then rounds relative to the spread of the states and not to their mean: on the
    embedded model that brings NTPS from 3e-4 to 5e-6 of its float64 value.

    Args:
        hidden_states: (b, t, d), right-padded.
        lengths: tokens per text, (b,).
        centre: any vector near the mean state, (d,); the result does not depend on it.

    Returns:
        (d, 2d), (d,), (d,), float64. A text of one token has no pair and adds nothing.
    """
    batch, num_tokens, hidden_size = hidden_states.shape
    position = torch.arange(1, num_tokens, device=lengths.device)
    has_next = position < lengths[:, None]
    t = has_next * position  # (b, T - 1), 0 on padding
    centred = hidden_states - centre
    pairs = hidden_states.new_empty(batch, num_tokens - 1, 2 * hidden_size)  # [q_t ; a_{t+1}]
    torch.cumsum(centred[:, :-1], dim=1, out=pairs[..., :hidden_size])
    pairs[..., hidden_size:] = centred[:, 1:]
    pairs *= has_next[..., None]  # padding off, on both sides
    pairs = pairs.flatten(0, 1)
    products = (pairs[:, :hidden_size].T @ pairs).double()
    q_sum, a_sum = pairs.sum(0).double().chunk(2)
    tq_sum, ta_sum = (t.flatten().to(pairs.dtype) @ pairs).double().chunk(2)
    mu, num_pairs, t_sum, t_squared_sum = centre.double(), has_next.sum(), t.sum(), t.square().sum()
    products[:, :hidden_size] += torch.outer(tq_sum, mu) + torch.outer(mu, tq_sum) + torch.outer(t_squared_sum * mu, mu)
    products[:, hidden_size:] += torch.outer(q_sum, mu) + torch.outer(mu, ta_sum) + torch.outer(t_sum * mu, mu)
    return products, q_sum + t_sum * mu, a_sum + num_pairs * mu


class MomentSums:
    """Running float64 sums over texts; `averages` divides them by the number of texts at the end."""

    def __init__(self, num_layers: int, hidden_size: int, num_labels: int, num_folds: int, device: torch.device):
        l, f, d, c = num_layers, num_folds, hidden_size, num_labels  # noqa: E741, the symbols of the module docstring
        shapes = {
            "fold_pooled_second_moment": (l, f, d, d),
            "fold_pooled_label_cross_moment": (l, f, d, c),
            "fold_pooled_mean": (l, f, d),
            "prefix_second_moment": (l, d, d),
            "prefix_next_cross_moment": (l, d, d),
            "prefix_mean": (l, d),
            "next_mean": (l, d),
            "pooled_norm_fourth_power": (l,),  # |m|^4, for Ledoit-Wolf shrinkage
            "pooled_norm_squared_pooled": (l, d),  # |m|^2 m, likewise
            "fold_label_mean": (f, c),
            "fold_label_second_moment": (f, c, c),
            "fold_num_samples": (f,),
        }
        self.centres: dict[int, Tensor] = {}  # of each layer: the mean state of its first batch
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    def add_labels(self, targets: Tensor, folds: Tensor) -> None:
        """Adds the labels y (b, c) of a batch; `folds` (b, f) is the one-hot fold of each text; both float64."""
        self.sums["fold_label_mean"] += folds.T @ targets
        self.sums["fold_label_second_moment"] += torch.einsum("bf,bc,be->fce", folds, targets, targets)
        self.sums["fold_num_samples"] += folds.sum(0)

    def add_states(self, layer: int, hidden_states: Tensor, pooled: Tensor, lengths: Tensor, targets: Tensor,
                   folds: Tensor) -> None:  # fmt: skip
        """Adds one layer's states of a batch: (b, t, d) in the dtype of the products, `pooled` (b, d) in float64."""
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
        products, prefix_sum, next_sum = prefix_products(hidden_states, lengths, self.centres[layer])
        prefix_second, prefix_next = products.chunk(2, dim=1)
        sums["prefix_second_moment"][layer] += prefix_second
        sums["prefix_next_cross_moment"][layer] += prefix_next
        sums["prefix_mean"][layer] += prefix_sum
        sums["next_mean"][layer] += next_sum

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
    num_layers = model.config.num_hidden_layers + 1
    sums = MomentSums(num_layers, model.config.hidden_size, targets.shape[1], folds.shape[1], device)
    first_saved = num_layers - len(pooled_file) if pooled_file is not None else num_layers
    product_dtype = getattr(torch, config.product_dtype)
    indices = np.empty(0, dtype=np.int64)
    lengths = batch_targets = batch_folds = torch.empty(0)
    finite: list[Tensor] = []

    def add_layer(layer: int, hidden_states: Tensor) -> None:
        hidden_states = hidden_states.to(product_dtype)
        pooled = pool(hidden_states, lengths, config.pooling).double()
        mean = pooled if config.pooling == "mean" else pool(hidden_states, lengths, "mean")
        finite.append(mean.isfinite().all(1))  # a sum over all tokens shows any of them; read once a batch
        sums.add_states(layer, hidden_states, pooled, lengths, batch_targets, batch_folds)
        if pooled_file is not None and layer >= first_saved:
            pooled_file[layer - first_saved, indices] = pooled.float().cpu().numpy()

    with (
        visit_hidden_states(model, add_layer),
        tqdm(total=int(tokens.lengths.sum()), unit="token", unit_scale=True, desc="cache") as progress,
    ):
        for indices in token_batches(tokens.lengths, config.tokens_per_batch):
            input_ids, lengths = (tensor.to(device) for tensor in tokens.pad(indices))
            batch_targets, batch_folds = targets[indices].to(device), folds[indices].to(device)
            finite.clear()
            run_base_model(model, input_ids)
            sums.add_labels(batch_targets, batch_folds)
            if not (all_finite := torch.stack(finite)).all():
                layer, text = (~all_finite).nonzero()[0].tolist()
                raise UserError(
                    f"Non-finite hidden states at layer {layer}, row {indices[text]} of the split ({config.dtype}). "
                    "Half precision overflows on some models: try --dtype float32 or bfloat16."
                )
            progress.update(int(tokens.lengths[indices].sum()))
    return sums


# ------------------------------------------------------------------ run
def is_complete(path: Path, pooled_path: Path, config: Config, data: LabelledTexts) -> bool:
    """Whether a finished result with these settings and this data is there.

    Raises:
        UserError: a result with other settings or of other data is there.
    """
    if config.overwrite or not path.is_file():
        return False
    with open_tensors(path) as (_, metadata):
        check_same_settings(metadata["config"], config, path)
        if (metadata["fingerprint"], metadata["label_names"]) != (data.fingerprint, data.label_names):
            raise UserError(f"{path} was made from other rows of {config.dataset_name}. Recompute it with --overwrite.")
    if config.save_pooled == "none":
        return True
    if not pooled_path.is_file():
        return False
    with open_tensors(pooled_path) as (file, metadata):
        is_all = file.get_slice("pooled").get_shape()[0] > 1
        of_these = metadata["fingerprint"] == data.fingerprint and metadata["config"] == result_settings(config)
        return of_these and (is_all or config.save_pooled == "last")


def main(config: Config) -> None:
    """Computes and writes the moments, unless they are there already."""
    model_name = model_path_name(config.model_name, config.adapter_dir)
    path = moments_path(config.results_dir, model_name, config.dataset_name, config.split)
    pooled_path = path.with_suffix(".pooled.safetensors")
    data = load_texts(config, config.split)
    if is_complete(path, pooled_path, config, data):
        print(f"reused, already complete with these settings:\n{path}")
        return
    device = pick_device(config.device)
    model_config = load_config(config)
    tokens = tokenize(data.texts, load_tokenizer(config, model_config), model_config, config.max_length)
    model = load_base_model(config, device, config.adapter_dir)
    targets, folds = one_hot_targets(data), assign_folds(data.texts, config.num_folds)
    metadata = {
        "format_version": FORMAT_VERSION,
        "config": result_settings(config),
        "environment": environment(),
        "fingerprint": data.fingerprint,
        "label_names": data.label_names,
        "num_samples": len(data.texts),
        "num_tokens": int(tokens.lengths.sum()),
        "num_pairs": int((tokens.lengths - 1).sum()),
        "num_texts_at_max_length": int((tokens.lengths == tokens.max_length).sum()),
        "max_length": tokens.max_length,
        "class_counts": None if data.is_regression else np.bincount(data.labels, minlength=data.num_labels).tolist(),
    }
    if config.save_pooled == "none":
        sums = accumulate_moments(model, tokens, targets, folds, config)
    else:
        num_saved = model.config.num_hidden_layers + 1 if config.save_pooled == "all" else 1
        shapes = {"pooled": (num_saved, len(data.texts), model.config.hidden_size), "labels": (len(data.texts),)}
        with write_atomically(pooled_path) as temporary:
            files = create_tensor_file(temporary, shapes, metadata)
            files["labels"][:] = data.labels
            sums = accumulate_moments(model, tokens, targets, folds, config, files["pooled"])
            files["pooled"].flush()
            files["labels"].flush()
    save_tensors(path, sums.averages(), metadata)
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
