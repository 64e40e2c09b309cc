"""prescreen.py against TransformerRanker 0.2.0: same models, same rows; time, memory, ranking, and who is right.

    python -m benchmarks.bench_prescreen
    python -m benchmarks.bench_prescreen --models smollm2 tiny --dataset_name rotten_tomatoes --max_samples 600

Both run in a process of their own on the same texts. TransformerRanker gives one score of all layers (H-score, best
layer); prescreen.py gives every score of every layer, the baselines and the page. It is installed into
results/benchmarks/transformer-ranker/ if it is not there (pip, without its dependencies but torchmetrics).
Who is right is judged by linear_sklearn.py: test accuracy of a logistic probe on the best layer, not timed.
Writes results/benchmarks/bench_prescreen.json.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import linear_sklearn
from utils.data import load_splits
from utils.identity import read_config
from utils.io import ROOT, UserError, environment, load_json, run_script, save_json
from utils.model_table import model_source
from utils.models import load_causal_lm, load_tokenizer
from utils.results import result_path
from utils.settings import Data, Model, Run, all_settings, with_values

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

    models: tuple[str, ...] = ("tiny",)  # known to prescreen.py
    dataset_name: str = "docstrings/library"  # a classification dataset
    max_samples: int = 2000  # training rows
    estimator: str = "hscore"  # TransformerRanker's score
    batch_size: int = 32  # TransformerRanker's default
    results_dir: Path = Path("results")  # where the result goes


def measured(command: list[str], folder: Path | None = None) -> tuple[str, dict[str, float]]:
    """What a process printed; its seconds on the clock and on the processor, and the most memory it held, GiB.

    Args:
        command: arguments behind `python`.
        folder: put before everything else that Python imports.

    Raises:
        UserError: it failed.
    """
    start, places = time.perf_counter(), {} if folder is None else {"PYTHONPATH": str(folder)}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, **places}
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{' '.join(command[:3])} failed; its messages are above.")
    numbers = {"seconds": time.perf_counter() - start, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    return printed, numbers | {"peak_gigabytes": usage.ru_maxrss / 2**20}


def install_peer(folder: Path) -> None:
    """Installs TransformerRanker into a folder, unless it is there."""
    if not (folder / "transformer_ranker").is_dir():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *PEER], check=True
        )


def plain_folder(name: str, folder: Path) -> str:
    """A folder that transformers loads by itself: the model's own, or a copy of what was a GGUF file."""
    source = Path(model_source(name))
    if source.is_dir() and list(source.glob("*.safetensors")):
        return str(source)
    target = folder / name
    if not (target / "config.json").is_file():
        model, run = Model(name), Run(device="cpu")
        config = read_config(model, run)
        copy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        copy.load_state_dict(load_causal_lm(model, run, torch.device("cpu")).state_dict())
        load_tokenizer(model, run, config).save_pretrained(target)
        copy.save_pretrained(target)
    return str(target)


def probe_accuracy(name: str, config: Config) -> float:
    """Test accuracy of the logistic probe of the best layer."""
    settings: dict[str, Any] = {"dataset_name": config.dataset_name, "max_samples": config.max_samples}
    settings |= {"model_name": name, "results_dir": config.results_dir / "benchmarks" / "bench_prescreen"}
    probe = with_values(linear_sklearn.Config(), **settings, picture=False)
    linear_sklearn.main(probe)
    layers = load_json(result_path("linear_sklearn", probe.run, probe.model, probe.data, ".json"))["layers"]
    return max(layer["test"]["accuracy"] for layer in layers)


def main(config: Config) -> None:
    """Runs both, then the probes, and prints the table."""
    folder = config.results_dir / "benchmarks"
    peer, ours = (folder / "transformer-ranker").resolve(), folder / "bench_prescreen" / "ours"
    install_peer(peer)
    data = Data(config.dataset_name, max_samples=config.max_samples)
    train = load_splits(data, Run())["train"]
    rows = folder / "bench_prescreen" / "rows.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": text, "label": int(label)}) for text, label in zip(train.texts, train.labels, strict=True)
    ]
    rows.write_text("\n".join(lines) + "\n")
    folders = [plain_folder(name, folder / "bench_prescreen" / "models") for name in config.models]
    printed, theirs = measured(
        ["-c", THEIRS, str(rows.resolve()), str(config.batch_size), config.estimator, *folders], peer
    )
    scores = json.loads(printed.strip().splitlines()[-1])
    command = ["prescreen.py", "--models", *config.models, "--dataset_name", config.dataset_name, "--device", "cpu"]
    command += ["--max_samples", str(config.max_samples), "--results_dir", str(ours), "--overwrite"]
    _, own = measured(command)
    page = load_json(ours / "prescreen" / f"{data.path_name}.json")
    truth = {name: probe_accuracy(name, config) for name in config.models}
    result = {
        "transformer_ranker": theirs | {"scores": scores},
        "prescreen": own | {"r2": {model["model"]: model["r2"] for model in page["models"]}},
        "probe_accuracy": truth,
    }
    print(f"\n{'':<20}{'seconds':>9}{'CPU s':>9}{'GiB':>7}")
    for name, numbers in (("TransformerRanker", theirs), ("prescreen.py", own)):
        print(f"{name:<20}{numbers['seconds']:9.1f}{numbers['cpu_seconds']:9.1f}{numbers['peak_gigabytes']:7.2f}")
    print(f"TransformerRanker, {config.estimator}: {scores}\nprescreen.py, R2: {result['prescreen']['r2']}")
    print(f"accuracy of the best layer's logistic probe: {truth}")
    path = folder / "bench_prescreen.json"
    save_json(path, {"config": all_settings(config), "environment": environment(), **result})
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
