"""Time one layer of K_sweep.py, against three symmetric eigendecompositions of that size.

    python -m benchmarks.bench_k_sweep

A layer is NTPS with its variants, bounds and nulls. The measure is `scipy.linalg.eigh`, on a GPU `torch.linalg.eigh`,
of the layer's own matrices.
Writes results/benchmarks/bench_k_sweep.json.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import scipy.linalg
import torch

import cache
import K_sweep
from benchmarks.harness import NUM_CLASSES, alternate, write_result
from utils.algebra.moments import OF_LAYER, LayerMoments
from utils.algebra.products import position_weights
from utils.script import pick_device, run_script
from utils.settings import Run


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    hidden_sizes: tuple[int, ...] = (512, 896, 2048)  # d
    num_rounds: int = 3  # rounds; the fastest counts
    run: Run = Run(device="cpu")


def make_moments(d: int, c: int, device: torch.device) -> LayerMoments:
    """Moments of 4 d random texts of five tokens, whose states have an uneven spectrum and depend on the label."""
    generator, n, length = torch.Generator().manual_seed(0), 4 * d, 5
    targets = torch.nn.functional.one_hot(torch.arange(n) % c, c).double()
    states = torch.randn(n, length, d, dtype=torch.float64, generator=generator) + 0.5
    states *= torch.logspace(0, -2, d, dtype=torch.float64)
    states[..., : c - 1] += targets[:, None, 1:]
    sums = cache.LayerSums((d, c, 1), device, "float64", "mean", on_host=False)
    lengths = torch.full((n,), length)
    sums.add(states, lengths, position_weights(lengths, length), targets, torch.zeros(n))
    found, targets = sums.averages(n, torch.tensor([n])), targets.to(device)
    tensors: dict[str, Any] = {name: found[name] for name in OF_LAYER}
    tensors |= {"label_mean": targets.mean(0), "label_second_moment": targets.T @ targets / n}
    return LayerMoments(**tensors, num_samples=n, num_pairs=n * (length - 1))


def main(config: Config) -> None:
    """Measures every hidden size and prints the table."""
    device, rows = pick_device(config.run.device), []
    decompose: Any = torch.linalg.eigh if device.type == "cuda" else scipy.linalg.eigh
    for hidden_size in config.hidden_sizes:
        moments = make_moments(hidden_size, NUM_CLASSES, device)
        matrices = (moments.pooled_second_moment, moments.prefix_second_moment, moments.pooled_covariance)
        runs: dict[str, Any] = {
            "layer": partial(K_sweep.sweep_layer, moments, None, K_sweep.Config(), 0),
            "eigh": lambda matrices=matrices: [decompose(matrix) for matrix in matrices],
        }
        times = alternate(runs, config.num_rounds, device)
        layer, eigh = (min(times[name]) for name in runs)
        rows.append({"hidden_size": hidden_size, "seconds": times, "ratio": layer / eigh})
        print(f"d = {hidden_size}: layer {layer:.3f} s, three eigh {eigh:.3f} s, ratio {layer / eigh:.2f}")
    write_result(config, "bench_k_sweep", {"rows": rows})


if __name__ == "__main__":
    run_script(main, Config, __doc__)
