"""Measure how far each score moves if only the computation changes, beside its spread from dataset to dataset.

    python -m benchmarks.reproducibility
    python -m benchmarks.reproducibility --model_name smollm2 --scores fig_plot/data/smollm2/scores.csv \\
        --tasks sst2 legacy-datasets/banking77 marksverdhei/clickbait_title_classification \\
        --output fig_plot/data/smollm2/reproducibility.csv

A score is the mean over the fractions at the last layer. The script makes the moments again with each entry of
`RECOMPUTED`, and `ntps` in further ways from the same moments; `ntps_smallest` is `ntps` with --eigenvectors smallest.

    released formula     `ntps_smallest` by the released script's formula: cut at 1e-8, the basis that `eigh` returns
    float32 formula      `ntps_released`, that number, with all steps after the moments in float32 instead of float64

Reads the datasets, the model and, for the spread over the datasets of a study, its `--scores`.
Writes fig_plot/data/reproducibility.csv: dataset, score, variant, value; and the comparison it prints,
reproducibility_summary.csv.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import cache
import K_sweep
from utils.algebra.moments import LayerMoments, load_layer
from utils.algebra.scores import SCORES
from utils.results import open_tensors, write_atomically
from utils.script import run_script
from utils.settings import Run, check, with_values

RECOMPUTED: dict[str, dict[str, Any]] = {
    "baseline": {},  # float32 model and products, float64 sums, 1024 tokens a batch
    "float64 products": {"product_dtype": "float64"},
    "4096 tokens a batch": {"tokens_per_batch": 4096},  # which also changes the order of the texts
    "bfloat16 model": {"dtype": "bfloat16"},
}
ABSOLUTE_CUT = 1e-8  # cut of the released script


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    model_name: str = "tiny"  # a --model_name of cache.py
    tasks: tuple[str, ...] = ("docstrings/library", "docstrings/returns", "docstrings/torch")  # each a --dataset_name
    max_samples: int = 2000  # stratified sample of the training split
    scores: Path = Path("fig_plot/data/scores.csv")  # the study's scores, for the spread over datasets
    output: Path = Path("fig_plot/data/reproducibility.csv")  # the CSV file written
    run: Run = Run(device="cpu")

    def __post_init__(self) -> None:
        check(self, "at least 1", "max_samples")


def released_eigenvectors(factor: Tensor, denominator: Tensor) -> Tensor:
    """All solutions (d, rank) of F F' x = lambda C x as the released script computes them, smallest lambda first."""
    eigenvalues, vectors = torch.linalg.eigh(denominator)
    kept = eigenvalues > ABSOLUTE_CUT
    whitener = vectors[:, kept] / eigenvalues[kept].sqrt()
    return whitener @ torch.linalg.eigh(whitener.T @ (factor @ factor.T) @ whitener).eigenvectors


def released_score(moments: LayerMoments, fractions: tuple[float, ...], dtype: torch.dtype) -> float:
    """The released script's NTPS averaged over the fractions, with everything after the moments in `dtype`."""
    u = released_eigenvectors(moments.pooled_label_cross_moment.to(dtype), moments.pooled_second_moment.to(dtype))
    v = released_eigenvectors(moments.prefix_next_cross_moment.to(dtype), moments.prefix_second_moment.to(dtype))
    scores = []
    for fraction in fractions:
        u_k, v_k = (vectors[:, : max(1, int(fraction * vectors.shape[1]))] for vectors in (u, v))
        projected = v_k @ (torch.linalg.pinv(v_k) @ u_k)
        scores.append((projected.square().sum() / u_k.square().sum()).item())
    return float(np.mean(scores))


def measure(task: str, config: Config) -> Iterator[tuple[str, str, float]]:
    """Yields score, variant and value for every way to compute the scores of one dataset."""
    for variant, options in RECOMPUTED.items():
        with tempfile.TemporaryDirectory() as folder:
            shared = {"dataset_name": task, "model_name": config.model_name, "max_samples": config.max_samples}
            shared |= {"layers": (-1,), "results_dir": Path(folder)}
            made = with_values(cache.Config(run=config.run), **shared, **options)
            cache.main(made)
            with open_tensors(cache.config_path(made)) as (file, metadata):
                moments = load_layer(file, metadata, metadata["num_layers"] - 1, torch.device("cpu"))
        sweep = K_sweep.Config(num_null_draws=2)
        largest = K_sweep.sweep_layer(moments, None, sweep, 0).scores
        smallest = K_sweep.sweep_layer(moments, None, replace(sweep, eigenvectors="smallest"), 0).scores
        yield from ((name, variant, float(largest[name].mean())) for name in SCORES)
        yield "ntps_smallest", variant, float(smallest["ntps"].mean())
        released = released_score(moments, sweep.fractions, torch.float64)
        yield "ntps_released", variant, released
        if variant == "baseline":
            yield "ntps_smallest", "released formula", released
            yield "ntps_released", "float32 formula", released_score(moments, sweep.fractions, torch.float32)


def spread_over_tasks(config: Config) -> pd.Series:
    """Standard deviation of each score over the datasets of the study; nan if the study lacks the model."""
    plain = (
        "model == @config.model_name and split == 'train' and subspace == 'autoregression' and not center "
        "and coordinates == 'as_is'"
    )
    firsts = pd.read_csv(config.scores).query(plain).sort_values("seed").groupby(["eigenvectors", "dataset"]).first()
    spread = firsts.groupby("eigenvectors")[[*SCORES]].std().reindex(["largest", "smallest"])
    smallest = spread.loc["smallest", "ntps"]  # the released score differs only in the basis
    return pd.Series({**spread.loc["largest"], "ntps_smallest": smallest, "ntps_released": smallest})


def compare(rows: pd.DataFrame, config: Config) -> pd.DataFrame:
    """A row per score and variant: the largest difference over datasets, beside the spread over tasks."""
    is_baseline = rows["variant"] == "baseline"
    baseline = rows[is_baseline].set_index(["dataset", "score"])["value"].rename("baseline")
    rows = rows[~is_baseline].join(baseline, on=["dataset", "score"])
    difference = (rows["value"] - rows["baseline"]).abs().rename("largest_difference")
    table = difference.groupby([rows["score"], rows["variant"]], sort=False).max().reset_index()
    table["sd_over_tasks"] = table["score"].map(spread_over_tasks(config))
    return table.assign(share=table["largest_difference"] / table["sd_over_tasks"])


def main(config: Config) -> None:
    """Measures every dataset, writes the CSV files and prints the comparison."""
    rows = [(task, *row) for task in config.tasks for row in measure(task, config)]
    table = pd.DataFrame(rows, columns=["dataset", "score", "variant", "value"])
    compared = compare(table, config)
    print(compared.to_string(index=False, float_format="%.3g", na_rep=""))
    summary = config.output.with_name(f"{config.output.stem}_summary.csv")
    for written, path, digits in ((compared, summary, 3), (table, config.output, 12)):
        with write_atomically(path) as temporary:
            written.to_csv(temporary, index=False, float_format=f"%.{digits}g", lineterminator="\n")
        print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
