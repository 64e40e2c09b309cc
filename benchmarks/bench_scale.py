"""What cache.py costs with more texts and with longer texts: time linear in tokens, memory flat in texts.

    python -m benchmarks.bench_scale
    python -m benchmarks.bench_scale --num_texts 1000 4000 --lengths 16 128 --device cpu

A random Qwen2 model reads texts of one-token words, so that a text has as many tokens as asked for. Each point runs
cache.py from the file of texts to the file of moments, in a process of its own: its peak memory is that of this point
alone, libraries and model included. Seconds are those of cache.py without the start of Python and the libraries.

    texts    of --length tokens, one point for each of --num_texts
    length   of --length_tokens tokens in all, one point for each of --lengths

Writes results/benchmarks/bench_scale.json.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen2Config

import cache
from benchmarks.harness import write_result
from utils.models.load import load_config, load_tokenizer
from utils.results import open_tensors
from utils.script import run_script
from utils.settings import Model, Run, with_values

MAX_POSITIONS = 4096


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    num_texts: tuple[int, ...] = (1_000, 10_000, 100_000)  # texts of --length tokens each
    length: int = 32  # tokens of a text, where the number of texts changes
    lengths: tuple[int, ...] = (16, 64, 256, 1024, 2048)  # tokens of a text, of --length_tokens in all
    length_tokens: int = 131_072  # tokens in all, where the length changes
    device: str = "cpu"  # cpu or cuda
    results_dir: Path = Path("results")  # the result goes there

    def __post_init__(self) -> None:
        if len(set(self.num_texts)) < 2 or not self.lengths or min(*self.num_texts, *self.lengths) < 1:
            raise ValueError("--num_texts needs two numbers and --lengths one, of at least 1: growth is measured")


# ------------------------------------------------------------------ model and texts
def make_model(folder: Path) -> PreTrainedTokenizerBase:
    """Writes a random model of two layers with the tokenizer of `tiny`, 4,096 tokens, and returns the tokenizer."""
    tiny, run = Model("tiny"), Run()
    tokenizer = load_tokenizer(tiny, run, load_config(tiny, run))
    qwen2 = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(qwen2, dtype=torch.float32).save_pretrained(folder)
    tokenizer.model_max_length = MAX_POSITIONS  # that of `tiny` would cut the longest texts
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_rows(path: Path, tokenizer: PreTrainedTokenizerBase, num_texts: int, length: int) -> None:
    """Writes `num_texts` texts of `length` words, each one token behind a blank, with one of two labels."""
    pieces = [str(tokenizer.decode([token])) for token in range(len(tokenizer))]
    words = [piece for piece in pieces if piece.startswith(" ") and piece[1:].isalpha() and piece.isascii()][:500]
    random = np.random.default_rng(0)
    with open(path, "w") as file:
        for row in range(num_texts):
            text = "".join(np.array(words)[random.integers(0, len(words), length)])
            file.write(json.dumps({"text": text, "label": "ab"[row % 2]}) + "\n")


# ------------------------------------------------------------------ one point, in a process of its own
def measure(model_name: str, dataset_name: str, results_dir: Path, device: str) -> dict[str, Any]:
    """Runs cache.py; returns its seconds, tokens, texts, and the peak memory of the process."""
    values: dict[str, Any] = {"model_name": model_name, "dataset_name": dataset_name, "results_dir": results_dir}
    config = with_values(cache.Config(), **values, split="all", device=device, product_dtype="float32")
    start = time.perf_counter()
    cache.main(config)
    seconds = time.perf_counter() - start
    with open("/proc/self/status") as file:  # on Linux not the peak of the process that started this one
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    with open_tensors(cache.config_path(config)) as (_, metadata):
        found = {name: metadata[name] for name in ("num_samples", "num_tokens")}
    return {**found, "seconds": seconds, "peak_mb": peak}


def measure_all(config: Config) -> pd.DataFrame:
    """A row per point."""
    points = [("texts", number, config.length) for number in config.num_texts]
    points += [("length", max(2, config.length_tokens // length), length) for length in config.lengths]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_model(folder / "model")
        for number, (series, num_texts, length) in enumerate(points):
            data = folder / f"{number}.jsonl"
            make_rows(data, tokenizer, num_texts, length)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                arguments = (str(folder / "model"), str(data), folder / f"results-{number}", config.device)
                found = process.submit(measure, *arguments).result()
            assert found["num_tokens"] == num_texts * length, "a text has as many tokens as asked for"
            rows.append({"series": series, "length": length, **found})
    table = pd.DataFrame(rows)
    table["tokens_per_second"] = table["num_tokens"] / table["seconds"]
    return table


def summarize(table: pd.DataFrame) -> dict[str, float]:
    """The claims as numbers: seconds for a token of the largest point over those of the one before; memory growth."""
    texts = table[table["series"] == "texts"].sort_values("num_samples")
    length = table[table["series"] == "length"].sort_values("length")
    # differences: the cost of a run by itself is in neither
    added = texts[["seconds", "num_tokens", "peak_mb", "num_samples"]].diff().iloc[1:]
    cost = added["seconds"] / added["num_tokens"]
    return {
        "peak_memory_most_over_fewest_texts": texts["peak_mb"].iloc[-1] / texts["peak_mb"].iloc[0],
        "seconds_per_added_token_last_over_first": cost.iloc[-1] / cost.iloc[0],
        "kilobytes_per_added_text": 1024 * (added["peak_mb"] / added["num_samples"]).iloc[-1],
        "seconds_longest_over_shortest_texts": length["seconds"].iloc[-1] / length["seconds"].iloc[0],
    }


def main(config: Config) -> None:
    """Measures every point, prints the table and the claims."""
    table = measure_all(config)
    summary = summarize(table)
    print(table.to_string(index=False, float_format="%.3g"))
    print(pd.Series(summary).to_string(float_format="%.3g"))
    write_result(config, "bench_scale", {"summary": summary, "rows": table.to_dict("records")})


if __name__ == "__main__":
    run_script(main, Config, __doc__)
