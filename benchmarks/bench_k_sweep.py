"""The cost of one layer of K_sweep.py, against three symmetric eigendecompositions of that size.

    python -m benchmarks.bench_k_sweep
    python -m benchmarks.bench_k_sweep --device cuda --hidden_sizes 896 4096

`layer` is NTPS with its variants, bounds and nulls; `with closed form` adds the scores of features (H-score, LogME,
ridge, ...). The measure is `scipy.linalg.eigh`, on a GPU `torch.linalg.eigh`, of the layer's own matrices.
Writes results/benchmarks/bench_k_sweep.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import scipy.linalg
import torch

import K_sweep
from benchmarks.harness import alternate, write_result
from utils.algebra.features import feature_scores
from utils.algebra.moments import LayerMoments
from utils.script import pick_device, run_script


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    hidden_sizes: tuple[int, ...] = (512, 896, 2048)  # d
    num_classes: int = 6  # c
    num_rounds: int = 3  # rounds; the fastest counts
    device: str = "cpu"  # cpu or cuda
    results_dir: Path = Path("results")  # the result goes there


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
    device, rows = pick_device(config.device), []
    for hidden_size in config.hidden_sizes:
        moments = make_moments(hidden_size, config.num_classes, device)
        matrices = (moments.pooled_second_moment, moments.prefix_second_moment, moments.pooled_covariance)
        on_gpu = device.type == "cuda"
        decompose: Callable = torch.linalg.eigh if on_gpu else scipy.linalg.eigh
        arrays = matrices if on_gpu else [matrix.numpy() for matrix in matrices]
        ways: dict[str, Any] = {
            "layer": partial(K_sweep.sweep_layer, moments, None, K_sweep.Config(), 0),
            "closed form": partial(feature_scores, moments, moments),
            "eigh": lambda arrays=arrays, decompose=decompose: [decompose(array) for array in arrays],
        }
        times = alternate(ways, config.num_rounds, device)
        layer, closed_form, eigh = (min(times[name]) for name in ("layer", "closed form", "eigh"))
        ratios = {"ratio": layer / eigh, "ratio_with_closed_form": (layer + closed_form) / eigh}
        rows.append({"hidden_size": hidden_size, "seconds": times, **ratios})
        told = f"with closed form {ratios['ratio_with_closed_form']:.2f}"
        print(f"d = {hidden_size}: layer {layer:.3f} s, three eigh {eigh:.3f} s, ratio {ratios['ratio']:.2f}, {told}")
    write_result(config, "bench_k_sweep", {"rows": rows})


if __name__ == "__main__":
    run_script(main, Config, __doc__)
