"""Compare prescreen.py with TransformerRanker 0.2.0 on the same models and rows: time, memory and scores.

    python -m benchmarks.bench_prescreen --models smollm2 tiny --dataset_name rotten_tomatoes

Each runs in a process of its own on the same texts. TransformerRanker gives one score of all layers (H-score, best
layer); prescreen.py gives every score of every layer, the baselines and the page. The script
installs TransformerRanker (pip; of its dependencies only torchmetrics) into results/benchmarks/transformer-ranker/.
Writes results/benchmarks/bench_prescreen.json.
"""

import json
import site
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import in_own_process, write_result
from utils.data.load import load_splits
from utils.models.load import load_causal_lm, load_tokenizer, read_config
from utils.models.table import model_source
from utils.results import read_stored
from utils.script import run_script
from utils.settings import Data, Model, Run

PEER = ("transformer-ranker==0.2.0", "torchmetrics==1.8.2", "lightning-utilities==0.15.2")


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    models: tuple[str, ...] = ("tiny", "micro")  # known to prescreen.py
    data: Data = Data(max_samples=2000)  # a classification dataset
    run: Run = Run(device="cpu")


def plain_folder(name: str, folder: Path) -> str:
    """A folder that transformers can load: the model's own, or a converted copy of its GGUF file."""
    source, target = Path(model_source(name)), folder / name
    if source.is_dir():
        return str(source.resolve())
    if not (target / "config.json").is_file():
        model, run = Model(name), Run()
        load_tokenizer(model, run, read_config(model, run)).save_pretrained(target)
        load_causal_lm(model, run).save_pretrained(target)
    return str(target.resolve())


def run_theirs(config: Config, peer: Path, rows: Path, models: list[str]) -> dict[str, float]:
    """Runs TransformerRanker; returns its score of each model."""
    site.addsitedir(str(peer))
    from datasets import load_dataset
    from transformer_ranker import TransformerRanker

    ranker = TransformerRanker(load_dataset("json", data_files=str(rows), split="train"))
    options = {"estimator": "hscore", "layer_aggregator": "bestlayer", "device": config.run.device}
    result = ranker.run(models, batch_size=32, **options)  # its defaults
    return {name: float(score) for name, score in result.scores.items()}


def run_ours(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Runs prescreen.py; returns its ranked models."""
    import prescreen

    run = replace(config.run, results_dir=folder, overwrite=True)
    prescreen.main(prescreen.Config(models=config.models, data=config.data, run=run))
    return read_stored(folder / "prescreen" / f"{config.data.path_name}.json")["models"]


def main(config: Config) -> None:
    """Runs both and prints the table; first, untimed, makes plain copies of GGUF models."""
    folder = config.run.results_dir.resolve() / "benchmarks" / "bench_prescreen"
    folder.mkdir(parents=True, exist_ok=True)
    peer, rows = folder.with_name("transformer-ranker"), folder / "rows.jsonl"
    if not (peer / "transformer_ranker").is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", peer, *PEER], check=True)
    train = load_splits(config.data, config.run)["train"]
    lines = [{"text": text, "label": int(label)} for text, label in zip(train.texts, train.labels, strict=True)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = [plain_folder(name, folder / "models") for name in config.models]
    theirs, their_cost = in_own_process(run_theirs, config, peer, rows, plain)
    ours, our_cost = in_own_process(run_ours, config, folder / "ours")
    parts = {name: sum(model[name] for model in ours) for name in ("seconds_of_pass", "seconds_of_scores")}
    result = {
        "transformer_ranker": {**their_cost, "scores": theirs},
        "prescreen": {**our_cost, **parts, "scores": {model["model"]: model["r2"] for model in ours}},
    }
    for name, row in result.items():
        cost = f"{row['seconds']:9.1f} s, {row['cpu_seconds']:9.1f} CPU s, {row['peak_mb'] / 1024:6.2f} GiB"
        print(f"{name:<20}{cost}, {row['scores']}")
    write_result(config, "bench_prescreen", {"num_texts": len(train.texts), **result})


if __name__ == "__main__":
    run_script(main, Config, __doc__)
