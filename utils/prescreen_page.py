"""What prescreen.py needs around its method: sizes and memory, the ranks of every score, the table, the CSV file."""

import os
import resource
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from utils.algebra import features as closed_form
from utils.algebra import scores
from utils.algebra.memory import num_parameters
from utils.results import write_atomically
from utils.script import UserError, pick_device
from utils.settings import Model, Run

# scores that should order models, each at the last layer
RANKED = (*closed_form.SEEING, *scores.SCORES)
LABELS = closed_form.LABELS | scores.LABELS


# ------------------------------------------------------------------ size and memory
def check_memory(model: Model, run: Run, sums: int) -> int:
    """The number of parameters, after making sure that weights and moments fit.

    Args:
        model: which.
        run: how hubs are asked, and the device.
        sums: bytes of the sums of a pass.

    Raises:
        UserError: they do not.
    """
    device, parameters = pick_device(run.device), num_parameters(model, run)
    needed = parameters * getattr(torch, model.dtype).itemsize + sums
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"{model.model_name} needs about {needed / 2**30:.0f} GiB for weights and moments, {device} has "
            f"{there / 2**30:.0f}. Try --dtype bfloat16, fewer --num_folds, or a larger machine."
        )
    return parameters


def peak_memory() -> float:
    """The most memory that this process has held so far, GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ------------------------------------------------------------------ ranks
def score_ranks(models: list[dict[str, Any]]) -> pd.DataFrame:
    """The rank of each model, 1 = best, by each score that they all have at the last layer: models x scores."""
    table = {}
    for name in RANKED:
        entries = [model["last_layer"].get(name, {"value": None}) for model in models]
        values = [None if entry.get("meaningless") else entry["value"] for entry in entries]
        if None not in values:
            table[name] = rankdata(-np.array(values), method="min")
    return pd.DataFrame(table, index=[model["model"] for model in models])


def disagreement(ranks: pd.DataFrame) -> str:
    """One sentence: how many of the scores put the first model first, and which do not."""
    if len(ranks) < 2:
        return "one model: nothing to rank"
    others = [LABELS[name] for name in ranks if ranks[name].iloc[0] > 1]
    told = f"{len(ranks.columns) - len(others)} of {len(ranks.columns)} scores put {ranks.index[0]} first"
    return told + (f"; not so {', '.join(others)}" if others else "")


def warnings(result: dict[str, Any]) -> list[str]:
    """What a reader of the numbers has to know."""
    num = result["num_samples"]["train"]
    told = [
        f"{model['model']}: n = {num} <= d = {model['hidden_size']}: least squares and plain H-score fit any labels; "
        "read ridge R2 and the OAS-shrunk H-score"
        for model in result["models"]
        if num <= model["hidden_size"]
    ]
    if not result["num_classes"]:
        of_classes = [definition.label for definition in closed_form.DEFINITIONS if definition.needs_classes]
        told.append(f"regression targets: left out, as they are of classes: {', '.join(of_classes)}")
    if len({model["hidden_size"] for model in result["models"]}) > 1:
        told.append("widths differ: H-scores, LogME and NTPS grow or fall with the width; R2 compares across widths")
    return told


# ------------------------------------------------------------------ table and file
def overview(result: dict[str, Any]) -> pd.DataFrame:
    """One row per model, best first: what the page shows."""
    rows = []
    for model in result["models"]:
        last = defaultdict(lambda: {"value": None, "random_z": None}, model["last_layer"])
        rows.append(
            {
                "model": model["model"],
                "R2": model["r2"],
                "+-": model["r2_interval"],
                "z": model["z"],
                "layer": f"{model['best_layer']} of {model['num_layers'] - 1}",
                "last R2": last["ridge_r2"]["value"],
                "H OAS": last["h_oas"]["value"],
                "LogME": last["logme"]["value"],
                "retained": last["retained"]["value"],
                "z random V": last["retained"]["random_z"],
                "million": model["num_parameters"] / 1e6,
                "seconds": model["seconds_of_pass"] + model["seconds_of_scores"],
                "GiB": model["peak_gigabytes"],
            }
        )
    return pd.DataFrame(rows)


def baseline_line(result: dict[str, Any]) -> str:
    """Majority and bag of words in one line; test targets that are all equal have no R2."""
    words, measure = result["baselines"], "accuracy" if result["num_classes"] else "r2"
    values = {name.replace("_", " "): words[name][measure] for name in ("majority", "bag_of_words")}
    told = [f"{name} {'-' if value is None else format(value, '.3f')}" for name, value in values.items()]
    over_folds = np.mean(words["fold_r2"])
    return f"without a model, test {measure}: {', '.join(told)}; bag of words, R2 over folds {over_folds:.3f}"


def print_page(result: dict[str, Any]) -> None:
    """The table, the baselines, what the scores disagree on, and a sentence per model."""
    config, num = result["config"], result["num_samples"]
    print(f"\n{config['dataset_name']}: {num['train']} texts to fit, {num['test']} to test the baselines")
    print(overview(result).to_string(index=False, float_format="{:.3f}".format, na_rep="-"))
    print(baseline_line(result))
    print(disagreement(score_ranks(result["models"])))
    for line in warnings(result):
        print(f"note: {line}")
    for model in result["models"]:
        tie = " (not told apart from the first)" if model["rank"] > 1 and model["as_good_as_first"] else ""
        print(f"{model['rank']}. {model['model']}{tie}: {model['sentence']}.")
    for name, why in result["failed"].items():
        print(f"failed: {name}: {why}")


def save_table(path: Any, result: dict[str, Any]) -> None:
    """Every score of every layer, with its null and, at the last layer, its rank among the models, as CSV."""
    ranks, rows = score_ranks(result["models"]), []
    for model in result["models"]:
        for layer, found in enumerate(model["layers"]):
            is_last = layer == len(model["layers"]) - 1
            for name, entry in (model["last_layer"] if is_last else found).items():
                place = int(ranks.loc[model["model"], name]) if is_last and name in ranks else None
                kept = {
                    key: entry.get(key) for key in ("value", "null_mean", "null_std", "z", "random_mean", "random_z")
                }
                rows.append({"model": model["model"], "layer": layer, "score": name, **kept, "rank": place})
    with write_atomically(path) as temporary:
        pd.DataFrame(rows).astype({"rank": "Int64"}).to_csv(
            temporary, index=False, float_format="%.6g", lineterminator="\n"
        )
    print(path)
