"""Scores before and after LoRA: of one model and dataset as lora_finetuning.py writes them, of many as figures do."""

from typing import Any

import pandas as pd

from utils.algebra.scores import SCORES

ADAPTED = "+lora"  # what the name of a model with a merged adapter ends with


def difference(before: float | None, after: float | None) -> float | None:
    """After minus before; None where a layer without a score gives none."""
    return None if before is None or after is None else after - before


def compare(before: dict, after: dict, probe: dict, lora: dict) -> dict[str, Any]:
    """Each score before and after, accuracy of linear probe and LoRA (R2 for regression) at the last step, and gain.

    Args:
        before: result of K_sweep.py of the model.
        after: of the model with the adapter merged.
        probe: metrics of linear_training.py.
        lora: metrics of lora_finetuning.py.
    """
    name = "test_accuracy" if "test_accuracy" in lora["last"] else "test_r2"
    scores = {
        score: {
            "before": before["score"][score],
            "after": after["score"][score],
            "difference": difference(before["score"][score]["value"], after["score"][score]["value"]),
        }
        for score in SCORES
    }
    linear_value, lora_value = probe["last"][name], lora["last"][name]
    return {
        "config": lora["config"],
        "model_fingerprint": lora["model_fingerprint"],
        "rule": before["score"]["rule"],
        "ntps": scores,
        "score": name,
        "linear_probe": linear_value,
        "lora": lora_value,
        "gain": lora_value - linear_value,
    }


def print_comparison(result: dict) -> None:
    """The table of `compare`; `probe_settings` are those of the probe that are not the defaults."""
    rows = {
        name: {"before": row["before"]["value"], "after": row["after"]["value"], "difference": row["difference"]}
        for name, row in result["ntps"].items()
    }
    rows["linear probe, LoRA, gain"] = {
        "before": result["linear_probe"],
        "after": result["lora"],
        "difference": result["gain"],
    }
    formatters = {"difference": "{:+.4f}".format}
    table = pd.DataFrame.from_dict(rows, orient="index")
    print("\n" + table.to_string(float_format="{:.4f}".format, formatters=formatters))
    print(f"NTPS: {result['rule']}; probe and LoRA: {result['score']} at the last step")
    changed = ", ".join(f"{name} {value}" for name, value in result["probe_settings"].items())
    print(f"The probe was trained with {changed or 'the defaults'} (linear_training.py).")


def pair(scores: pd.DataFrame, keys: list[str], names: tuple[str, ...] = SCORES) -> pd.DataFrame:
    """Scores after LoRA, with those before it in columns `<score>_before`: a row per adapted model and dataset.

    Args:
        scores: a row per model, dataset and whatever else is in `keys`, the adapted models among them.
        keys: columns that tell the rows apart, `model` among them.
        names: columns to pair.
    """
    scores = scores[[*keys, *names]]
    adapted = scores["model"].str.endswith(ADAPTED)
    after = scores[adapted].assign(model=scores["model"].str.removesuffix(ADAPTED))
    return after.merge(scores[~adapted], on=keys, suffixes=("", "_before"))
