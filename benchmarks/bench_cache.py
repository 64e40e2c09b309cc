"""Time the moments: cache.py's pass, a plain forward pass of the same batches, and the dense per-text formula.

    python -m benchmarks.bench_cache
    python -m benchmarks.bench_cache --model_name smollm2 --dataset_name rotten_tomatoes --num_texts 300 \
        --num_rounds 2 --num_dense_rounds 1 --dtypes float32 bfloat16

Without --model_name: models of the paper's sizes with random weights, on random texts. With it: that model on a
stratified sample of the dataset's training texts. Pass and forward pass take turns in every round; ratios are of the
fastest rounds. `padding` is padded tokens over tokens.
Writes results/benchmarks/bench_cache.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import cache
from benchmarks.harness import NUM_FOLDS, alternate, plain_forward, random_model, random_texts, write_result
from utils.algebra.products import Precision
from utils.data.load import LabelledTexts, load_texts
from utils.models.batches import token_batches
from utils.models.load import load_base_model
from utils.models.tokens import TokenizedTexts, load_tokens
from utils.script import pick_device, run_script
from utils.settings import Data, Dtype, Model, Run

Texts = tuple[TokenizedTexts, LabelledTexts, np.ndarray]  # tokens, labels, folds (n,)


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    model_name: str | None = None  # a --model_name of cache.py; None: random models
    random_models: tuple[str, ...] = ("SmolLM2-135M",)  # names in benchmarks/harness.py
    dataset_name: str = "docstrings/library"  # texts of a named model
    num_texts: int = 468  # number of texts
    dtypes: tuple[Dtype, ...] = ("float32",)  # dtypes of the model
    product_dtypes: tuple[Precision, ...] = ("float32",)  # dtypes of the products of a long pass, as in cache.py
    num_rounds: int = 3  # rounds; the fastest counts
    num_dense_rounds: int = 0  # rounds of the dense formula, which takes long
    mean_length: int = 35  # tokens per random text, uniform between half and one and a half of it
    run: Run = Run(device="cpu")


def read_texts(name: str, config: Config) -> Texts:
    """Tokens, labels and folds of a sample of the dataset, made as in cache.py."""
    model, run = Model(name), config.run
    data = load_texts(Data(config.dataset_name, max_samples=config.num_texts), run, "train")
    return load_tokens(data.texts, model, run), data, cache.assign_folds(data.texts, NUM_FOLDS)


@torch.inference_mode()
def dense_formula(model: PreTrainedModel, tokens: TokenizedTexts) -> None:
    """C0 and C1 of every layer, text by text, from their definition with the matrices L1 and L2."""
    for index, length in enumerate(tokens.lengths):
        input_ids = tokens.pad(np.array([index]))[0].to(model.device)
        prefix = torch.ones(length, length - 1, device=model.device).triu()  # L1
        shift = torch.eye(length, device=model.device)[:, 1:]  # L2
        for states in model(input_ids=input_ids, output_hidden_states=True).hidden_states:
            x = states[0].float().T
            _ = x @ prefix @ prefix.T @ x.T, x @ prefix @ shift.T @ x.T


def measure(name: str, model: PreTrainedModel, texts: Texts, config: Config) -> dict[str, Any]:
    """Seconds of each run in each round, the ratios of the fastest, and the peak memory of a GPU."""
    device, lengths, num_tokens = model.device, texts[0].lengths, int(texts[0].lengths.sum())
    size = config.run.batch_tokens(device)
    padding = sum(int(lengths[batch].max()) * len(batch) for batch in token_batches(lengths, size)) / num_tokens
    runs: dict[str, Callable[[], object]] = {"forward": partial(plain_forward, model, texts[0], size)}
    for dtype in config.product_dtypes:
        runs[dtype] = partial(cache.accumulate, model, *texts, cache.Config(product_dtype=dtype, run=config.run))
    runs["forward"]()  # warm-up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = alternate(runs, config.num_rounds, device)
    times |= alternate({"dense": partial(dense_formula, model, texts[0])}, config.num_dense_rounds, device)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    fastest = {run: min(rounds) for run, rounds in times.items() if rounds}
    ratios = {run: seconds / fastest["forward"] for run, seconds in fastest.items()}
    for run, seconds in fastest.items():
        told = f"{seconds:9.2f} s, {ratios[run]:5.2f} of forward, {num_tokens / seconds:10,.0f} tokens/s"
        print(f"{name:<26} {run:<16} {told}")
    print(f"{name:<26} padded tokens / tokens {padding:.3f}")
    row = {"subject": name, "num_tokens": num_tokens, "padding": padding, "tokens_per_batch": size}
    return row | {"seconds": times, "over_forward": ratios, "peak_bytes": peak}


def main(config: Config) -> None:
    """Measures every model in every dtype and prints a line for each run."""
    device, is_random, rows = pick_device(config.run.device), config.model_name is None, []
    for name in (config.model_name,) if config.model_name else config.random_models:
        texts = random_texts(config.num_texts, config.mean_length) if is_random else read_texts(name, config)
        for dtype in config.dtypes:
            own = Model(name, dtype=dtype)
            model = random_model(name, dtype, device) if is_random else load_base_model(own, config.run, device)
            rows.append(measure(f"{name}, {dtype}", model, texts, config))
    write_result(config, "bench_cache", {"rows": rows})


if __name__ == "__main__":
    run_script(main, Config, __doc__)
