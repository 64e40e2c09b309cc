"""cache.py's pass on a GPU against the plain forward pass of the same batches: the paper's models, random weights.

    python -m benchmarks.bench_gpu
    python -m benchmarks.bench_gpu --models SmolLM2-135M --device cpu --num_texts 64 --tokens_per_batch 1024

The weights are random, in bfloat16 and made on the device, so that nothing is downloaded; speed does not depend on
them. Texts of half to one and a half times the mean length. Both ways run in every round, each precision of the
products after the other; ratios are of the fastest rounds. Memory is the largest that PyTorch had allocated during a
pass. Errors are of the last layer's scores against float64 products.

Writes results/benchmarks/bench_gpu.json.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

import cache
import K_sweep
from benchmarks.bench_cache import make_folds, make_labels, make_tokens, plain_forward, seconds
from benchmarks.bench_products import DECODERS, Decoder
from utils.algebra.moments import NORMS, PER_LAYER, SHARED, LayerMoments
from utils.algebra.products import Precision
from utils.algebra.scores import SCORES
from utils.results import save_json
from utils.script import environment, pick_device, run_script
from utils.settings import Run, all_settings

VOCABULARY = {"SmolLM2-135M": 49_152, "Qwen2-0.5B": 151_936, "Qwen2-7B": 152_064, "Llama-3-8B": 128_256}
NUM_CLASSES = 6


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    models: tuple[str, ...] = ("Qwen2-0.5B", "Qwen2-7B", "Llama-3-8B")  # of bench_products.DECODERS
    precisions: tuple[Precision, ...] = get_args(Precision)  # of the products
    dtype: str = "bfloat16"  # of the model
    num_texts: int = 1024  # texts
    mean_length: int = 128  # tokens of a text
    tokens_per_batch: int = 16_384  # most padded tokens of a forward pass
    num_rounds: int = 3  # rounds; the fastest counts
    errors: bool = True  # also the scores of the last layer, and how far they are from those of float64
    device: str = "cuda"  # cuda or cpu
    results_dir: Path = Path("results")  # where the result goes


def model_config(name: str) -> PreTrainedConfig:
    """The configuration of a model, from its sizes."""
    decoder: Decoder = DECODERS[name]
    head = 64 if decoder.hidden_size < 1024 else 128
    kind = Qwen2Config if name.startswith("Qwen2") else LlamaConfig
    return kind(
        vocab_size=VOCABULARY[name],
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.queries // head,
        num_key_value_heads=decoder.keys // head,
        max_position_embeddings=2048,
    )


def make_model(name: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """A base model of random weights, made on the device."""
    torch.manual_seed(0)
    with device:
        return AutoModel.from_config(model_config(name), dtype=getattr(torch, dtype)).eval()


def last_layer_scores(tensors: dict[str, Tensor], lengths: np.ndarray) -> dict[str, float]:
    """Mean over K of every score of the last layer."""
    last = max(int(key.split(".")[1]) for key in tensors if key.startswith("layer."))
    found = {name: tensors[f"layer.{last}.{name}"] for name in (*PER_LAYER, *NORMS)}
    counts = {"num_samples": len(lengths), "num_pairs": int((lengths - 1).sum())}
    moments = LayerMoments(**found, **{name: tensors[name] for name in SHARED}, **counts)  # type: ignore[arg-type]
    layer = K_sweep.sweep_layer(moments, None, K_sweep.Config(num_null_draws=2), 0)
    return {name: mean(layer.scores[name].tolist()) for name in SCORES}


def measure(name: str, config: Config, device: torch.device) -> dict:
    """Seconds of the forward pass and of cache.py's pass in each precision, with memory and scores."""
    model, tokens = make_model(name, config.dtype, device), make_tokens(config.num_texts, config.mean_length)
    data, folds = make_labels(config.num_texts, NUM_CLASSES), make_folds(config.num_texts)
    forward = partial(plain_forward, model, tokens, config.tokens_per_batch)
    seconds(forward, device)  # warm-up
    times = [seconds(forward, device) for _ in range(config.num_rounds)]
    row: dict = {"model": name, "num_tokens": int(tokens.lengths.sum()), "forward_seconds": times, "precisions": {}}
    for precision in config.precisions:
        run = Run(tokens_per_batch=config.tokens_per_batch)
        settings = cache.Config(product_dtype=precision, run=run)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        passes, again, sums = [], [], list[dict[str, Tensor]]()
        for _ in range(config.num_rounds):
            sums.clear()  # of the round before
            passes.append(
                seconds(
                    lambda: sums.append(cache.accumulate(model, tokens, data, folds, settings)),  # noqa: B023
                    device,
                )
            )
            again.append(seconds(forward, device))
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        found: dict = {"seconds": passes, "forward_seconds": again, "ratio": min(passes) / min(*times, *again)}
        found |= {"tokens_per_second": row["num_tokens"] / min(passes), "peak_bytes": peak}
        found["scores"] = last_layer_scores(sums.pop(), tokens.lengths) if config.errors else None
        row["precisions"][precision] = found
    return row


def print_row(row: dict) -> None:
    """A line for each precision."""
    exact = row["precisions"].get("float64", {}).get("scores")
    for precision, found in row["precisions"].items():
        error = exact and max(abs(found["scores"][name] - exact[name]) for name in SCORES)
        print(
            f"{row['model']:13} {precision:10} pass {min(found['seconds']):7.2f} s, ratio {found['ratio']:5.2f}"
            f", {found['tokens_per_second']:9,.0f} tokens/s, peak {(found['peak_bytes'] or 0) / 1e9:5.1f} GB"
            + (f", largest error {error:.1e}" if exact else "")
        )


def main(config: Config) -> None:
    """Measures every model, and writes after each."""
    device, rows = pick_device(config.device), []
    path = config.results_dir / "benchmarks" / "bench_gpu.json"
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    for model_name in config.models:
        rows.append(measure(model_name, config, device))
        print_row(rows[-1])
        if device.type == "cuda":
            torch.cuda.empty_cache()
        head = {"config": all_settings(config), "environment": environment(), "device": name}
        save_json(path, {**head, "rows": rows})
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
