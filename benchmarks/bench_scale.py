"""Measure cache.py with more texts and with longer texts: time linear in tokens, memory flat in texts.

    python -m benchmarks.bench_scale

A random model of two layers reads texts of one-token words. For each of `SIZES` (texts, tokens of each text) cache.py
runs in its own process, from the file of texts to the file of moments. Peak memory is that of this process, with
libraries and model; seconds do not count its start.
Writes results/benchmarks/bench_scale.json.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import cache
from benchmarks.harness import in_own_process, random_model, write_result
from utils.models.table import model_source
from utils.results import read_stored
from utils.script import run_script
from utils.settings import Run, with_values

SIZES = ((1_000, 32), (10_000, 32), (100_000, 32), (8_192, 16), (2_048, 64), (512, 256), (128, 1024), (64, 2048))
# each is one token of `tiny` if a blank precedes it
WORDS = ("the", "of", "is", "to", "in", "for", "with", "from", "value", "name", "type", "file", "list", "object", "set")


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    run: Run = Run(device="cpu")


def main(config: Config) -> None:
    """Runs cache.py for every size, on texts with one of two labels and a blank before every word; prints the table."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model("small", "float32", torch.device("cpu")).save_pretrained(folder / "model")
        shared = {"model_name": str(folder / "model"), "tokenizer_name": model_source("tiny"), "results_dir": folder}
        shared |= {"split": "all", "device": config.run.device, "product_dtype": "float32"}
        for number, (num_texts, length) in enumerate(SIZES):
            random, data = np.random.default_rng(0), folder / f"{number}.csv"
            texts = [" " + " ".join(random.choice(WORDS, length)) for _ in range(num_texts)]
            pd.DataFrame({"text": texts, "label": np.arange(num_texts) % 2}).to_csv(data, index=False)
            run = with_values(cache.Config(), dataset_name=str(data), max_length=length, **shared)
            _, cost = in_own_process(cache.main, run)
            num_tokens = read_stored(cache.config_path(run))["num_tokens"]
            assert num_tokens == num_texts * length, "a text has as many tokens as words"
            rows.append({"num_texts": num_texts, "length": length, "num_tokens": num_tokens, **cost})
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3g", na_rep=""))
    write_result(config, "bench_scale", {"rows": rows})


if __name__ == "__main__":
    run_script(main, Config, __doc__)
