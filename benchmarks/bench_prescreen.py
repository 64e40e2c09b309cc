"""prescreen.py against TransformerRanker 0.2.0: same models, same rows; time, memory, ranking, and who is right.

    python -m benchmarks.bench_prescreen
    python -m benchmarks.bench_prescreen --models tiny --dataset_name docstrings/kind --max_samples 300

By default `tiny`, and `smollm2` where it is installed, on rotten_tomatoes where NTPS_DATASETS_DIR has it, else on
docstrings. Both run in a process of their own on the same texts. TransformerRanker gives one score of all layers
(H-score, best layer); prescreen.py gives every score of every layer, the baselines and the page. TransformerRanker is
installed into results/benchmarks/transformer-ranker/ if it is not there (pip, without its dependencies but
torchmetrics). Who is right is judged by linear_sklearn.py: test accuracy of a logistic probe on the best layer, not
timed. Before that, TransformerRanker's estimators and our formulas see the same flowers of iris: they must give its
golden values.
Writes results/benchmarks/bench_prescreen.json.
"""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_iris
from transformers import AutoModelForCausalLM

import linear_sklearn
from prescreen import is_installed
from utils.algebra.features import feature_scores
from utils.algebra.moments import LayerMoments
from utils.data.load import LabelledTexts, load_splits
from utils.models.identity import read_config
from utils.models.load import load_causal_lm, load_tokenizer
from utils.models.table import model_source
from utils.results import load_json, result_path, save_json
from utils.script import ROOT, UserError, environment, run_script
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
GOLDEN = """
import json, torch
from sklearn.datasets import load_iris
from transformer_ranker.estimators import HScore, LogME
features, labels = (torch.tensor(array) for array in load_iris(return_X_y=True))
features = features.float()
print(json.dumps({"h_ledoit_wolf": HScore().fit(features, labels), "logme": float(LogME().fit(features, labels))}))
"""
# of its own tests; float32 in its root of class counts and in its constant costs it digits
GOLDEN_VALUES = {"h_ledoit_wolf": (1.177842480406727, 1e-10), "logme": (-0.16006022033609904, 1e-7)}


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    models: tuple[str, ...] = ()  # known to prescreen.py; none: smollm2 where it is installed, and tiny
    dataset_name: str = ""  # a classification dataset; none: rotten_tomatoes where it is there, or docstrings/library
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


def golden_values(peer: Path) -> dict[str, dict[str, float]]:
    """TransformerRanker's scores of iris, ours, and the golden values of its tests.

    Raises:
        UserError: one of them is not what it should be.
    """
    theirs = json.loads(measured(["-c", GOLDEN], peer)[0].strip().splitlines()[-1])
    features, labels = load_iris(return_X_y=True)
    x, y = torch.from_numpy(features).float().double(), torch.eye(3, dtype=torch.float64)[torch.from_numpy(labels)]
    norms, n, none = x.square().sum(1), len(x), torch.zeros(0)
    moments = LayerMoments(
        *(x.T @ x / n, x.T @ y / n, x.mean(0), none, none, none, none, y.mean(0), y.T @ y / n, n, 0),
        class_counts=y.sum(0), pooled_norm_fourth_power=norms.square().mean(), pooled_norm_squared_pooled=norms @ x / n,
    )  # fmt: skip
    scores = feature_scores(moments).scores
    found = {}
    for name, (golden, tolerance) in GOLDEN_VALUES.items():
        found[name] = {"golden": golden, "theirs": theirs[name], "ours": scores[name]["value"]}
        if any(abs(value - golden) > tolerance for value in found[name].values()):
            raise UserError(f"{name} of iris is not the golden value: {found[name]}")
    return found


def share_in_order(scores: dict[str, float], truth: dict[str, float]) -> float:
    """Share of the pairs of models that the scores put in the order of the truth; nan with one model."""
    pairs = [(a, b) for a, b in combinations(truth, 2) if truth[a] != truth[b]]
    right = [(scores[a] > scores[b]) == (truth[a] > truth[b]) for a, b in pairs]
    return sum(right) / len(right) if right else math.nan


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


