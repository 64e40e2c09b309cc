"""How far each score moves when nothing about the question changes, beside how far it moves from dataset to dataset.

    python -m benchmarks.reproducibility
    python -m benchmarks.reproducibility --model_name smollm2 --scores fig_plot/data/smollm2/scores.csv \\
        --tasks sst2 legacy-datasets/banking77 marksverdhei/clickbait_title_classification \\
        --output fig_plot/data/smollm2/reproducibility.csv

A score is the run's: the mean over the fractions at the last layer. Each is computed again, by cache.py and K_sweep.py,

    float64 products     instead of float32 ones, sums being float64 in both
    4096 tokens a batch  instead of 1024: other batches, hence another order of the texts
    bfloat16 model       instead of a float32 one

and `ntps` in further ways, from the same moments. `ntps_smallest` is `ntps` with --eigenvectors smallest.

    drawn basis          one arbitrary basis of the tied space of U at a time, instead of the average over all of them
    released formula     of `ntps_smallest`: the released script's, with a cut at 1e-8 and the basis that `eigh` returns
    float32 formula      of `ntps_released`, that number: everything after the moments in float32 instead of float64

Reads the datasets and the model, and the study's fig_plot/data/scores.csv for the spread over datasets if it is there.
Writes fig_plot/data/reproducibility.csv: dataset, score, variant, draw (of a drawn basis), value; and the comparison it
prints, reproducibility_summary.csv.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import cache
import K_sweep
from utils.algebra.linalg import NestedBasis
from utils.algebra.moments import LayerMoments, load_layer
from utils.algebra.scores import SCORES
from utils.results import open_tensors, write_atomically
from utils.script import run_script
from utils.settings import check, with_values

RECOMPUTED: dict[str, dict[str, Any]] = {
    "baseline": {},
    "float64 products": {"product_dtype": "float64"},
    "4096 tokens a batch": {"tokens_per_batch": 4096},
    "bfloat16 model": {"dtype": "bfloat16"},
}
ORDERS: dict[str, Literal["largest", "smallest"]] = {"ntps": "largest", "ntps_smallest": "smallest"}
ABSOLUTE_CUT = 1e-8  # of the released script


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    model_name: str = "tiny"  # as given to cache.py
    tasks: tuple[str, ...] = ("docstrings/library", "docstrings/returns", "docstrings/torch")  # datasets, likewise
    max_samples: int = 2000  # stratified sample of the training split
    num_draws: int = 20  # bases of the tied space
    seed: int = 0  # of the draws
    device: str = "cpu"  # of the forward passes
    scores: Path = Path("fig_plot/data/scores.csv")  # the study's scores, for the spread over datasets
    output: Path = Path("fig_plot/data/reproducibility.csv")  # the CSV file written

    def __post_init__(self) -> None:
        if not self.tasks or min(self.max_samples, self.num_draws) < 1:
            raise ValueError("--tasks, --max_samples and --num_draws must not be empty or 0")
        check(self, "from 0 to 4294967295", "seed")


# ------------------------------------------------------------------ ntps in a basis that is not averaged over
def score_of_columns(u: Tensor, v: Tensor, k_us: list[int], k_vs: list[int]) -> float:
    """|P U_k|^2 / |U_k|^2 averaged over the fractions, the columns of U (d, rank M) and V (d, rank C0) as they come."""
    inside = NestedBasis.of(v, k_vs).projected_norms(u)
    norms = u.square().sum(0)
    return float(np.mean([(inside[i, :k].sum() / norms[:k].sum()).item() for i, k in enumerate(k_us)]))


def drawn_basis_scores(moments: LayerMoments, config: K_sweep.Config, num_draws: int, seed: int) -> Iterator[float]:
    """The run's `ntps`, each time with the tied eigenvectors of U in another M-orthonormal basis, drawn at random."""
    solved = K_sweep.perception(moments, center=False)
    tied = solved.whitener @ torch.linalg.qr(solved.coordinates, mode="complete").Q[:, len(solved.eigenvalues) :]
    order = [1] if config.eigenvectors == "smallest" else []  # dimensions to flip
    u, v = solved.vectors, K_sweep.next_token_subspace(moments, center=False).flip(order)
    k_us, k_vs = (K_sweep.num_directions(config.fractions, vectors.shape[1]) for vectors in (solved.whitener, v))
    random = np.random.default_rng(seed)
    for _ in range(num_draws):
        # the Q of a Gaussian matrix; which signs it has does not matter to a sum of squares
        rotation = torch.from_numpy(np.linalg.qr(random.standard_normal((tied.shape[1],) * 2))[0])
        yield score_of_columns(torch.cat([u, tied @ rotation], dim=1).flip(order), v, k_us, k_vs)


# ------------------------------------------------------------------ the released formula
def released_eigenvectors(factor: Tensor, denominator: Tensor) -> Tensor:
    """All solutions of F F' x = lambda C x as the released script has them, smallest lambda first: (d, rank).

    Args:
        factor: F, (d, c), in the dtype to compute in.
        denominator: C, (d, d), likewise; directions with an eigenvalue up to 1e-8 are left out.
    """
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


