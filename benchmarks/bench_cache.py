"""The cost of the moments: cache.py's pass, a plain forward pass of the same batches, and the dense per-text formula.

    python -m benchmarks.bench_cache
    python -m benchmarks.bench_cache --model_name smollm2 --dataset_name rotten_tomatoes --num_texts 300 \
        --num_rounds 2 --num_dense_rounds 1 --dtypes float32 bfloat16
    python -m benchmarks.bench_cache --device cuda --random_models Qwen2-0.5B Qwen2-7B Llama-3-8B --dtypes bfloat16 \
        --product_dtypes float32 float64 bfloat16x2 --num_texts 1024 --mean_length 128 --tokens_per_batch 16384 \
        --num_dense_rounds 0

Without --model_name: models of the paper's sizes with random weights, on random texts. With it: that model on a
stratified sample of the dataset's training texts. Pass and forward pass take turns in every round; ratios are of the
fastest rounds. `padding` is padded tokens over tokens.
Writes results/benchmarks/bench_cache.json, or bench_cache.<model>.json.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import cache
from benchmarks.harness import NUM_FOLDS, alternate, plain_forward, random_model, random_texts, write_result
from utils.algebra.products import Precision
from utils.data.load import LabelledTexts, load_texts
from utils.models.batches import token_batches
from utils.models.load import load_base_model, load_config, load_tokenizer
from utils.models.tokens import TokenizedTexts, tokenize
from utils.script import pick_device, run_script
from utils.settings import Data, Dtype, Model, Run, path_name


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    model_name: str | None = None  # as --model_name of cache.py; None: random models
    random_models: tuple[str, ...] = ("SmolLM2-135M",)  # of benchmarks/harness.py
    dataset_name: str = "docstrings/library"  # texts of a named model
    num_texts: int = 468  # texts
    dtypes: tuple[Dtype, ...] = ("float32",)  # of the model
    product_dtypes: tuple[Precision, ...] = ("float32",)  # of the products of a long pass; as in cache.py
    num_rounds: int = 3  # rounds; the fastest counts
    num_dense_rounds: int = 1  # rounds of the dense formula, which takes long; 0: none
    tokens_per_batch: int | None = None  # most padded tokens of a forward pass; None: cache.py's default
    other_batches: tuple[int, ...] = ()  # further values of it, for the pass alone
    mean_length: int = 35  # tokens per random text, uniform between half and one and a half of it
    device: str = "cpu"  # cpu or cuda
    results_dir: Path = Path("results")  # the result goes there


Texts = tuple[TokenizedTexts, LabelledTexts, np.ndarray]  # tokens, labels, folds (n,)


def read_texts(config: Config) -> Texts:
    """Tokens, labels and folds of a sample of the dataset, as cache.py has them."""
    model, run = Model(str(config.model_name)), Run()
    data = load_texts(Data(config.dataset_name, max_samples=config.num_texts), run, "train")
    model_config = load_config(model, run)
    tokens = tokenize(data.texts, load_tokenizer(model, run, model_config), model_config, None)
    return tokens, data, cache.assign_folds(data.texts, NUM_FOLDS)


def subjects(config: Config, device: torch.device) -> Iterator[tuple[str, PreTrainedModel, Texts]]:
    """Name, model and texts of every model in every dtype."""
    texts = read_texts(config) if config.model_name else random_texts(config.num_texts, config.mean_length)
    for name in (config.model_name,) if config.model_name else config.random_models:
        for dtype in config.dtypes:
            if config.model_name:
                model = load_base_model(Model(config.model_name, dtype=dtype), Run(), device)
            else:
                model = random_model(str(name), dtype, device)
            yield f"{name}, {dtype}", model, texts


@torch.inference_mode()
def dense_formula(model: PreTrainedModel, tokens: TokenizedTexts, targets: Tensor) -> list[dict[str, Tensor]]:
    """M, B, C0 and C1 text by text from their definition, with the triangular matrices L1 and L2; batches of 32."""
    d, device = model.config.hidden_size, model.device
    shapes = {"M": (d, d), "B": (d, targets.shape[1]), "C0": (d, d), "C1": (d, d)}
    totals = [
        {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        for _ in range(model.config.num_hidden_layers + 1)
    ]
    for indices in np.array_split(np.arange(len(tokens.lengths)), -(-len(tokens.lengths) // 32)):
        input_ids, lengths = tokens.pad(indices)
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).to(device)
        states = model(input_ids=input_ids.to(device), attention_mask=mask, output_hidden_states=True).hidden_states
        for row, (index, length) in enumerate(zip(indices, lengths.tolist(), strict=True)):
            prefix = torch.ones(length, length - 1, device=device).triu()  # L1
            shift = torch.eye(length, device=device)[:, 1:]  # L2
            y = targets[index].float().to(device)
            for total, state in zip(totals, states, strict=True):
                x = state[row, :length].float().T
                m = x.mean(1)
                total["M"] += torch.outer(m, m)
                total["B"] += torch.outer(m, y)
                total["C0"] += x @ prefix @ prefix.T @ x.T
                total["C1"] += x @ prefix @ shift.T @ x.T
    return totals


def run_pass(model: PreTrainedModel, texts: Texts, product_dtype: Precision, tokens_per_batch: int) -> None:
    """The sums of cache.py over the texts."""
    settings = cache.Config(product_dtype=product_dtype, run=Run(tokens_per_batch=tokens_per_batch))
    cache.accumulate(model, *texts, settings)


def measure(name: str, model: PreTrainedModel, texts: Texts, config: Config, tokens_per_batch: int) -> dict:
    """Seconds of each way in each round, the ratios of the fastest, and the peak memory of a GPU."""
    device, lengths, num_tokens = model.device, texts[0].lengths, int(texts[0].lengths.sum())
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in token_batches(lengths, tokens_per_batch))
    forward = partial(plain_forward, model, texts[0], tokens_per_batch)
    ways: dict[str, Callable[[], object]] = {"forward": forward}
    for product_dtype in config.product_dtypes:
        ways[product_dtype] = partial(run_pass, model, texts, product_dtype, tokens_per_batch)
    for other in config.other_batches:
        ways[f"batches of {other}"] = partial(run_pass, model, texts, config.product_dtypes[0], other)
    forward()  # warm-up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = alternate(ways, config.num_rounds, device)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    dense = partial(dense_formula, model, texts[0], cache.one_hot_targets(texts[1]))
    times |= alternate({"dense": dense}, config.num_dense_rounds, device)
    fastest = {way: min(rounds) for way, rounds in times.items() if rounds}
    ratios = {way: value / fastest["forward"] for way, value in fastest.items()}
    for way, value in fastest.items():
        print(
            f"{name:<26} {way:<16} {value:9.2f} s, {ratios[way]:5.2f} of forward, {num_tokens / value:10,.0f} tokens/s"
        )
    print(f"{name:<26} padded tokens / tokens {padded / num_tokens:.3f}")
    row = {"subject": name, "num_tokens": num_tokens, "padding": padded / num_tokens, "seconds": times}
    return row | {"over_forward": ratios, "peak_bytes": peak}


def main(config: Config) -> None:
    """Measures every model and prints a line for each way."""
    device = pick_device(config.device)
    tokens_per_batch = config.tokens_per_batch or Run().batch_tokens(device)
    rows = [measure(*subject, config, tokens_per_batch) for subject in subjects(config, device)]
    ending = f".{path_name(config.model_name)}" if config.model_name else ""
    write_result(config, f"bench_cache{ending}", {"tokens_per_batch": tokens_per_batch, "rows": rows})


if __name__ == "__main__":
    run_script(main, Config, __doc__)
