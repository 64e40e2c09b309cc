"""Pictures of one result: scores over layers and K, probes over layers, words in two subspaces, ranked models.

Models, datasets and words come from users: matplotlib reads no mathematics in them, and a legend gets them explicitly,
as it would hide those that start with an underscore.
"""

import textwrap
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures go to files; no screen is needed

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.algebra.scores import LABELS
from utils.results import write_atomically
from utils.separability import separating_line

STYLE = Path(__file__).with_name("paper.mplstyle")
PLAIN_TEXT: list[Any] = [STYLE, {"text.parse_math": False}]
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"  # Okabe and Ito: colour-blind readers see four
TITLES = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M", "tiny": "tiny LM", "micro": "micro LM"}


def title_of(model_name: str) -> str:
    """The name of a model in a picture."""
    return TITLES.get(model_name, model_name.rstrip("/").rsplit("/")[-1])


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure beside `path` as PNG and PDF, and prints their paths."""
    # without a date the same result gives the same bytes
    for suffix, metadata in ((".png", {}), (".pdf", {"CreationDate": None})):
        target = path.with_name(path.stem + suffix)
        with write_atomically(target) as temporary:
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
        print(target)
    plt.close(figure)


def draw_layer_map(axes: Axes, result: dict, name: str) -> None:
    """Map of one score over layers (up) and fractions (right), annotated with its range in the colour bar."""
    empty = [np.nan] * len(result["fractions"])  # of a layer without a score
    values = np.array([layer[name] or empty for layer in result["layers"]])
    fractions = result["fractions"]
    half = (fractions[-1] - fractions[0]) / max(1, len(fractions) - 1) / 2 or 0.5
    extent = (fractions[0] - half, fractions[-1] + half, -0.5, len(values) - 0.5)
    image = axes.imshow(values, origin="lower", aspect="auto", extent=extent, vmin=0, vmax=1)
    axes.set(title=LABELS[name], xlabel="K / rank V", ylabel="layer")
    axes.set_yticks(range(0, len(values), max(1, len(values) // 8)))
    axes.figure.colorbar(image, ax=axes)


def draw_last_layer(axes: Axes, result: dict, name: str) -> None:
    """The last layer's score over fractions, beside chance and, if it has one, its band under permuted labels."""
    layer, fractions = result["layers"][-1], result["fractions"]
    axes.set(title="last layer: no score", xlabel="K / rank V", ylabel=LABELS[name], ylim=(0, 1.02))
    if layer[name] is None:
        return
    score = result["score"][name]
    if null := layer["null"].get(name):
        mean, std = np.array(null["mean"]), np.array(null["std"])
        axes.fill_between(fractions, mean - 2 * std, mean + 2 * std, color=ORANGE, alpha=0.3, lw=0)
        axes.plot(fractions, mean, color=ORANGE, lw=1)
    axes.plot(fractions, layer["chance"], color="0.5", lw=1, ls="--")
    axes.plot(fractions, layer[name], color=BLUE)
    z = "" if score.get("z") is None else f", z = {score['z']:+.1f}"
    axes.set_title(f"last layer: mean {score['value']:.3f}{z}")


def plot_sweep(result: dict) -> Figure:
    """The picture of one run of K_sweep.py: maps over layer and fraction above, last-layer curves below."""
    config, scores = result["config"], ("ntps", "ntps_whitened", "retained")
    with plt.style.context(PLAIN_TEXT):
        figure, axes = plt.subplots(2, 3, figsize=(8.3, 5.4))
        for name, above, below in zip(scores, *axes, strict=True):
            draw_layer_map(above, result, name)
            draw_last_layer(below, result, name)
        lines = [Line2D([], [], color=colour, ls=ls) for colour, ls in ((BLUE, "-"), ("0.5", "--"), (ORANGE, "-"))]
        figure.legend(lines, ["score", "chance K / d", "permuted labels ± 2 sd"], loc="outside lower center", ncols=3)
        rows = f"{config['dataset_name']} ({config['split']}, n = {result['num_samples']})"
        title = f"{title_of(config['model_name'])}, {rows}, {config['eigenvectors']} eigenvalues first"
        figure.suptitle(textwrap.fill(title, 110))
    return figure


