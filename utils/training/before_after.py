"""The scores of one model and dataset before and after LoRA, as lora_finetuning.py writes them."""

from typing import Any

import pandas as pd

from utils.algebra.scores import SCORES


def compare(before: dict, after: dict, probe: dict, lora: dict, probe_defaults: dict) -> dict[str, Any]:
    """Each score before and after LoRA; accuracy (R2 for regression) of probe and LoRA at the last step, and the gain.

    `before` and `after` are results of K_sweep.py, `probe` and `lora` are metrics. The settings of the probe that
    differ from `probe_defaults` are kept.
    """
    scores: dict[str, Any] = {name: {"before": before["score"][name], "after": after["score"][name]} for name in SCORES}
    for row in scores.values():
        first, second = row["before"]["value"], row["after"]["value"]
        row["difference"] = None if None in (first, second) else second - first
    name = "test_accuracy" if "test_accuracy" in lora["last"] else "test_r2"
    return {
        "config": lora["config"],
        "model_fingerprint": lora["model_fingerprint"],
        "rule": before["score"]["rule"],
        "ntps": scores,
        "score": name,
        "linear_probe": probe["last"][name],
        "lora": lora["last"][name],
        "gain": lora["last"][name] - probe["last"][name],
        "probe_settings": {k: v for k, v in probe["config"].items() if v != probe_defaults.get(k)},
    }


def print_comparison(result: dict) -> None:
    """Prints the table of `compare`."""
    rows = {name: [row["before"]["value"], row["after"]["value"], row["difference"]]
            for name, row in result["ntps"].items()}  # fmt: skip
    rows["linear probe, LoRA, gain"] = [result["linear_probe"], result["lora"], result["gain"]]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["before", "after", "difference"])
    formatters = {"difference": "{:+.4f}".format}
    print("\n" + table.to_string(float_format="{:.4f}".format, formatters=formatters))
    print(f"NTPS: {result['rule']}; probe and LoRA: {result['score']} at the last step")
    changed = ", ".join(f"{name} {value}" for name, value in result["probe_settings"].items())
    print(f"The probe was trained with {changed or 'the defaults'} (linear_training.py).")
