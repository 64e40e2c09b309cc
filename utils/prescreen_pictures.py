"""The page of prescreen.py: models ranked, R2 over layers, the rank of every score, a sentence per model."""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.pictures import STYLE
from utils.prescreen_page import LABELS, baseline_line, disagreement, score_ranks, warnings


def draw_ranking(axes: Axes, result: dict[str, Any]) -> None:
    """R2 of each model with its 90 % interval, best on top; the bag of words as a line."""
    models = result["models"]
    places = np.arange(len(models))[::-1]
    values, widths = [model["r2"] for model in models], [model["r2_interval"] for model in models]
    axes.errorbar(values, places, xerr=widths, fmt="o", color="tab:blue", ms=4, capsize=2, lw=1)
    axes.axvline(np.mean(result["baselines"]["fold_r2"]), color="0.5", lw=1, ls="--", label="bag of words")
    axes.axvline(0, color="0.8", lw=1)
    names = [
        f"{model['model'].rsplit('/')[-1]}\n{model['num_parameters'] / 1e6:,.1f} M, "
        f"{model['seconds_of_pass'] + model['seconds_of_scores']:.0f} s, {model['peak_gigabytes']:.1f} GiB"
        for model in models
    ]
    axes.set_yticks(places, names)
    axes.set(title="best layer, 90 % interval over folds", xlabel="cross-validated R2", ylim=(-0.6, len(models) - 0.4))
    axes.legend(loc="best")


def draw_layers(axes: Axes, result: dict[str, Any]) -> None:
    """R2 over relative depth, a line per model, its best layer marked."""
    for model in result["models"]:
        values = np.array([layer["ridge_r2"]["value"] for layer in model["layers"]], float)
        depth = np.arange(len(values)) / max(1, len(values) - 1)
        [line] = axes.plot(depth, values, lw=1, label=model["model"].rsplit("/")[-1])
        axes.plot(depth[model["best_layer"]], values[model["best_layer"]], "o", ms=4, color=line.get_color())
    axes.axhline(np.mean(result["baselines"]["fold_r2"]), color="0.5", lw=1, ls="--")
    lowest, highest = axes.get_ylim()
    axes.set(title="every layer", xlabel="depth (0: embeddings)", ylabel="cross-validated R2")
    axes.set_ylim(max(lowest, -0.3), highest)
    axes.legend(loc="best")


def draw_ranks(axes: Axes, result: dict[str, Any]) -> None:
    """The rank of each model by each score at the last layer, as a table of numbers."""
    ranks = score_ranks(result["models"])
    axes.imshow(ranks.to_numpy(), aspect="auto", cmap="Blues_r", vmin=0, vmax=len(ranks) + 1)
    for row, column in np.ndindex(ranks.shape):
        axes.text(column, row, f"{ranks.iat[row, column]:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(ranks.shape[1]), [LABELS[name] for name in ranks], rotation=35, ha="right", fontsize=7)
    axes.set_yticks(range(len(ranks)), [str(name).rsplit("/")[-1] for name in ranks.index])
    axes.set_title("rank by every score, last layer (1 = best)")


def plot_page(result: dict[str, Any]) -> Figure:
    """The one-page answer."""
    models, num = result["models"], result["num_samples"]
    lines = [f"{model['rank']}. {model['model'].rsplit('/')[-1]}: {model['sentence']}." for model in models]
    lines += [f"failed: {name}" for name in result["failed"]]
    lines += [baseline_line(result) + ".", disagreement(score_ranks(models)) + "."]
    lines += [f"note: {line}" for line in warnings(result)]
    text = "\n".join(textwrap.fill(line, 118, subsequent_indent="    ") for line in lines)
    with plt.style.context(STYLE):
        height = 0.15 * (text.count("\n") + 2)
        tall = 2.2 + 0.35 * len(models)
        figure = plt.figure(figsize=(8.3, tall + 2.2 + 0.25 * len(models) + height))
        grid = figure.add_gridspec(3, 2, height_ratios=[tall, 1.9 + 0.25 * len(models), height])
        draw_ranking(figure.add_subplot(grid[0, 0]), result)
        draw_layers(figure.add_subplot(grid[0, 1]), result)
        draw_ranks(figure.add_subplot(grid[1, :]), result)
        below = figure.add_subplot(grid[2, :])
        below.set_axis_off()
        below.text(0, 1, text, va="top", ha="left", fontsize=7, transform=below.transAxes, family="sans-serif")
        figure.suptitle(f"{result['config']['dataset_name']}, {num['train']} texts")
    return figure
