"""What one layer of K_sweep.py costs, against three symmetric eigendecompositions of that size.

    python -m benchmarks.bench_k_sweep
    python -m benchmarks.bench_k_sweep --device cuda --hidden_sizes 896 4096

`layer` is NTPS with its variants, bounds and nulls; `closed form` is every other score of the layer (H-score, LogME,
ridge, ...), judged by a second split. The measure is `scipy.linalg.eigh` with its default driver, on a GPU
`torch.linalg.eigh`, three times, on the layer's own matrices; all run in every round, ratios are of the fastest rounds.

Writes results/benchmarks/bench_k_sweep.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import scipy.linalg
import torch

import K_sweep
from benchmarks.bench_cache import seconds
from utils.algebra.features import feature_scores
from utils.algebra.moments import LayerMoments
from utils.results import save_json
from utils.script import environment, pick_device, run_script
from utils.settings import all_settings


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    hidden_sizes: tuple[int, ...] = (512, 896, 2048)  # d
    num_classes: int = 6  # c
    num_rounds: int = 3  # rounds; the fastest counts
    device: str = "cpu"  # where all is solved
    results_dir: Path = Path("results")  # where the result goes


def make_moments(hidden_size: int, num_classes: int, device: torch.device) -> LayerMoments:
    """Moments of random states with an uneven spectrum: 4 d pooled states, 16 d tokens in texts of 32."""
    generator = torch.Generator().manual_seed(0)
    n, num_texts = 4 * hidden_size, hidden_size // 2
    spectrum = torch.logspace(0, -2, hidden_size, dtype=torch.float64)
    features = (torch.randn(n, hidden_size, dtype=torch.float64, generator=generator) + 0.5) * spectrum
    features = features.to(device)
    targets = torch.nn.functional.one_hot(torch.arange(n, device=device) % num_classes, num_classes).double()
    features[:, : num_classes - 1] += targets[:, 1:]
    states = (torch.randn(num_texts, 32, hidden_size, dtype=torch.float64, generator=generator) + 0.5) * spectrum
    states = states.to(device)
    prefix, following = states.cumsum(1)[:, :-1].flatten(0, 1), states[:, 1:].flatten(0, 1)
    tensors = {
        "pooled_second_moment": features.T @ features / n,
        "pooled_label_cross_moment": features.T @ targets / n,
        "pooled_mean": features.mean(0),
        "prefix_second_moment": prefix.T @ prefix / num_texts,
        "prefix_next_cross_moment": prefix.T @ following / num_texts,
        "prefix_mean": prefix.sum(0) / num_texts,
        "next_mean": following.sum(0) / num_texts,
        "label_mean": targets.mean(0),
        "label_second_moment": targets.T @ targets / n,
    }
    return LayerMoments(**tensors, num_samples=n, num_pairs=len(prefix))  # type: ignore[arg-type]


def main(config: Config) -> None:
    """Measures every hidden size and prints the table."""
    device = pick_device(config.device)
    print(f"{'d':>5} {'layer s':>9} {'3 eigh s':>9} {'ratio':>7} {'closed form s':>14} {'ratio of both':>14}")
    rows = []
    for hidden_size in config.hidden_sizes:
        moments = make_moments(hidden_size, config.num_classes, device)
        matrices = (moments.pooled_second_moment, moments.prefix_second_moment, moments.pooled_covariance)
        on_gpu = device.type == "cuda"
        decompose: Callable = torch.linalg.eigh if on_gpu else scipy.linalg.eigh
        arrays = matrices if on_gpu else [matrix.numpy() for matrix in matrices]
        times: dict[str, list[float]] = {"layer": [], "closed form": [], "eigh": []}
        for _ in range(config.num_rounds):
            times["layer"].append(seconds(partial(K_sweep.sweep_layer, moments, None, K_sweep.Config(), 0), device))
            times["closed form"].append(seconds(partial(feature_scores, moments, moments), device))
            times["eigh"].append(seconds(partial(list, map(decompose, arrays)), device))
        layer, closed_form, eigh = map(min, times.values())
        ratios = {"ratio": layer / eigh, "ratio_with_closed_form": (layer + closed_form) / eigh}
        rows.append({"hidden_size": hidden_size, "seconds": times, **ratios})
        print(
            f"{hidden_size:5d} {layer:9.3f} {eigh:9.3f} {ratios['ratio']:7.2f} {closed_form:14.3f}"
            f" {ratios['ratio_with_closed_form']:14.2f}"
        )
    path = config.results_dir / "benchmarks" / "bench_k_sweep.json"
    result = {"threads": torch.get_num_threads(), "device": str(device), "rows": rows}
    save_json(path, {"config": all_settings(config), "environment": environment(), **result})
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