# ------------------------------------------------------------------ run
def load_last_layer(moments: cache.Config) -> LayerMoments:
    """The moments that cache.py wrote, of the last layer."""
    with open_tensors(cache.config_path(moments)) as (file, metadata):
        return load_layer(file, metadata, metadata["num_layers"] - 1, torch.device("cpu"))


def measure(task: str, config: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of one dataset; moments and results go to `folder`, a subfolder for each way of computing them."""

    def row(score: str, variant: str, value: float, draw: int | None = None) -> dict[str, Any]:
        return {"dataset": task, "score": score, "variant": variant, "draw": draw, "value": value}

    for variant, options in RECOMPUTED.items():
        shared: dict[str, Any] = {"model_name": config.model_name, "dataset_name": task}
        shared["results_dir"] = folder / variant
        sampled = {"max_samples": config.max_samples, "device": config.device, "layers": (-1,)}
        made = with_values(cache.Config(), **shared, **options, **sampled)
        cache.main(made)
        moments = load_last_layer(made)
        for score, order in ORDERS.items():
            sweep = with_values(K_sweep.Config(eigenvectors=order, num_null_draws=2), **shared, picture=False)
            of_run = K_sweep.main(sweep)["score"]
            for name in SCORES if order == "largest" else ("ntps",):
                yield row(score if name == "ntps" else name, variant, of_run[name]["value"])
            if variant == "baseline":
                draws = drawn_basis_scores(moments, sweep, config.num_draws, config.seed)
                yield from (row(score, "drawn basis", value, draw) for draw, value in enumerate(draws))
        released = released_score(moments, sweep.fractions, torch.float64)
        yield row("ntps_released", variant, released)
        if variant == "baseline":
            yield row("ntps_smallest", "released formula", released)
            yield row("ntps_released", "float32 formula", released_score(moments, sweep.fractions, torch.float32))


def baseline_values(rows: pd.DataFrame, config: Config) -> tuple[pd.DataFrame, str]:
    """Baseline of each dataset (row) and score (column), of the study where it has this model, and where it is from."""
    if config.scores.is_file():
        study = pd.read_csv(config.scores).query("split == 'train' and subspace == 'autoregression' and not center")
        study = study[study["model"] == config.model_name]
        firsts = study.sort_values("seed").groupby(["eigenvectors", "dataset"]).first()
        if set(ORDERS.values()) <= set(firsts.index.get_level_values("eigenvectors")):
            largest, smallest = (firsts.loc[order] for order in ORDERS.values())
            return largest[[*SCORES]].assign(ntps_smallest=smallest["ntps"]), f"{len(largest)} tasks of {config.scores}"
    ours = rows[rows["variant"] == "baseline"].pivot(index="dataset", columns="score", values="value")
    return ours, f"the {len(ours)} datasets"


def compare(rows: pd.DataFrame, config: Config) -> pd.DataFrame:
    """A row per score and variant: the largest difference over datasets and draws, beside the spread over tasks."""
    values, source = baseline_values(rows, config)
    spread = values.std()
    spread["ntps_released"] = spread["ntps_smallest"]  # the same score but for the basis
    compared = []
    for score, of_score in rows.groupby("score", sort=False):
        baseline = of_score[of_score["variant"] == "baseline"].set_index("dataset")["value"]
        difference = of_score["value"] - of_score["dataset"].map(baseline)
        by_variant = difference.groupby(of_score["variant"], sort=False)
        table = pd.DataFrame({"largest_difference": by_variant.agg(lambda d: d.abs().max()), "sd": by_variant.std()})
        table = table.drop("baseline").assign(sd_over_tasks=spread[score], spread_of=source)
        compared.append(table.reset_index().assign(score=score))
    table = pd.concat(compared)
    table.loc[table["variant"] != "drawn basis", "sd"] = np.nan  # of three numbers it says nothing
    table["share"] = table["largest_difference"] / table["sd_over_tasks"]
    return table[["score", "variant", "largest_difference", "sd", "sd_over_tasks", "share", "spread_of"]]


def main(config: Config) -> None:
    """Measures every dataset, writes the CSV file and prints the table."""
    rows = []
    for task in config.tasks:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            rows += list(measure(task, config, Path(folder)))
    table = pd.DataFrame(rows, columns=["dataset", "score", "variant", "draw", "value"]).astype({"draw": "Int64"})
    with write_atomically(config.output) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")
    compared = compare(table, config)
    print(compared.drop(columns="spread_of").to_string(index=False, float_format="%.3g", na_rep=""))
    print(f"differences over {', '.join(config.tasks)}; spread: standard deviation of {compared['spread_of'].iloc[0]}")
    summary = config.output.with_name(f"{config.output.stem}_summary.csv")
    with write_atomically(summary) as temporary:
        compared.to_csv(temporary, index=False, float_format="%.3g", lineterminator="\n")
    print(summary)
    print(config.output)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