def draw_probe_scores(axes: Axes, result: dict, split: str) -> None:
    """Accuracy (Pearson correlation for regression) and R2 of the probes over layers, with the text-only baselines."""
    layers = [layer["layer"] for layer in result["layers"]]
    main = "accuracy" if result["num_classes"] else "pearson"
    for name, label, colour in ((main, main, BLUE), ("r2", "R2, least squares", ORANGE)):
        values = [np.nan if (value := layer[split][name]) is None else value for layer in result["layers"]]
        axes.plot(layers, values, color=colour, marker="o", ms=3, label=label)
    for name, style in (("majority", ":"), ("bag_of_words", "--")):
        baseline = result["baselines"][name]
        level = (baseline["train"] if split == "train" else baseline)[main]
        if level is not None:
            axes.axhline(level, color="0.5", lw=1, ls=style, label=f"{name.replace('_', ' ')}, {main}")
    lowest = min([0.0, *(layer[split]["r2"] or 0 for layer in result["layers"])])
    axes.set(title=f"probes, scored on {split}", xlabel="layer", ylim=(max(lowest, -0.5) - 0.02, 1.02))


def draw_ntps_over_layers(axes: Axes, ntps: dict) -> None:
    """The scores of K_sweep.py over layers, each averaged over the fractions."""
    layers = [layer["layer"] for layer in ntps["layers"]]
    for name, colour in (("ntps", BLUE), ("ntps_whitened", GREEN), ("retained", RED)):
        values = [np.nan if layer[name] is None else np.mean(layer[name]) for layer in ntps["layers"]]
        axes.plot(layers, values, color=colour, marker="o", ms=3, label=LABELS[name])
    axes.set(title="NTPS, mean over K", xlabel="layer", ylim=(0, 1.02))


def plot_probes(result: dict, ntps: dict | None, split: str) -> Figure:
    """The picture of one run of linear_sklearn.py: probes by layer and, if there is any, NTPS by layer beside them."""
    with plt.style.context(PLAIN_TEXT):
        figure, axes = plt.subplots(1, 2 if ntps else 1, figsize=(7.2 if ntps else 3.9, 3.6), squeeze=False)
        draw_probe_scores(axes[0, 0], result, split)
        if ntps:
            draw_ntps_over_layers(axes[0, 1], ntps)
        for panel in axes[0]:
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        config, num = result["config"], result["num_samples"]
        rows = f"n = {num['train']} train, {num['test']} test, d = {result['num_features']}"
        figure.suptitle(textwrap.fill(f"{title_of(config['model_name'])}, {config['dataset_name']} ({rows})", 90))
    return figure


SUBSPACES = {"U": "Perception space, U'x", "V": "Autoregression space, V'x"}
CATEGORY_COLOURS = ("Blues", "Oranges", "Greys", "Purples", "Greens", "Reds")
CATEGORY_MARKERS = "os^Dv"  # the paper has colours alone, green and red, which look alike to one man in twelve


def draw_words(axes: Axes, words: pd.DataFrame, boundary: dict) -> list[tuple[Line2D, str]]:
    """Words of one subspace as points, a colour and marker per category and a shade per word, and the dashed line.

    Returns the entries of the legend.
    """
    entries = []
    styles = zip(cycle(CATEGORY_COLOURS), cycle(CATEGORY_MARKERS), words.groupby("category", sort=False))
    for colours, marker, (category, in_category) in styles:
        entries += [(line, category) for line in axes.plot([], [], ls="")]  # a heading
        shades = plt.get_cmap(colours)(np.linspace(0.4, 1, len(in_category)))
        for shade, row in zip(shades, in_category.itertuples(), strict=True):
            seen_through = {"mec": shade, "mfc": (*shade[:3], 0.4)}  # words may lie on one another
            style = {"ls": "", "marker": marker, "ms": 4.5, "color": shade, **seen_through}
            entries += [(line, row.word) for line in axes.plot(row.component_1, row.component_2, **style)]
    axes.margins(0.1)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim(), xlabel="component 1", ylabel="component 2")  # fixed: it clips
    weights = np.array(boundary["weights"])
    if weights.any():
        foot = -boundary["intercept"] * weights / (weights @ weights)
        axes.axline(foot, foot + weights[::-1] * (-1, 1), color="black", lw=1, ls="--")
    return entries


