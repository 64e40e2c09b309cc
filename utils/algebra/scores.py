"""Name the scores of K_sweep.py, hold those of a layer, summarise a run, and print its table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor

LABELS = {  # name -> label in figures; all are in [0, 1]; larger: V holds more of the directions that the task needs
    "ntps": "NTPS",
    "ntps_label": "NTPS, label directions",
    "ntps_whitened": "NTPS, whitened",
    "retained": "retained by the probe",
}
SCORES = tuple(LABELS)
NULL_SCORES = SCORES[1:]  # permuted labels give them a null and a z
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
    random: dict[str, Any] = field(default_factory=dict)  # scores of random V, at the last layer
    closed_form: dict[str, Any] = field(default_factory=dict)  # scores of the pooled states alone

    def to_json(self) -> dict[str, Any]:
        """The layer's entry in a JSON result; the null as mean and standard deviation, None for a missing score."""
        scores = dict.fromkeys((*SCORES, "chance", *EXCESS)) | {k: v.tolist() for k, v in self.scores.items()}
        null = {name: {"mean": x.mean(0).tolist(), "std": x.std(0).tolist()} for name, x in self.null_draws.items()}
        ranks = {name: getattr(self, name) for name in ("layer", "rank_u", "rank_v", "rank_label")}
        optional = {name: getattr(self, name) for name in ("random", "closed_form") if getattr(self, name)}
        return {**ranks, **scores, **self.probe, **optional, "null": null or None}


def option_suffix(config: Mapping[str, Any]) -> str:
    """The suffix of a result's name for non-default settings of K_sweep.py, such as `.smallest.centered`."""
    center = "centered" if config["center"] else ""
    options = (config["split"], config["eigenvectors"], config["subspace"], center, config["coordinates"])
    defaults = ("train", "largest", "autoregression", "", "as_is")
    return "".join(f".{option}" for option, default in zip(options, defaults, strict=True) if option != default)


def z_score(value: float, mean: float, spread: float) -> float | None:
    """The z score (value - mean) / spread; None if the spread is 0, as when V spans everything at every K."""
    return (value - mean) / spread if spread > 1e-12 else None


def summarize(last: LayerScores, num_fractions: int) -> dict[str, Any]:
    """One number per score, without any choice: its mean over all fractions at the last layer."""
    summary: dict[str, Any] = {"rule": f"mean over {num_fractions} fractions at the last layer ({last.layer})"}
    for name in SCORES:
        value: Any = last.scores[name].mean().item() if last.scores else None
        summary[name] = {"value": value} | dict.fromkeys(("null_mean", "null_std", "z") if name in NULL_SCORES else ())
        if name in last.null_draws:
            draws = last.null_draws[name].mean(1)
            mean, spread = draws.mean().item(), draws.std().item()
            summary[name] |= {"null_mean": mean, "null_std": spread, "z": z_score(value, mean, spread)}
        if name in last.random:
            mean, spread = last.random[name]["mean"], last.random[name]["std"]
            summary[name] |= {"random_mean": mean, "random_std": spread, "random_z": z_score(value, mean, spread)}
    return summary


def print_table(result: dict[str, Any]) -> None:
    """Prints the scores of every layer, averaged over the fractions, and the score of the run."""
    rows = [
        {name: layer[name] for name in ("layer", "rank_u", "rank_v")}
        | {name: sum(layer[name]) / len(layer[name]) if layer[name] else float("nan") for name in SCORES}
        | {"probe R2": layer["probe_r2"], "held out": layer["probe_r2_held_out"]}
        for layer in result["layers"]
    ]
    print("\n" + pd.DataFrame(rows).to_string(index=False, float_format="{:.4f}".format, na_rep="-", col_space=8))
    if missing := ", ".join(str(layer["layer"]) for layer in result["layers"] if layer["ntps"] is None):
        reasons = "are the same for every text, or do not vary with the labels, or no text has two tokens"
        print(f"No score at layer {missing}: there the pooled states {reasons}.")
    if result["num_samples"] <= result["hidden_size"]:
        print("n <= d: the least-squares probe interpolates its own rows, so that probe R2 means nothing.")
    print(f"\nscore: {result['score']['rule']}")
    for name in SCORES:
        score = result["score"][name]
        line = f"  {name:<14}{'none' if score['value'] is None else format(score['value'], '.4f')}"
        for key, label, z_name in (("null", "permuted labels", "z"), ("random", "random V", "random_z")):
            if score.get(f"{key}_mean") is not None:
                z = "no spread" if score[z_name] is None else f"z = {score[z_name]:+.1f}"
                line += f"   {label} {score[f'{key}_mean']:.4f} +- {score[f'{key}_std']:.4f}   {z}".ljust(46)
        print(line.rstrip())
