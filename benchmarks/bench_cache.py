"""What the moments cost: cache.py's pass, a plain forward pass of the same batches, and the dense per-text formula.

    python -m benchmarks.bench_cache
    python -m benchmarks.bench_cache --device cuda --dtype bfloat16 --hidden_sizes 896 --num_texts 4096

Random Qwen2 models (Qwen2-0.5B's proportions) on ragged texts of 35 tokens on average. The three run one after the
other in every round, so that a slow moment of the machine meets all of them; ratios are of the fastest rounds.
Writes results/benchmarks/bench_cache.json.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, Qwen2Config

import cache
from utils.batches import token_batches
from utils.hidden_states import run_base_model
from utils.io import environment, pick_device, run_script, save_json
from utils.models import TokenizedTexts
from utils.settings import Dtype, Run, all_settings


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    hidden_sizes: tuple[int, ...] = (128, 512, 896)  # d
    num_layers: int = 12  # decoder layers
    num_texts: int = 468  # two batches of 8192 tokens
    mean_length: int = 35  # tokens per text, uniform between half and one and a half of it
    num_classes: int = 6  # c
    num_rounds: int = 3  # rounds; the fastest counts
    tokens_per_batch: int = 8192  # padded tokens in one forward pass
    dtype: Dtype = "float32"  # of the model
    device: str = "cpu"  # cpu or cuda
    results_dir: Path = Path("results")  # where the result goes


def make_model(hidden_size: int, config: Config, device: torch.device) -> PreTrainedModel:
    """A random base model with the proportions of Qwen2-0.5B (feed-forward 5.4 d, heads of 64, few keys)."""
    num_heads = max(1, hidden_size // 64)
    num_key_value_heads = max(n for n in range(1, num_heads + 1) if num_heads % n == 0 and n <= max(1, num_heads // 7))
    qwen2 = Qwen2Config(
        vocab_size=8192,
        hidden_size=hidden_size,
        intermediate_size=int(5.43 * hidden_size) // 64 * 64,
        num_hidden_layers=config.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(qwen2, dtype=getattr(torch, config.dtype))
    model.to(device)
    return model.eval()


def make_tokens(config: Config) -> TokenizedTexts:
    """Random token ids of ragged lengths."""
    random = np.random.default_rng(0)
    half = config.mean_length // 2
    lengths = random.integers(config.mean_length - half, config.mean_length + half + 1, config.num_texts)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenizedTexts(random.integers(0, 8192, offsets[-1]).astype(np.int32), offsets, 1024)


def plain_forward(model: PreTrainedModel, tokens: TokenizedTexts, config: Config) -> None:
    """The forward passes alone, on the batches that cache.py forms."""
    for indices in token_batches(tokens.lengths, config.tokens_per_batch):
        run_base_model(model, tokens.pad(indices)[0].to(model.device))


@torch.inference_mode()
def dense_formula(model: PreTrainedModel, tokens: TokenizedTexts, targets: Tensor) -> list[dict[str, Tensor]]:
    """M, B, C0 and C1 text by text from their definition, with the triangular matrices L1 and L2; batches of 32."""
    d, device = model.config.hidden_size, model.device
    num_layers = model.config.num_hidden_layers + 1
    shapes = {"M": (d, d), "B": (d, targets.shape[1]), "C0": (d, d), "C1": (d, d)}
    totals = [{name: torch.zeros(shape, device=device) for name, shape in shapes.items()} for _ in range(num_layers)]
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


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, with the device's queue drained on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(hidden_size: int, config: Config, device: torch.device) -> dict:
    """Seconds of each way in each round, and the ratios of the fastest."""
    model, tokens = make_model(hidden_size, config, device), make_tokens(config)
    labels = torch.arange(config.num_texts) % config.num_classes
    targets = torch.nn.functional.one_hot(labels, config.num_classes).double()
    folds = torch.nn.functional.one_hot(torch.arange(config.num_texts) % 5, 5).double()
    cache_config = cache.Config(run=Run(tokens_per_batch=config.tokens_per_batch))
    ways: dict[str, Callable[[], object]] = {
        "cache": lambda: cache.accumulate_moments(model, tokens, targets, folds, cache_config),
        "forward": lambda: plain_forward(model, tokens, config),
        "dense": lambda: dense_formula(model, tokens, targets),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    plain_forward(model, tokens, config)  # warm-up
    for _ in range(config.num_rounds):
        for name, way in ways.items():
            times[name].append(seconds(way, device))
    fastest = {name: min(rounds) for name, rounds in times.items()}
    return {
        "hidden_size": hidden_size,
        "num_tokens": int(tokens.lengths.sum()),
        "seconds": times,
        "cache_over_forward": fastest["cache"] / fastest["forward"],
        "dense_over_cache": fastest["dense"] / fastest["cache"],
        "tokens_per_second": tokens.lengths.sum() / fastest["cache"],
    }


def main(config: Config) -> None:
    """Measures every hidden size and prints the table."""
    device = pick_device(config.device)
    print(f"{'d':>5} {'cache s':>9} {'forward s':>9} {'dense s':>9} {'cache/forward':>14} {'dense/cache':>12}")
    rows = []
    for hidden_size in config.hidden_sizes:
        rows.append(row := measure(hidden_size, config, device))
        times = "".join(f"{min(row['seconds'][name]):10.3f}" for name in ("cache", "forward", "dense"))
        print(f"{hidden_size:5d}{times} {row['cache_over_forward']:14.2f} {row['dense_over_cache']:12.1f}")
    path = config.results_dir / "benchmarks" / "bench_cache.json"
    result = {"threads": torch.get_num_threads(), "device": str(device), "rows": rows}
    save_json(path, {"config": all_settings(config), "environment": environment(), **result})
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
