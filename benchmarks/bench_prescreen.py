"""prescreen.py against TransformerRanker 0.2.0: same models, same rows; time, memory and scores.

    python -m benchmarks.bench_prescreen --models smollm2 tiny --dataset_name rotten_tomatoes
    python -m benchmarks.bench_prescreen --models tiny --dataset_name docstrings/kind --max_samples 300

Each runs in a process of its own on the same texts. TransformerRanker gives one score of all layers (H-score, best
layer); prescreen.py gives every score of every layer, the baselines and the page. TransformerRanker is installed into
results/benchmarks/transformer-ranker/ (pip, without its dependencies but torchmetrics) unless it is there.
Writes results/benchmarks/bench_prescreen.json.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import measure_process, write_result
from utils.data.load import LabelledTexts, load_splits
from utils.models.load import load_causal_lm, load_tokenizer, read_config
from utils.models.table import model_source
from utils.results import load_json
from utils.script import run_script
from utils.settings import Data, Model, Run

PEER = ("transformer-ranker==0.2.0", "torchmetrics==1.8.2", "lightning-utilities==0.15.2")
THEIRS = """
import json, sys
from datasets import load_dataset
from transformer_ranker import TransformerRanker
rows, batch_size, estimator, *models = sys.argv[1:]
ranker = TransformerRanker(load_dataset("json", data_files=rows, split="train"))
result = ranker.run(models, batch_size=int(batch_size), estimator=estimator, layer_aggregator="bestlayer", device="cpu")
print(json.dumps({name: float(score) for name, score in result.scores.items()}))
"""


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    models: tuple[str, ...] = ("tiny", "micro")  # known to prescreen.py
    dataset_name: str = "docstrings/library"  # a classification dataset
    max_samples: int = 2000  # training rows
    estimator: str = "hscore"  # TransformerRanker's score
    batch_size: int = 32  # TransformerRanker's default
    results_dir: Path = Path("results")  # the result goes there


def plain_folder(name: str, folder: Path) -> Path:
    """A folder that transformers loads by itself: the model's own, or a copy of a GGUF file."""
    source = Path(model_source(name))
    if source.is_dir():
        return source.resolve()
    target = folder / name
    if not (target / "config.json").is_file():
        model, run = Model(name), Run(device="cpu")
        config = read_config(model, run)
        copy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        copy.load_state_dict(load_causal_lm(model, run, torch.device("cpu")).state_dict())
        load_tokenizer(model, run, config).save_pretrained(target)
        copy.save_pretrained(target)
    return target.resolve()


def run_theirs(config: Config, train: LabelledTexts, folder: Path) -> dict[str, Any]:
    """TransformerRanker's score of each model and its cost; a plain copy of a model is made before, untimed."""
    peer, rows = (folder.parent / "transformer-ranker").resolve(), (folder / "rows.jsonl").resolve()
    if not (peer / "transformer_ranker").is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", peer, *PEER], check=True)
    lines = [{"text": text, "label": int(label)} for text, label in zip(train.texts, train.labels, strict=True)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = [str(plain_folder(name, folder / "models")) for name in config.models]
    printed, numbers = measure_process(
        ["-c", THEIRS, str(rows), str(config.batch_size), config.estimator, *models], peer
    )
    return {**numbers, "scores": json.loads(printed.strip().splitlines()[-1])}


def run_ours(config: Config, folder: Path) -> dict[str, Any]:
    """R2 of each model by prescreen.py, and its cost."""
    command = ["prescreen.py", "--models", *config.models, "--dataset_name", config.dataset_name, "--device", "cpu"]
    command += ["--max_samples", str(config.max_samples), "--results_dir", str(folder), "--overwrite"]
    _, numbers = measure_process(command)
    page = load_json(folder / "prescreen" / f"{Data(config.dataset_name).path_name}.json")
    parts = {name: sum(model[name] for model in page["models"]) for name in ("seconds_of_pass", "seconds_of_scores")}
    return {**numbers, **parts, "scores": {model["model"]: model["r2"] for model in page["models"]}}


def main(config: Config) -> None:
    """Runs both and prints the table."""
    folder = config.results_dir.resolve() / "benchmarks" / "bench_prescreen"
    folder.mkdir(parents=True, exist_ok=True)
    train = load_splits(Data(config.dataset_name, max_samples=config.max_samples), Run())["train"]
    result = {"transformer_ranker": run_theirs(config, train, folder), "prescreen": run_ours(config, folder / "ours")}
    for name, row in result.items():
        cost = f"{row['seconds']:9.1f} s, {row['cpu_seconds']:9.1f} CPU s, {row['peak_gigabytes']:6.2f} GiB"
        print(f"{name:<20}{cost}, {row['scores']}")
    ours = result["prescreen"]
    print(f"prescreen.py: the pass {ours['seconds_of_pass']:.1f} s, all scores {ours['seconds_of_scores']:.1f} s")
    write_result(config, "bench_prescreen", {"num_texts": len(train.texts), **result})


if __name__ == "__main__":
    run_script(main, Config, __doc__)
