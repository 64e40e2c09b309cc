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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from utils.algebra.memory import Need, check_fits, keep_on_host, num_parameters
from utils.algebra.moment_sums import MomentSums, Sizes
from utils.algebra.moments import (
    by_layer,
    check_embedded,
    describe,
    is_complete,
    moments_path,
    numbers_of_layers,
    pooled_path,
)
from utils.algebra.products import Precision, ProductDtype
from utils.data.load import LabelledTexts, load_splits, load_texts
from utils.models.batches import Batch, assign_folds, one_hot, one_hot_targets, share_of, token_batches, token_steps
from utils.models.check import self_check
from utils.models.identity import known_fingerprint, load_config, model_fingerprint, stored_as
from utils.models.load import TokenizedTexts, load_base_model, load_tokenizer, tokenize
from utils.models.states import input_device, layer_devices, pool, visit_hidden_states
from utils.parallel import processes
from utils.results import check_identity, check_writable, read_identity, save_tensors, settings_from_moments
from utils.script import UserError, environment, pick_device, run_script
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
from utils.unfinished import PooledFile, Unfinished, check_states, remove_unfinished, run_steps, states_beside


@dataclass(frozen=True)
class Output(Unrecorded):
    """What is written beside the moments."""

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
    product_dtype: ProductDtype = "auto"  # of products; auto: by the number of tokens
    model: Model = Model()
    data: Data = Data()
    output: Output = Output()
    placement: Placement = Placement()
    run: Run = Run()

    def __post_init__(self) -> None:
        check_at_least_one(self, "num_folds")


PAIRS_PER_BLOCK = 8192  # so many products are added up in their own dtype, as in one large batch
CHANGING_STATES = ("layers", "folds", "save_pooled", "accumulate_on", "device_map")  # besides what identifies a result


# ------------------------------------------------------------------ the pass
def num_fold_layers(config: Config, num_layers: int) -> int:
    """How many of the layers keep their folds."""
    return {"all": num_layers, "last": 1, "none": 0}[config.output.folds]


def choose_precision(config: Config, num_tokens: int, hidden_size: int) -> Precision:
    """The precision of the products: with `auto` float64 for few tokens.

    Few tokens span few directions, and the errors of float32 have not averaged out; there float64 costs seconds. It
    would cost a fifth of a long pass, where float32 errors are smaller and are measured.
    """
    if config.product_dtype != "auto":
        return config.product_dtype
    return "float64" if num_tokens <= max(2**14, 32 * hidden_size) else "float32"


