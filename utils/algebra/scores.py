"""The scores of K_sweep.py: names and labels, those of a layer, the score of a run, JSON and table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """One score of K_sweep.py; all are in [0, 1], and larger says that V holds more of what the task needs."""

    name: str
    label: str  # in figures
    has_null: bool = True  # whether permuted labels give it a null and a z


DEFINITIONS = (
    Score("ntps", "NTPS", has_null=False),
    Score("ntps_label", "NTPS, label directions"),
    Score("ntps_whitened", "NTPS, whitened"),
    Score("retained", "retained by the probe"),
)
SCORES = tuple(score.name for score in DEFINITIONS)
NULL_SCORES = tuple(score.name for score in DEFINITIONS if score.has_null)
LABELS = {score.name: score.label for score in DEFINITIONS}
EXCESS = ("excess_loss", "excess_lower", "excess_upper", "excess_lower_euclidean", "excess_upper_euclidean")


@dataclass(frozen=True)
class LayerScores:
    """Every score of one layer; a layer without a score has ranks and a probe only."""

    layer: int
    rank_u: int
    rank_v: int
    rank_label: int
    probe: dict[str, float | None]  # MSE and R2 of the least-squares probe, on its rows and on the held-out ones
    scores: dict[str, Tensor] = field(default_factory=dict)  # SCORES, chance, EXCESS: (fractions,) each
    null_draws: dict[str, Tensor] = field(default_factory=dict)  # NULL_SCORES: (num_draws, fractions) each
    random: dict[str, Any] = field(default_factory=dict)  # of random V, at the last layer
    closed_form: dict[str, Any] = field(default_factory=dict)  # of the pooled states alone

    def to_json(self) -> dict[str, Any]:
        """The layer's entry in a JSON result; the null as mean and standard deviation, None for a missing score."""
        scores = dict.fromkeys((*SCORES, "chance", *EXCESS)) | {k: v.tolist() for k, v in self.scores.items()}
        null = {name: {"mean": x.mean(0).tolist(), "std": x.std(0).tolist()} for name, x in self.null_draws.items()}
        ranks = {name: getattr(self, name) for name in ("layer", "rank_u", "rank_v", "rank_label")}
        optional = {name: getattr(self, name) for name in ("random", "closed_form") if getattr(self, name)}
        return {**ranks, **scores, **self.probe, **optional, "null": null or None}


def option_suffix(config: Mapping[str, Any]) -> str:
    """The part of a result's name for settings of K_sweep.py other than the default, such as `.smallest.centered`."""
    options = [config[name] for name in ("split", "eigenvectors", "subspace", "coordinates")]
    options.insert(3, "centered" if config["center"] else "")
    defaults = ("train", "largest", "autoregression", "as_is", "")
    return "".join(f".{option}" for option in options if option not in defaults)


def z_score(value: float, mean: float, spread: float) -> float | None:
    """None without spread: there V spans everything at every K."""
    return (value - mean) / spread if spread > 1e-12 else None


def summarize(last: LayerScores, num_fractions: int) -> dict[str, Any]:
    """One number a score, by a rule that selects nothing: the mean over all fractions at the last layer."""
    summary: dict[str, Any] = {"rule": f"mean over {num_fractions} fractions at the last layer ({last.layer})"}
    for name in SCORES:
        value = last.scores[name].mean().item() if last.scores else None
        summary[name] = {"value": value}
        if name in NULL_SCORES:
            summary[name] |= {"null_mean": None, "null_std": None, "z": None}
        if value is not None and name in last.null_draws:
            draws = last.null_draws[name].mean(1)
            mean, spread = draws.mean().item(), draws.std().item()
            summary[name] |= {"null_mean": mean, "null_std": spread, "z": z_score(value, mean, spread)}
        if value is not None and name in last.random:
            mean, spread = last.random[name]["mean"], last.random[name]["std"]
            summary[name] |= {
                "random_mean": mean, "random_std": spread, "random_z": z_score(value, mean, spread)
            }  # fmt: skip
    return summary


def print_table(result: dict[str, Any]) -> None:
    """The scores of every layer, averaged over the fractions, and the score of the run."""
    rows = [
        {name: layer[name] for name in ("layer", "rank_u", "rank_v")}
        | {name: sum(layer[name]) / len(layer[name]) if layer[name] else float("nan") for name in SCORES}
        | {"probe R2": layer["probe_r2"], "held out": layer["probe_r2_held_out"] or float("nan")}
        for layer in result["layers"]
    ]
    print("\n" + pd.DataFrame(rows).to_string(index=False, float_format="{:.4f}".format, na_rep="-", col_space=8))
    if missing := [str(layer["layer"]) for layer in result["layers"] if layer["ntps"] is None]:
        print(
            f"No score at layer {', '.join(missing)}: there the pooled states are the same for every text, or do not "
            "vary with the labels, or no text has two tokens."
        )
    if result["num_samples"] <= result["hidden_size"]:
        print("n <= d: the least-squares probe interpolates its own rows; read the held-out column, not probe R2.")
    print(f"\nscore: {result['score']['rule']}")
    for name in SCORES:
        score = result["score"][name]
        if score["value"] is None:
            print(f"  {name:<14}none")
            continue
        line = f"  {name:<14}{score['value']:.4f}"
        for key, label in (("null_", "permuted labels"), ("random_", "random V")):
            z_name = "z" if key == "null_" else "random_z"
            if z_name in score:
                z = "no spread" if score[z_name] is None else f"z = {score[z_name]:+.1f}"
                line += f"   {label} {score[f'{key}mean']:.4f} +- {score[f'{key}std']:.4f}   {z}".ljust(46)
        print(line.rstrip())