def plot_alignment(words: pd.DataFrame, notes: dict[str, str] | None = None) -> Figure:
    """The paper's Figure 1: words in the first two components of U, left, and of V, right.

    Args:
        words: a row per subspace ("U", "V") and word, with columns subspace, category, word, component_1, component_2,
            as alignment_vis.py writes them.
        notes: a line under the title of each subspace.
    """
    first, second = list(dict.fromkeys(words.category))[:2]
    with plt.style.context(PLAIN_TEXT):
        figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.9))
        for panel, (subspace, title) in zip(axes, SUBSPACES.items(), strict=True):
            in_subspace = words[words.subspace == subspace]
            compared = in_subspace[in_subspace.category.isin([first, second])]
            coordinates = compared[["component_1", "component_2"]].to_numpy()
            boundary = separating_line(coordinates, (compared.category == first).to_numpy())
            entries = draw_words(panel, in_subspace, boundary)
            panel.set_title(f"{title}\n{notes[subspace]}" if notes else title)
        entries.append((Line2D([], [], color="black", lw=1, ls="--"), f"{first} / {second}"))
        handles, labels = zip(*entries, strict=True)
        columns = 1 + len(labels) // 19
        legend = figure.legend(handles, labels, loc="outside right center", ncols=columns, labelspacing=0.3)
        for text, handle in zip(legend.get_texts(), handles, strict=True):
            text.set_fontweight("bold" if handle.get_linestyle() == handle.get_marker() == "None" else "normal")
    return figure


# ------------------------------------------------------------------ the page of prescreen.py
def draw_ranking(axes: Axes, models: list[dict[str, Any]], words: float) -> None:
    """R2 of each model with its 90 % interval, best on top; the bag of words as a line."""
    rows = np.arange(len(models))[::-1]
    values, widths = [model["r2"] for model in models], [model["r2_interval"] for model in models]
    axes.errorbar(values, rows, xerr=widths, fmt="o", color=BLUE, ms=4, capsize=2, lw=1)
    axes.axvline(words, color="0.5", lw=1, ls="--")
    axes.set_yticks(rows, [title_of(model["model"]) for model in models])
    axes.set(title="best layer, 90 % interval over folds", xlabel="cross-validated R2", ylim=(-0.6, len(models) - 0.4))


def draw_layers(axes: Axes, models: list[dict[str, Any]], words: float) -> list[Line2D]:
    """R2 over relative depth, a line per model, its best layer marked; returns the lines, that of the words last."""
    colours, lines = cycle((BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "black")), []
    for model, colour in zip(models, colours, strict=False):
        values = np.array([layer["ridge_r2"]["value"] for layer in model["layers"]], float)
        depth, best = np.linspace(0, 1, len(values)), model["best_layer"]
        lines += axes.plot(depth, values, lw=1, color=colour)
        axes.plot(depth[best], values[best], "o", ms=4, color=colour)
    lines.append(axes.axhline(words, color="0.5", lw=1, ls="--"))
    axes.set(title="every layer, the best marked", xlabel="depth (0: embeddings)", ylabel="cross-validated R2")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.3))
    return lines


def draw_ranks(axes: Axes, ranks: pd.DataFrame) -> None:
    """The rank of each model by each score at the last layer, as a table of numbers."""
    axes.imshow(ranks.to_numpy(), aspect="auto", cmap="Blues_r", vmin=1 - len(ranks))
    for row, column in np.ndindex(ranks.shape):
        axes.text(column, row, f"{ranks.iat[row, column]:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(ranks.shape[1]), ranks.columns, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(ranks)), [title_of(str(name)) for name in ranks.index])
    axes.set_title("rank by every score, last layer (1 = best)")


def plot_prescreen(result: dict[str, Any], ranks: pd.DataFrame, lines: list[str]) -> Figure:
    """The page of prescreen.py: models ranked, R2 over layers, from three models on the rank of every score, advice.

    Args:
        result: the JSON result.
        ranks: rank of each model by each score, models x scores.
        lines: the text below the panels.
    """
    models, words = result["models"], float(np.mean(result["baselines"]["fold_r2"]))
    text = "\n".join(textwrap.fill(line, 105, subsequent_indent="    ") for line in lines)
    with plt.style.context(PLAIN_TEXT):
        heights = [2.4 + 0.2 * len(models), 0.4 + 0.17 * text.count("\n")]
        if len(models) > 2:
            heights.insert(1, 1.9 + 0.25 * len(models))
        figure = plt.figure(figsize=(8.3, sum(heights) + 0.6))
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        draw_ranking(figure.add_subplot(grid[0, 0]), models, words)
        panel = figure.add_subplot(grid[0, 1])
        names = [*(title_of(model["model"]) for model in models), "bag of words"]
        panel.legend(draw_layers(panel, models, words), names, loc="center left", bbox_to_anchor=(1, 0.5))
        if len(models) > 2:
            draw_ranks(figure.add_subplot(grid[1, :]), ranks)
        below = figure.add_subplot(grid[-1, :])
        below.set_axis_off()
        below.text(0, 1, text, va="top", ha="left", fontsize=8, transform=below.transAxes)
        figure.suptitle(f"{result['config']['dataset_name']}, {result['num_samples']['train']} texts")
    return figure
