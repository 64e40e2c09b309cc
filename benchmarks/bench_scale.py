"""What cache.py costs with more texts, longer texts and wider models: time linear in tokens, memory flat in texts.

    python -m benchmarks.bench_scale
    python -m benchmarks.bench_scale --num_texts 1000 4000 --lengths 16 128 --hidden_sizes 64 128 --device cpu

Random Qwen2 models read texts of one-token words, so that a text has as many tokens as asked for. Each point runs
cache.py from the file of texts to the file of moments, in a process of its own: its peak memory is that of this point
alone, libraries and model included. Seconds are those of cache.py without the start of Python and the libraries.

    texts    of --length tokens at the smallest width, one point for each of --num_texts
    length   of --length_tokens tokens in all, one point for each of --lengths
    width    the first of --num_texts, one point for each of --hidden_sizes

Writes results/benchmarks/bench_scale.json.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import contextlib
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import cache
from benchmarks.harness import write_result
from utils.models.load import load_config, load_tokenizer
from utils.results import open_tensors
from utils.script import run_script
from utils.settings import Model, Run, with_values

NUM_LAYERS = 2  # decoder layers: what is measured is how the cost grows
MAX_POSITIONS = 4096


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    num_texts: tuple[int, ...] = (1_000, 10_000, 100_000)  # texts of --length tokens each
    length: int = 32  # tokens of a text, where the number of texts or the width changes
    lengths: tuple[int, ...] = (16, 64, 256, 1024, 2048)  # tokens of a text, of --length_tokens in all
    length_tokens: int = 131_072  # tokens in all, where the length changes
    hidden_sizes: tuple[int, ...] = (64, 128, 256, 512)  # d
    device: str = "cpu"  # cpu or cuda
    results_dir: Path = Path("results")  # where the result goes

    def __post_init__(self) -> None:
        counts = (*self.num_texts, *self.lengths, *self.hidden_sizes, self.length, self.length_tokens)
        if min(map(len, (self.num_texts, self.lengths, self.hidden_sizes))) < 1 or min(counts) < 1:
            raise ValueError("--num_texts, --lengths and --hidden_sizes need numbers of at least 1")


# ------------------------------------------------------------------ models and texts
def tiny_tokenizer() -> Any:
    """The tokenizer of `tiny`, 4,096 tokens."""
    model, run = Model("tiny"), Run()
    return load_tokenizer(model, run, load_config(model, run))


def make_model(folder: Path, hidden_size: int) -> str:
    """A random model of this width with the tokenizer of `tiny`; the name that cache.py takes."""
    path = folder / f"width-{hidden_size}"
    if not path.is_dir():
        tokenizer = tiny_tokenizer()
        qwen2 = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=max(1, hidden_size // 64),
            num_key_value_heads=1,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(qwen2, dtype=torch.float32).save_pretrained(path)
        tokenizer.model_max_length = MAX_POSITIONS  # that of `tiny` would cut the longest texts
        tokenizer.save_pretrained(path)
    return str(path)


def one_token_words() -> list[str]:
    """Words that are one token each behind a blank, whatever stands before them."""
    tokenizer = tiny_tokenizer()
    pieces = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return [piece for piece in pieces if piece.startswith(" ") and piece[1:].isalpha() and piece.isascii()][:500]


def make_rows(folder: Path, num_texts: int, length: int) -> str:
    """A file of `num_texts` texts of `length` tokens and one of two labels; the name that cache.py takes."""
    path = folder / f"{num_texts}-texts-of-{length}.jsonl"
    words, random = np.array(one_token_words()), np.random.default_rng(0)
    with open(path, "w") as file:
        for row in range(num_texts):
            text = "".join(words[random.integers(0, len(words), length)])
            file.write(json.dumps({"text": text, "label": "ab"[row % 2]}) + "\n")
    return str(path)


# ------------------------------------------------------------------ one point, in a process of its own
def measure(model_name: str, dataset_name: str, results_dir: Path, device: str) -> dict[str, Any]:
    """Runs cache.py; returns its seconds, tokens, texts, and the peak memory of the process."""
    values: dict[str, Any] = {"model_name": model_name, "dataset_name": dataset_name, "results_dir": results_dir}
    config = with_values(cache.Config(), **values, split="all", device=device, product_dtype="float32")
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cache.main(config)
    seconds = time.perf_counter() - start
    with open("/proc/self/status") as file:  # on Linux not the peak of the process that started this one
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    with open_tensors(cache.config_path(config)) as (_, metadata):
        found = {name: metadata[name] for name in ("num_samples", "num_tokens")}
    return {**found, "seconds": seconds, "peak_mb": peak}


def points(config: Config) -> Iterator[tuple[str, int, int, int]]:
    """Series, number of texts, tokens of each, and width of every point."""
    width = min(config.hidden_sizes)
    yield from (("texts", number, config.length, width) for number in config.num_texts)
    yield from (("length", max(2, config.length_tokens // length), length, width) for length in config.lengths)
    yield from (("width", config.num_texts[0], config.length, d) for d in config.hidden_sizes)


def measure_all(config: Config) -> pd.DataFrame:
    """A row per point."""
    rows = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (series, num_texts, length, hidden_size) in enumerate(points(config)):
            model, data = make_model(folder, hidden_size), make_rows(folder, num_texts, length)
            with ProcessPoolExecutor(1, context) as process:
                found = process.submit(measure, model, data, folder / f"results-{number}", config.device).result()
            assert found["num_tokens"] == num_texts * length, "a text has as many tokens as asked for"
            rows.append({"series": series, "length": length, "hidden_size": hidden_size, **found})
            print("{series:>7} {num_samples:8,} texts x {length:5,} tokens, d = {hidden_size:4}: {seconds:8.2f} s "
                  "{peak_mb:7.0f} MB".format(**rows[-1]), flush=True)  # fmt: skip
    table = pd.DataFrame(rows)
    table["tokens_per_second"] = table["num_tokens"] / table["seconds"]
    return table


# ------------------------------------------------------------------ claims
def summarize(table: pd.DataFrame) -> dict[str, float]:
    """The claims as numbers: seconds for a token of the largest point over those of the one before; memory growth."""
    texts = table[table["series"] == "texts"].sort_values("num_samples")
    length = table[table["series"] == "length"].sort_values("length")
    summary = {"peak_memory_most_over_fewest_texts": texts["peak_mb"].iloc[-1] / texts["peak_mb"].iloc[0]}
    if len(texts) > 1:  # of what comes on top, so that what a run costs by itself is in neither
        more = texts[["seconds", "num_tokens", "peak_mb", "num_samples"]].diff().iloc[1:]
        cost = more["seconds"] / more["num_tokens"]
        summary["seconds_per_added_token_last_over_first"] = cost.iloc[-1] / cost.iloc[0]
        summary["kilobytes_per_added_text"] = 1024 * (more["peak_mb"] / more["num_samples"]).iloc[-1]
    summary["seconds_longest_over_shortest_texts"] = length["seconds"].iloc[-1] / length["seconds"].iloc[0]
    return summary


def main(config: Config) -> None:
    """Measures every point, prints the table and the claims."""
    table = measure_all(config)
    summary = summarize(table)
    for name, value in summary.items():
        print(f"{name.replace('_', ' ')}: {value:.3g}")
    write_result(config, "bench_scale", {"summary": summary, "rows": table.to_dict("records")})


if __name__ == "__main__":
    run_script(main, Config, __doc__)