def accumulate_moments(
    model: PreTrainedModel,
    tokens: TokenizedTexts,
    data: LabelledTexts,
    folds: np.ndarray,
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
        data: their labels are read.
        folds: number of the fold of each text, (n,).
        config: pooling, num_folds, product_dtype, tokens_per_batch, layers, folds, accumulate_on ("cpu" or not).
        pooled_file: (layers saved, n, d), filled in place; holds the last layers, at most all.
        unfinished: gives the state on disk of a pass of so many steps; None: none is kept.
        advance: told the share of the tokens in each batch, instead of a progress bar.

    Raises:
        UserError: a non-finite state, naming layer and text.
    """
    device, devices, team = input_device(model), layer_devices(model), processes()
    kept = numbers_of_layers(config.output.layers, len(devices))
    of_folds = num_fold_layers(config, len(kept))
    sizes = Sizes(len(kept), model.config.hidden_size, data.num_labels, config.num_folds, of_folds)
    precision = choose_precision(config, int(tokens.lengths.sum()), sizes.hidden_size)
    on_host = config.placement.accumulate_on == "cpu"
    sums = MomentSums(sizes, tokens.lengths, [devices[layer] for layer in kept], precision, on_host)
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
        targets, of_fold = one_hot_targets(data, rows), one_hot(torch.from_numpy(folds[rows]), config.num_folds)
        batch = Batch(rows, lengths, targets.to(device), of_fold.to(device))
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


def find_moments(config: Config, splits: tuple[Literal["train", "test", "all"], ...]) -> tuple[Path, Config]:
    """The moments of a config, and the config with the settings that it leaves at their default read from them.

    Those of the embedded model are made, of each of `splits`, if they are missing.

    Raises:
        UserError: no moments, naming the command that makes them; or moments of another setting that is given, or of
            other weights of the model.
    """
    path = config_path(config)
    if not path.is_file():
        check_embedded(config, path)
        data = load_splits(config.data, config.run, "all" if "all" in splits else "both")
        for split in splits:
            ensure(with_values(config, split=split), data[split])
    config = settings_from_moments(config, path)
    if fingerprint := known_fingerprint(config.model, config.run):
        check_identity(read_identity(path), {"config": {}, "model_fingerprint": fingerprint}, path)
    return path, config


def ensure(
    config: Config,
    data: LabelledTexts,
    renew: bool = False,
    advance: Callable[[float], object] | None = None,
    keep_texts: bool = True,
) -> Path:
    """The moments of `data`, with the pooled states beside them if asked for; made where they are not there.

    Args:
        config: what does not fit it is refused, or replaced with --overwrite.
        data: the texts of its split.
        renew: make them also where they are there.
        advance: of `accumulate_moments`.
        keep_texts: False where nobody reads the texts afterwards: they are most of what grows with their number.

    Raises:
        UserError: moments of another identity are there; or what the pass itself refuses.
    """
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
        remove_unfinished(path, pooled_path(path))  # of a run that was killed when it had written the result
    else:
        make(config, data, identity, advance, keep_texts)
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
    precision = choose_precision(config, int(tokens.lengths.sum()), sizes.hidden_size)
    num_tokens = max(
        int(tokens.lengths[rows].max()) * len(rows)
        for rows in token_batches(tokens.lengths, config.run.batch_tokens(device))
    )
    num_saved = {"none": 0, "last": 1, "all": model_config.num_hidden_layers + 1}[config.output.save_pooled]
    need = Need.of(
        model_config, sizes, precision, item,
        weights=item * num_parameters(config.model, config.run),
        num_tokens=num_tokens,
        pooled=4 * num_saved * len(tokens.lengths) * sizes.hidden_size,
    )  # fmt: skip
    on_host = keep_on_host(need, device, config.placement.accumulate_on)
    check_fits(need, device, config_path(config), on_host, config.placement.device_map != "none")
    return with_values(config, accumulate_on="cpu" if on_host else "device")


def make(
    config: Config,
    data: LabelledTexts,
    identity: dict,
    advance: Callable[[float], object] | None = None,
    keep_texts: bool = True,
) -> None:
    """Runs the model over the texts and writes the moments, and the pooled states if asked for."""
    path, device, team = config_path(config), pick_device(config.run.device), processes()
    check_writable(path)
    team.object_of_first(lambda: check_states(path, identity, config.run.overwrite))
    model_config = load_config(config.model, config.run)
    tokenizer = load_tokenizer(config.model, config.run, model_config)
    tokens = tokenize(data.texts, tokenizer, model_config, config.model.max_length)
    folds = assign_folds(data.texts, config.num_folds)
    if not keep_texts:
        data.texts.clear()
    config = place(config, model_config, tokens, data.num_labels)
    model = load_base_model(config.model, config.run, device, config.placement.device_map)
    self_check(model, tokens, config.model.model_name)
    metadata = {
        **identity,
        **stored_as(config.model),
        "environment": environment(),
        **describe(data, tokens),
    }
    num_layers = model.config.num_hidden_layers + 1
    metadata |= {"layers": numbers_of_layers(config.output.layers, num_layers), "num_layers": num_layers}
    pooled_file = None
    if config.output.save_pooled != "none":
        num_saved = num_layers if config.output.save_pooled == "all" else 1
        shapes = {"pooled": (num_saved, len(folds), model.config.hidden_size), "labels": (len(folds),)}
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
        sums = accumulate_moments(model, tokens, data, folds, config, pooled, unfinished, advance)
        if team.rank == 0:
            save_tensors(path, by_layer(sums.averages(), metadata["layers"]), metadata)
        if pooled_file:  # after the moments: whoever is stopped in between finds both, unfinished, the next time
            pooled_file.finish()
    except BaseException:
        if pooled_file and states_beside(path):
            pooled_file.close()
        elif pooled_file:
            pooled_file.discard()
        raise
    if team.rank == 0:
        remove_unfinished(path, pooled_path(path))
    team.wait()


def main(config: Config) -> None:
    """Computes and writes the moments, unless they are there already."""
    load_config(config.model, config.run)  # its name is wrong or right before the data are read
    data = load_texts(config.data, config.run, config.split)
    ensure(config, data, renew=config.run.overwrite, keep_texts=False)


if __name__ == "__main__":
    run_script(main, Config, __doc__, share_work=True)
