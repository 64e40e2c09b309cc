"""The scores: names, labels, directions; and what K_sweep.py says of a result: score of the run, JSON, table."""

from collections.abc import Mapping
from dataclasses import dataclass
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


NO_SCORE, NO_NULL = {"value": None}, {"null_mean": None, "null_std": None, "z": None}  # of a layer without a score


def option_suffix(config: Mapping[str, Any]) -> str:
    """What K_sweep.py appends to a dataset's name for settings other than the default, such as `.smallest.centered`."""
    options = [
        *(config[name] for name in ("split", "eigenvectors", "subspace")),
        "centered" if config["center"] else "",
    ]
    defaults = ("train", "largest", "autoregression", "")
    return "".join(f".{option}" for option in options if option not in defaults)


def summarize(layers: list[dict], fractions: tuple[float, ...]) -> dict:
    """One number a score, by a rule that selects nothing: the mean over all fractions at the last layer."""
    last = layers[-1]
    score: dict[str, Any] = {"rule": f"mean over {len(fractions)} fractions at the last layer ({last['layer']})"}
    if last["null_draws"] is None:
        return score | dict.fromkeys(NULL_SCORES, NO_SCORE | NO_NULL) | {"ntps": NO_SCORE}
    for name in SCORES:
        value = last[name].mean().item()
        score[name] = {"value": value}
        if name in NULL_SCORES:
            draws = last["null_draws"][name].mean(1)
            mean, spread = draws.mean().item(), draws.std().item()
            z = (value - mean) / spread if spread > 1e-12 else None  # no spread: V spans everything at every K
            score[name] |= {"null_mean": mean, "null_std": spread, "z": z}
        if found := last.get("random", {}).get(name):
            z = (value - found["mean"]) / found["std"] if found["std"] > 1e-12 else None
            score[name] |= {"random_mean": found["mean"], "random_std": found["std"], "random_z": z}
    return score


def to_json(layer: dict) -> dict:
    """A layer's entry with lists for tensors, and the mean and standard deviation of the null for its draws."""
    null = {
        name: {"mean": draws.mean(0).tolist(), "std": draws.std(0).tolist()}
        for name, draws in (layer["null_draws"] or {}).items()
    }
    rest = {name: value for name, value in layer.items() if name != "null_draws"}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in rest.items()} | {
        "null": null or None
    }


def print_table(result: dict) -> None:
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
        null = beside("permuted labels", score["null_mean"], score["null_std"], score["z"]) if "z" in score else ""
        if "random_z" in score:
            null = f"{null:<46}" + beside("random V", score["random_mean"], score["random_std"], score["random_z"])
        print(f"  {name:<14}{score['value']:.4f}{null}".rstrip())


def beside(what: str, mean: float, spread: float, z: float | None) -> str:
    """What a score is compared with, for `print_table`."""
    return f"   {what} {mean:.4f} +- {spread:.4f}   " + ("no spread" if z is None else f"z = {z:+.1f}")
