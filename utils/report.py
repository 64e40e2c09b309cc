"""What K_sweep.py says of its result: the score of the run, the JSON of a layer, the table a user reads."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SCORES = ("ntps", "ntps_label", "ntps_whitened", "retained")
NULL_SCORES = SCORES[1:]  # those that permuted labels give a null for


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
    for name in SCORES:
        value = last[name].mean().item()
        score[name] = {"value": value}
        if name in NULL_SCORES:
            draws = last["null_draws"][name].mean(1)
            mean, spread = draws.mean().item(), draws.std().item()
            z = (value - mean) / spread if spread > 1e-12 else None  # no spread: V spans everything at every K
            score[name] |= {"null_mean": mean, "null_std": spread, "z": z}
    return score


def to_json(layer: dict) -> dict:
    """A layer's entry with lists for tensors, and the mean and standard deviation of the null for its draws."""
    draws = layer.pop("null_draws")
    entry = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in layer.items()}
    entry["null"] = {name: {"mean": of.mean(0).tolist(), "std": of.std(0).tolist()} for name, of in draws.items()}
    return entry


def print_table(result: dict) -> None:
    """The scores of every layer, averaged over the fractions, and the score of the run."""
    print(f"\n{'layer':>5} {'rank U':>6} {'rank V':>6}{''.join(f'{name:>14}' for name in SCORES)}  probe R2  held out")
    for layer in result["layers"]:
        cells = [f"{layer['layer']:5d} {layer['rank_u']:6d} {layer['rank_v']:6d}"]
        cells += [f"{sum(layer[name]) / len(layer[name]):14.4f}" for name in SCORES]
        cells += [
            " " * 9 + "-" if r2 is None else f"{r2:10.4f}" for r2 in (layer["probe_r2"], layer["probe_r2_held_out"])
        ]
        print("".join(cells))
    if result["num_samples"] <= result["hidden_size"]:
        print("n <= d: the least-squares probe interpolates its own rows; read the held-out column, not probe R2.")
    print(f"\nscore: {result['score']['rule']}")
    for name in SCORES:
        score = result["score"][name]
        null = ""
        if name in NULL_SCORES:
            z = "no spread" if score["z"] is None else f"z = {score['z']:+.1f}"
            null = f"   permuted labels {score['null_mean']:.4f} +- {score['null_std']:.4f}   {z}"
        print(f"  {name:<14}{score['value']:.4f}{null}")
