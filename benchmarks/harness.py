"""Clock, models of random weights, random texts and result files: shared by every benchmark."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, PreTrainedModel

from utils.data.load import LabelledTexts
from utils.models.batches import token_batches
from utils.models.states import run_base_model
from utils.models.tokens import TokenizedTexts
from utils.results import save_json
from utils.script import ROOT, UserError, environment
from utils.settings import all_settings

NUM_CLASSES, NUM_FOLDS = 6, 5  # of random texts
# architecture, width, layers, heads, key heads, feed-forward width, vocabulary: from the models' config.json
DECODERS: dict[str, tuple[str, int, int, int, int, int, int]] = {
    "SmolLM2-135M": ("llama", 576, 30, 9, 3, 1536, 49_152),
    "Qwen2-0.5B": ("qwen2", 896, 24, 14, 2, 4864, 151_936),
    "Qwen2-7B": ("qwen2", 3584, 28, 28, 4, 18944, 152_064),
    "Llama-3-8B": ("llama", 4096, 32, 32, 8, 14336, 128_256),
}


def random_model(name: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """A base model with the sizes of `DECODERS` and random weights, made on the device."""
    from transformers import LlamaConfig, Qwen2Config

    kind, width, layers, heads, key_heads, feed_forward, vocabulary = DECODERS[name]
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    with device:
        return AutoModel.from_config(config, dtype=getattr(torch, dtype)).eval()


def random_texts(num_texts: int, mean_length: int) -> tuple[TokenizedTexts, LabelledTexts, np.ndarray]:
    """Token ids below 8,192 of texts of half to one and a half times the mean length, their labels and folds (n,)."""
    random, half = np.random.default_rng(0), mean_length // 2
    lengths = random.integers(mean_length - half, mean_length + half + 1, num_texts)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = TokenizedTexts(random.integers(0, 8192, offsets[-1]).astype(np.int32), offsets, 2048)
    names = [f"class {number}" for number in range(NUM_CLASSES)]
    labels = LabelledTexts([], np.arange(num_texts) % NUM_CLASSES, names, "")
    return tokens, labels, np.arange(num_texts) % NUM_FOLDS


def plain_forward(model: PreTrainedModel, tokens: TokenizedTexts, tokens_per_batch: int) -> None:
    """The forward passes alone, on the batches that cache.py forms."""
    for indices in token_batches(tokens.lengths, tokens_per_batch):
        run_base_model(model, tokens.pad(indices)[0].to(model.device))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, with the device's queue drained on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(ways: dict[Any, Callable[[], object]], num_rounds: int, device: torch.device) -> dict[Any, list[float]]:
    """Seconds of each way in each round; the ways take turns: a slow moment of the machine meets each."""
    times: dict[Any, list[float]] = {name: [] for name in ways}
    for _ in range(num_rounds):
        for name, run in ways.items():
            times[name].append(seconds(run, device))
    return times


def measure_process(command: list[str], folder: Path | None = None) -> tuple[str, dict[str, float]]:
    """Output of `python command`; its seconds on the clock and on the processor, and the most memory it held, GiB.

    Args:
        command: arguments of Python.
        folder: put before everything else that Python imports.

    Raises:
        UserError: it failed.
    """
    start, path = time.perf_counter(), {} if folder is None else {"PYTHONPATH": str(folder)}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, **path}
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{' '.join(command[:3])} failed; its messages are above.")
    numbers = {"seconds": time.perf_counter() - start, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    return printed, numbers | {"peak_gigabytes": usage.ru_maxrss / 2**20}


def write_result(config: Any, name: str, result: dict[str, Any]) -> Path:
    """Writes results/benchmarks/<name>.json with settings, environment and device; prints and returns its path."""
    path = config.results_dir / "benchmarks" / f"{name}.json"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    head = {"config": all_settings(config), "environment": environment(), "device": device}
    save_json(path, {**head, "threads": torch.get_num_threads(), **result})
    print(path)
    return path
