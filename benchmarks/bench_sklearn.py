"""Logistic probes of all layers: linear_sklearn.py's lbfgs against saga as the paper runs it, on the same features.

    python -m benchmarks.bench_sklearn
    python -m benchmarks.bench_sklearn --model_name Qwen/Qwen2-0.5B --dataset_name emotion

The features are those of linear_sklearn.py (made if they are not there), standardised once, float32. In every round
each layer is fitted by both: `fit_logistic` with its defaults, and LogisticRegression(solver="saga", max_iter=1000,
tol=0.01); ratios are of the sums over layers of the fastest rounds. scikit-learn's lbfgs from zero is beside them, to
show what the preconditioned start is worth. One process, layer after layer. Beyond the embedded features, wide ones
are made up (--synthetic n d c): Gaussian, with an uneven spectrum and labels of a noisy linear rule.
Writes results/benchmarks/bench_sklearn.json.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import linear_sklearn
from utils.algebra.pooled import open_pooled
from utils.data.load import load_texts
from utils.results import save_json
from utils.script import environment, run_script
from utils.settings import all_settings, with_values
from utils.training.probes import fit_logistic


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    model_name: str = "tiny"  # hub id, local folder, or "tiny"
    dataset_name: str = "docstrings/library"  # a classification dataset
    synthetic: tuple[int, int, int] = (8000, 896, 6)  # n, d, c of the features made up
    num_rounds: int = 3  # rounds; the fastest counts
    results_dir: Path = Path("results")  # where features are read and the result goes


def cached_features(config: Config) -> tuple[list[Tensor], np.ndarray]:
    """Standardised float32 features of every layer, each (n, d), and the labels (n,)."""
    names = {"model_name": config.model_name, "dataset_name": config.dataset_name, "results_dir": config.results_dir}
    probe = with_values(linear_sklearn.Config(), **names)
    data = load_texts(probe.data, probe.run, "train")
    path = linear_sklearn.find_features(probe, "train", data)
    pooled = open_pooled(path)
    return [torch.from_numpy(StandardScaler().fit_transform(layer)) for layer in pooled], data.labels


def made_up_features(n: int, d: int, c: int) -> tuple[list[Tensor], np.ndarray]:
    """One layer of Gaussian features, variances falling as 1/k in a random basis, and labels of a noisy linear rule."""
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(d, d)))[0] / np.sqrt(np.arange(1, d + 1))[:, None]
    features = StandardScaler().fit_transform(random.normal(size=(n, d)) @ basis).astype(np.float32)
    logits = features @ random.normal(size=(d, c)) / np.sqrt(d) * 2 + random.gumbel(size=(n, c))
    return [torch.from_numpy(features)], logits.argmax(1)


SOLVERS: dict[str, Callable[[Tensor, np.ndarray], LogisticRegression]] = {
    "ours": lambda x, y: fit_logistic(x, y, linear_sklearn.Config())[0],
    "saga": lambda x, y: LogisticRegression(solver="saga", max_iter=1000, tol=0.01, random_state=0).fit(x.numpy(), y),
    "lbfgs from zero": lambda x, y: LogisticRegression(max_iter=10_000).fit(x.numpy(), y),
}


def measure(layers: list[Tensor], labels: np.ndarray, num_rounds: int) -> dict:
    """Seconds of every round and train log-loss of every layer, by solver; all solvers in every round."""
    results: dict = {name: {"seconds": [], "log_loss": [], "num_iterations": []} for name in SOLVERS}
    for round_number in range(num_rounds):
        for entry in results.values():
            entry["seconds"].append(0.0)
        for features in layers:
            for name, fit in SOLVERS.items():
                start = time.perf_counter()
                model = partial(fit, features, labels)()
                results[name]["seconds"][-1] += time.perf_counter() - start
                if round_number == 0:
                    probabilities = model.predict_proba(features.numpy()).astype(np.float64)
                    probabilities /= probabilities.sum(1, keepdims=True)
                    results[name]["log_loss"].append(float(log_loss(labels, probabilities)))
                    results[name]["num_iterations"].append(int(model.n_iter_[0]))
    return results


def main(config: Config) -> None:
    """Measures both sets of features and prints the table."""
    n, d, c = config.synthetic
    tasks = {f"{config.model_name} {config.dataset_name}": cached_features(config)}
    tasks[f"made up, n {n} d {d} c {c}"] = made_up_features(n, d, c)
    rows = []
    for name, (layers, labels) in tasks.items():
        measured = measure(layers, labels, config.num_rounds)
        fastest = {solver: min(entry["seconds"]) for solver, entry in measured.items()}
        losses = {solver: float(np.mean(entry["log_loss"])) for solver, entry in measured.items()}
        rows.append({"task": name, "num_layers": len(layers), "measured": measured})
        rows[-1]["saga_over_ours"] = fastest["saga"] / fastest["ours"]
        print(f"{name}: {len(layers)} layers")
        for solver in SOLVERS:
            print(f"  {solver:<16}{fastest[solver]:9.3f} s   mean train log-loss {losses[solver]:.6f}", end="")
            print(f"   {fastest[solver] / fastest['ours']:6.1f} times ours")
        pairs = zip(measured["ours"]["log_loss"], measured["saga"]["log_loss"], strict=True)
        rows[-1]["loss_at_most_saga_s"] = all(ours <= saga for ours, saga in pairs)
        print(f"  log-loss at most saga's at every layer: {'yes' if rows[-1]['loss_at_most_saga_s'] else 'NO'}")
    path = config.results_dir / "benchmarks" / "bench_sklearn.json"
    content = {"config": all_settings(config), "environment": environment(), "threads": torch.get_num_threads()}
    save_json(path, {**content, "rows": rows})
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