def filled_in(config: Config) -> Config:
    """The config with models and dataset as they are by default here."""
    there = Run().datasets_dir
    real = there is not None and (there / "rotten_tomatoes").is_dir()
    models = config.models or tuple(name for name in ("smollm2", "tiny") if is_installed(name))
    name = config.dataset_name or ("rotten_tomatoes" if real else "docstrings/library")
    return replace(config, models=models, dataset_name=name)


def run_theirs(config: Config, train: LabelledTexts, peer: Path, folder: Path) -> tuple[dict, dict[str, float]]:
    """TransformerRanker's score of each model, and what it took; a plain copy of a model is made before, untimed."""
    lines = [
        json.dumps({"text": text, "label": int(label)}) for text, label in zip(train.texts, train.labels, strict=True)
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    places = {plain_folder(name, folder / "models"): name for name in config.models}
    arguments = [str((folder / "rows.jsonl").resolve()), str(config.batch_size), config.estimator]
    printed, numbers = measured(["-c", THEIRS, *arguments, *(str(Path(place).resolve()) for place in places)], peer)
    scores = json.loads(printed.strip().splitlines()[-1])
    names = {Path(place).resolve().name: name for place, name in places.items()}
    return {names[Path(place).name]: score for place, score in scores.items()}, numbers


def run_ours(config: Config, data: Data, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """R2 of each model by prescreen.py, and what it took."""
    command = ["prescreen.py", "--models", *config.models, "--dataset_name", config.dataset_name, "--device", "cpu"]
    command += ["--max_samples", str(config.max_samples), "--results_dir", str(folder), "--overwrite"]
    _, numbers = measured(command)
    page = load_json(folder / "prescreen" / f"{data.path_name}.json")
    parts = {name: sum(model[name] for model in page["models"]) for name in ("seconds_of_pass", "seconds_of_scores")}
    return {model["model"]: model["r2"] for model in page["models"]}, numbers | parts


def main(config: Config) -> None:
    """Runs both, then the probes, and prints the table."""
    config, folder = filled_in(config), config.results_dir / "benchmarks"
    peer, own = (folder / "transformer-ranker").resolve(), folder / "bench_prescreen"
    own.mkdir(parents=True, exist_ok=True)
    install_peer(peer)
    golden = golden_values(peer)
    data = Data(config.dataset_name, max_samples=config.max_samples)
    train = load_splits(data, Run())["train"]
    scores, theirs = run_theirs(config, train, peer, own)
    r2, ours = run_ours(config, data, own / "ours")
    truth = {name: probe_accuracy(name, config) for name in config.models}
    result: dict[str, Any] = {
        "golden": golden,
        "num_texts": len(train.texts),
        "transformer_ranker": theirs | {"scores": scores, "in_order": share_in_order(scores, truth)},
        "prescreen": ours | {"r2": r2, "in_order": share_in_order(r2, truth)},
        "probe_accuracy": truth,
    }
    print(f"\n{'':<20}{'seconds':>9}{'CPU s':>9}{'GiB':>7}{'pairs of models in true order':>32}")
    for name, numbers in (("TransformerRanker", result["transformer_ranker"]), ("prescreen.py", result["prescreen"])):
        cost = f"{numbers['seconds']:9.1f}{numbers['cpu_seconds']:9.1f}{numbers['peak_gigabytes']:7.2f}"
        print(f"{name:<20}{cost}{numbers['in_order']:32.2f}")
    print(f"of prescreen.py: the pass {ours['seconds_of_pass']:.1f} s, all scores {ours['seconds_of_scores']:.1f} s")
    print(f"TransformerRanker, {config.estimator}: {scores}\nprescreen.py, R2: {r2}")
    print(f"accuracy of the best layer's logistic probe: {truth}")
    path = folder / "bench_prescreen.json"
    save_json(path, {"config": all_settings(config), "environment": environment(), **result})
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
