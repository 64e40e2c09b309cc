"""Provide every benchmark with clock, processes, models of random weights, random texts and result files."""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from utils.data.load import LabelledTexts
from utils.models.batches import token_batches
from utils.models.states import run_base_model
from utils.models.tokens import TokenizedTexts
from utils.results import save_json
from utils.script import environment
from utils.settings import all_settings

NUM_CLASSES, NUM_FOLDS = 6, 5
MAX_LENGTH = 2048  # tokens of a random text
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
# architecture, `SIZES` and vocabulary: from the models' config.json
DECODERS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "small": ("qwen2", (64, 2, 1, 1, 192), 4_096),
    "SmolLM2-135M": ("llama", (576, 30, 9, 3, 1536), 49_152),
    "Qwen2-0.5B": ("qwen2", (896, 24, 14, 2, 4864), 151_936),
    "Qwen2-7B": ("qwen2", (3584, 28, 28, 4, 18944), 152_064),
    "Llama-3-8B": ("llama", (4096, 32, 32, 8, 14336), 128_256),
}


def random_model(name: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """A base model with the sizes of `DECODERS` and random weights, made on the device."""
    kind, sizes, vocabulary = DECODERS[name]
    options = {**dict(zip(SIZES, sizes, strict=True)), "max_position_embeddings": MAX_LENGTH}
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **options)
    torch.manual_seed(0)
    with device:
        return AutoModel.from_config(config, dtype=getattr(torch, dtype)).eval()


def random_texts(num_texts: int, mean_length: int) -> tuple[TokenizedTexts, LabelledTexts, np.ndarray]:
    """Token ids below 8,192 of texts of half to one and a half times the mean length, their labels and folds (n,)."""
    random, half = np.random.default_rng(0), mean_length // 2
    lengths = random.integers(mean_length - half, mean_length + half + 1, num_texts)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = TokenizedTexts(random.integers(0, 8192, offsets[-1]).astype(np.int32), offsets, MAX_LENGTH)
    labels = LabelledTexts([], np.arange(num_texts) % NUM_CLASSES, list("abcdef"), "")
    return tokens, labels, np.arange(num_texts) % NUM_FOLDS


def plain_forward(model: PreTrainedModel, tokens: TokenizedTexts, tokens_per_batch: int) -> None:
    """Runs only the forward passes, on the batches that cache.py forms."""
    for indices in token_batches(tokens.lengths, tokens_per_batch):
        run_base_model(model, tokens.pad(indices)[0].to(model.device))


def alternate(
    runs: Mapping[str, Callable[[], object]], num_rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each run in each round; the runs take turns, so that a slow moment of the machine affects all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(num_rounds):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            times[name].append(time.perf_counter() - start)
    return times


def measured(function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, float]]:
    """The value of a call, its seconds, and the processor time and peak memory of the process so far."""
    start = time.perf_counter()
    value = function(*arguments)
    seconds = time.perf_counter() - start
    with open("/proc/self/status") as file:  # getrusage would give the peak of the process that started this one
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    return value, {"seconds": seconds, "cpu_seconds": time.process_time(), "peak_mb": peak}


def in_own_process(function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, float]]:
    """Runs `measured` in a process of its own, so that the memory is only that of this call and the libraries."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measured, function, *arguments).result()


def write_result(config: Any, name: str, result: dict[str, Any]) -> None:
    """Writes results/benchmarks/<name>.json with settings, environment and device, and prints its path."""
    path = config.run.results_dir / "benchmarks" / f"{name}.json"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    head = {"config": all_settings(config), "environment": environment(), "device": device}
    save_json(path, {**head, "threads": torch.get_num_threads(), **result})
    print(path)
