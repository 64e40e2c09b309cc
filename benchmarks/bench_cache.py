"""What the moments cost: cache.py's pass, a plain forward pass of the same batches, and the dense per-text formula.

    python -m benchmarks.bench_cache
    python -m benchmarks.bench_cache --device cuda --dtypes bfloat16 --hidden_sizes 896 --num_texts 4096
    python -m benchmarks.bench_cache --model_name smollm2 --dataset_name rotten_tomatoes --dtypes float32 bfloat16 \
        --other_batches 512 2048 8192

Without --model_name: random Qwen2 models (Qwen2-0.5B's proportions) on ragged texts of 35 tokens on average. With it:
that model on a stratified sample of the dataset's training texts, and the share of padding for several sample sizes.
All ways run one after the other in every round, so that a slow moment of the machine meets each of them; ratios are
of the fastest rounds. `other_batches` are other values of --tokens_per_batch for cache.py's pass.
Writes results/benchmarks/bench_cache.json, or bench_cache.<model>.json.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, Qwen2Config

import cache
from utils.algebra.products import Precision
from utils.data.load import LabelledTexts, load_texts
from utils.models.batches import token_batches
from utils.models.identity import load_config
from utils.models.load import TokenizedTexts, load_base_model, load_tokenizer, tokenize
from utils.models.states import run_base_model
from utils.results import save_json
from utils.script import environment, pick_device, run_script
from utils.settings import Data, Dtype, Model, Run, all_settings, path_name

NUM_FOLDS = 5  # as in cache.py


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    model_name: str | None = None  # as --model_name of cache.py; None: random models
    dataset_name: str = "docstrings/library"  # what a named model reads
    num_texts: int = 468  # texts
    dtypes: tuple[Dtype, ...] = ("float32",)  # of the model
    num_rounds: int = 3  # rounds; the fastest counts
    num_dense_rounds: int = 3  # of them with the dense formula, which takes long
    product_dtype: Precision = "float32"  # of a long pass; as in cache.py
    tokens_per_batch: int | None = None  # most padded tokens of a forward pass; None: cache.py's default
    other_batches: tuple[int, ...] = ()  # further values of it, for the pass alone
    padding_sizes: tuple[int, ...] = (200, 500, 2000, 8000)  # texts; of a named model the share of padding
    hidden_sizes: tuple[int, ...] = (128, 512, 896)  # d of random models
    num_layers: int = 12  # decoder layers of random models
    mean_length: int = 35  # tokens per random text, uniform between half and one and a half of it
    num_classes: int = 6  # c of random texts
    device: str = "cpu"  # cpu or cuda
    results_dir: Path = Path("results")  # where the result goes


@dataclass(frozen=True)
class Subject:
    """A model and what it reads."""

    name: str
    model: PreTrainedModel
    tokens: TokenizedTexts
    data: LabelledTexts  # their labels
    folds: np.ndarray  # (n,)


def random_subjects(config: Config, device: torch.device) -> Iterator[Subject]:
    """Random models of every hidden size and dtype, on random texts."""
    tokens = make_tokens(config.num_texts, config.mean_length)
    data, folds = make_labels(config.num_texts, config.num_classes), make_folds(config.num_texts)
    for hidden_size in config.hidden_sizes:
        for dtype in config.dtypes:
            model = make_model(hidden_size, config.num_layers, dtype, device)
            yield Subject(f"d = {hidden_size}, {dtype}", model, tokens, data, folds)


def read_texts(config: Config, num_texts: int) -> tuple[TokenizedTexts, LabelledTexts, np.ndarray]:
    """Tokens, labels and folds of a sample of the dataset, as cache.py has them."""
    assert config.model_name
    model, run = Model(config.model_name), Run()
    data = load_texts(Data(config.dataset_name, max_samples=num_texts), run, "train")
    model_config = load_config(model, run)
    tokens = tokenize(data.texts, load_tokenizer(model, run, model_config), model_config, None)
    return tokens, data, cache.assign_folds(data.texts, NUM_FOLDS)


def real_subjects(config: Config, device: torch.device) -> Iterator[Subject]:
    """The named model in every dtype, on the dataset."""
    assert config.model_name
    texts = read_texts(config, config.num_texts)
    for dtype in config.dtypes:
        model = load_base_model(Model(config.model_name, dtype=dtype), Run(), device)
        yield Subject(f"{config.model_name}, {dtype}", model, *texts)


def padding_rows(config: Config, tokens_per_batch: int) -> list[dict]:
    """Padded tokens over tokens for several sample sizes."""
    rows = []
    for num_texts in config.padding_sizes:
        lengths = read_texts(config, num_texts)[0].lengths
        batches = token_batches(lengths, tokens_per_batch)
        padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
        rows.append({"num_texts": len(lengths), "num_batches": len(batches), "padding": padded / lengths.sum()})
    return rows


def make_model(hidden_size: int, num_layers: int, dtype: str, device: torch.device) -> PreTrainedModel:
    """A random base model with the proportions of Qwen2-0.5B (feed-forward 5.4 d, heads of 64, few keys)."""
    num_heads = max(1, hidden_size // 64)
    num_key_value_heads = max(n for n in range(1, num_heads + 1) if num_heads % n == 0 and n <= max(1, num_heads // 7))
    qwen2 = Qwen2Config(
        vocab_size=8192,
        hidden_size=hidden_size,
        intermediate_size=int(5.43 * hidden_size) // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    return AutoModel.from_config(qwen2, dtype=getattr(torch, dtype)).to(device).eval()


def make_tokens(num_texts: int, mean_length: int) -> TokenizedTexts:
    """Random token ids, below 8,192, of texts of half to one and a half times the mean length."""
    random, half = np.random.default_rng(0), mean_length // 2
    lengths = random.integers(mean_length - half, mean_length + half + 1, num_texts)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenizedTexts(random.integers(0, 8192, offsets[-1]).astype(np.int32), offsets, 1024)


def make_labels(num_texts: int, num_classes: int) -> LabelledTexts:
    """Classes in turn, of texts that nobody reads."""
    names = [f"class {number}" for number in range(num_classes)]
    return LabelledTexts([], np.arange(num_texts) % num_classes, names, "")


def make_folds(num_texts: int) -> np.ndarray:
    """Folds in turn, (n,)."""
    return np.arange(num_texts) % NUM_FOLDS


def plain_forward(model: PreTrainedModel, tokens: TokenizedTexts, tokens_per_batch: int) -> None:
    """The forward passes alone, on the batches that cache.py forms."""
    for indices in token_batches(tokens.lengths, tokens_per_batch):
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


def measure(subject: Subject, config: Config, tokens_per_batch: int) -> dict:
    """Seconds of each way in each round, and the ratios of the fastest."""
    model, tokens, targets = subject.model, subject.tokens, cache.one_hot_targets(subject.data)

    def run_cache(tokens_per_batch: int) -> None:
        cache_config = cache.Config(product_dtype=config.product_dtype, run=Run(tokens_per_batch=tokens_per_batch))
        cache.accumulate(model, tokens, subject.data, subject.folds, cache_config)

    ways: dict[str, Callable[[], object]] = {
        "cache": partial(run_cache, tokens_per_batch),
        "forward": partial(plain_forward, model, tokens, tokens_per_batch),
        "dense": partial(dense_formula, model, tokens, targets),
        **{f"cache at {other}": partial(run_cache, other) for other in config.other_batches},
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    plain_forward(model, tokens, tokens_per_batch)  # warm-up
    for round_number in range(config.num_rounds):
        for name, way in ways.items():
            if name != "dense" or round_number < config.num_dense_rounds:
                times[name].append(seconds(way, model.device))
    fastest = {name: min(rounds) for name, rounds in times.items()}
    best_pass = min(value for name, value in fastest.items() if name.startswith("cache"))
    return {
        "subject": subject.name,
        "hidden_size": model.config.hidden_size,
        "num_tokens": int(tokens.lengths.sum()),
        "seconds": times,
        "cache_over_forward": fastest["cache"] / fastest["forward"],
        "dense_over_cache": fastest["dense"] / fastest["cache"],
        "speed_over_best_batch": best_pass / fastest["cache"],
        "tokens_per_second": tokens.lengths.sum() / fastest["cache"],
    }


def main(config: Config) -> None:
    """Measures every model and prints the table."""
    device = pick_device(config.device)
    tokens_per_batch = config.tokens_per_batch or Run().batch_tokens(device)
    subjects = (real_subjects if config.model_name else random_subjects)(config, device)
    columns = ("cache s", "forward s", "dense s", "cache/forward", "dense/cache", "tokens/s", "of best batch")
    rows, lines = [], [f"{'':<24}" + "".join(f"{column:>15}" for column in columns)]
    for subject in subjects:
        rows.append(row := measure(subject, config, tokens_per_batch))
        numbers = [min(row["seconds"][name]) for name in ("cache", "forward", "dense")]
        numbers += [row["cache_over_forward"], row["dense_over_cache"], row["tokens_per_second"]]
        lines.append(f"{subject.name:<24}" + "".join(f"{x:15.2f}" for x in (*numbers, row["speed_over_best_batch"])))
    print("\n".join(lines))
    padding = padding_rows(config, tokens_per_batch) if config.model_name else []
    for row in padding:
        print(f"{row['num_texts']:6d} texts in {row['num_batches']} batches: padded / tokens {row['padding']:.3f}")
    name = f"bench_cache.{path_name(config.model_name)}.json" if config.model_name else "bench_cache.json"
    path = config.results_dir / "benchmarks" / name
    result = {"threads": torch.get_num_threads(), "device": str(device), "tokens_per_batch": tokens_per_batch}
    result |= {"rows": rows, "padding": padding}
    save_json(path, {"config": all_settings(config), "environment": environment(), **result})
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
