"""Draw one result: scores over layers and K, probes over layers, words in two subspaces, ranked models.

Models, datasets and words come from users: matplotlib must not parse mathematics in them, and a legend gets them
explicitly, because it would hide names that start with an underscore.
"""

import textwrap
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.algebra.scores import LABELS
from utils.results import write_atomically
from utils.separability import separating_line

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("paper.mplstyle")
PLAIN_TEXT: list[Any] = [STYLE, {"text.parse_math": False}]
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"  # Okabe and Ito: safe for colour-blind readers
COLOURS = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "black")
TITLES = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M", "tiny": "tiny LM", "micro": "micro LM"}
SUBSPACES = {"U": "Perception space, U'x", "V": "Autoregression space, V'x"}
CATEGORY_COLOURS = ("Blues", "Oranges", "Greys", "Purples", "Greens", "Reds")
CATEGORY_MARKERS = "os^Dv"  # the paper has colours alone, green and red, which look alike to one man in twelve


def title_of(model_name: str) -> str:
    """The name of a model in a picture."""
    if (twin := model_name.removesuffix("-random")) != model_name and twin in TITLES:
        return f"{TITLES[twin]}, random weights"
    return TITLES.get(model_name, model_name.rstrip("/").rsplit("/")[-1])


def load_pyplot() -> Any:
    """Imports and returns matplotlib.pyplot, set to draw into files, so that it needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes the figure beside `path` as PNG and PDF, and prints their paths."""
    plt = load_pyplot()
    # without a date the same result gives the same bytes
    for suffix, metadata in ((".png", {}), (".pdf", {"CreationDate": None})):
        target = path.with_name(path.stem + suffix)
        with write_atomically(target) as temporary, plt.style.context(STYLE):
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
        print(target)
    plt.close(figure)


def draw_layers(axes: "Axes", result: dict, name: str) -> None:
    """Draws one score over fractions: every layer in grey, the last with chance and the band under permuted labels."""
    *others, layer = result["layers"]
    fractions = result["fractions"]
    axes.set(title="last layer: no score", xlabel="K / rank V", ylabel=LABELS[name], ylim=(0, 1.02))
    for other in others:
        axes.plot(fractions, other[name] or [np.nan] * len(fractions), color="0.85", lw=0.7)
    if layer[name] is None:
        return
    if null := layer["null"].get(name):
        mean, std = np.array(null["mean"]), np.array(null["std"])
        axes.fill_between(fractions, mean - 2 * std, mean + 2 * std, color=ORANGE, alpha=0.3, lw=0)
        axes.plot(fractions, mean, color=ORANGE, lw=1)
    axes.plot(fractions, layer["chance"], color="0.5", lw=1, ls="--")
    axes.plot(fractions, layer[name], color=BLUE)
    score = result["score"][name]
    z = "" if score.get("z") is None else f", z = {score['z']:+.1f}"
    axes.set_title(f"last layer: mean {score['value']:.3f}{z}")


def plot_sweep(result: dict) -> "Figure":
    """The picture of one run of K_sweep.py: three scores over fractions, a curve per layer."""
    config, plt = result["config"], load_pyplot()
    with plt.style.context(PLAIN_TEXT):
        figure, axes = plt.subplots(1, 3, figsize=(8.3, 3.2))
        for panel, name in zip(axes, ("ntps", "ntps_whitened", "retained"), strict=True):
            draw_layers(panel, result, name)
        styles = ((BLUE, "-", 2), ("0.85", "-", 1), ("0.5", "--", 1), (ORANGE, "-", 1))
        lines = [plt.Line2D([], [], color=colour, ls=ls, lw=lw) for colour, ls, lw in styles]
        labels = ["last layer", "other layers", "chance K / d", "permuted labels ± 2 sd"]
        figure.legend(lines, labels, loc="outside lower center", ncols=4)
        rows = f"{config['dataset_name']} ({config['split']}, n = {result['num_samples']})"
        title = f"{title_of(config['model_name'])}, {rows}, {config['eigenvectors']} eigenvalues first"
        figure.suptitle(textwrap.fill(title, 110))
    return figure


def plot_probes(result: dict) -> "Figure":
    """The picture of one run of linear_sklearn.py: accuracy (or Pearson's correlation) and R2 over layers."""
    main, layers, plt = "accuracy" if result["num_classes"] else "pearson", result["layers"], load_pyplot()
    with plt.style.context(PLAIN_TEXT):
        figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.6))
        for axes, split in zip(panels, ("train", "test"), strict=True):
            for name, style in (("majority", ":"), ("bag_of_words", "--")):
                baseline = result["baselines"][name]
                level = (baseline["train"] if split == "train" else baseline)[main]
                if level is not None:
                    axes.axhline(level, color="0.5", lw=1, ls=style, label=f"{name.replace('_', ' ')}, {main}")
            for score, label, colour in ((main, main, BLUE), ("r2", "R2, least squares", ORANGE)):
                values = np.array([layer[split][score] for layer in layers], float)
                axes.plot([layer["layer"] for layer in layers], values, color=colour, marker="o", ms=3, label=label)
            axes.set(title=f"probes, scored on {split}", xlabel="layer")
            axes.set_ylim(max(min(0.0, np.nan_to_num(values).min()), -0.5) - 0.02, 1.02)  # of R2
            axes.locator_params(axis="x", integer=True)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        config, num = result["config"], result["num_samples"]
        rows = f"n = {num['train']} train, {num['test']} test, d = {result['num_features']}"
        figure.suptitle(textwrap.fill(f"{title_of(config['model_name'])}, {config['dataset_name']} ({rows})", 90))
    return figure


def draw_words(axes: "Axes", words: "pd.DataFrame") -> list[tuple[Any, str]]:
    """Draws words of one subspace and the line between the first two categories; returns the legend's entries."""
    plt, entries = load_pyplot(), []
    styles = zip(cycle(CATEGORY_COLOURS), cycle(CATEGORY_MARKERS), words.groupby("category", sort=False))
    for colours, marker, (category, in_category) in styles:
        entries += [(line, category) for line in axes.plot([], [], ls="")]  # a heading
        shades = plt.get_cmap(colours)(np.linspace(0.4, 1, len(in_category)))
        for shade, row in zip(shades, in_category.itertuples(), strict=True):
            seen_through = {"mec": shade, "mfc": (*shade[:3], 0.4)}  # words may overlap
            style = {"ls": "", "marker": marker, "ms": 4.5, "color": shade, **seen_through}
            entries += [(line, row.word) for line in axes.plot(row.component_1, row.component_2, **style)]
    axes.margins(0.1)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim(), xlabel="component 1", ylabel="component 2")  # fixed: it clips
    first, second = words.category.unique()[:2]
    compared = words[words.category.isin([first, second])]
    coordinates = compared[["component_1", "component_2"]].to_numpy()
    weights, intercept = separating_line(coordinates, (compared.category == first).to_numpy())
    if weights.any():
        foot = -intercept * weights / (weights @ weights)
        line = axes.axline(foot, foot + weights[::-1] * (-1, 1), color="black", lw=1, ls="--")
        entries.append((line, f"{first} / {second}"))
    return entries


def plot_alignment(words: "pd.DataFrame", notes: dict[str, str] | None = None) -> "Figure":
    """The paper's Figure 1: words in the first two components of U and V; `notes` are lines under the titles."""
    plt = load_pyplot()
    with plt.style.context(PLAIN_TEXT):
        figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.9))
        for panel, (subspace, title) in zip(axes, SUBSPACES.items(), strict=True):
            entries = draw_words(panel, words[words.subspace == subspace])
            panel.set_title(f"{title}\n{notes[subspace]}" if notes else title)
        handles, labels = zip(*entries, strict=True)
        columns = 1 + len(labels) // 19
        legend = figure.legend(handles, labels, loc="outside right center", ncols=columns, labelspacing=0.3)
        for text, handle in zip(legend.get_texts(), handles, strict=True):
            text.set_fontweight("bold" if handle.get_linestyle() == handle.get_marker() == "None" else "normal")
    return figure


def plot_prescreen(result: dict[str, Any], lines: list[str]) -> "Figure":
    """The page of prescreen.py: models ranked at their best layer, R2 over relative depth, `lines` below."""
    models, plt = result["models"], load_pyplot()
    words = float(np.mean(result["baselines"]["fold_r2"]))
    text = "\n".join(textwrap.fill(line, 105, subsequent_indent="    ") for line in lines)
    with plt.style.context(PLAIN_TEXT):
        height = 3.0 + 0.2 * len(models) + 0.17 * text.count("\n")
        figure, (ranking, depths) = plt.subplots(1, 2, figsize=(8.3, height))
        curves, names = [], [title_of(model["model"]) for model in models]
        for row, (model, colour) in enumerate(zip(models, cycle(COLOURS), strict=False)):
            style = {"color": colour, "fmt": "o", "ms": 4, "capsize": 2, "lw": 1}
            ranking.errorbar(model["r2"], row, xerr=model["r2_interval"], **style)
            values = np.array([layer["ridge_r2"]["value"] for layer in model["layers"]], float)
            depth, best = np.linspace(0, 1, len(values)), model["best_layer"]
            curves += depths.plot(depth, values, lw=1, color=colour)
            depths.plot(depth[best], values[best], "o", ms=4, color=colour)
        ranking.axvline(words, color="0.5", lw=1, ls="--")
        curves.append(depths.axhline(words, color="0.5", lw=1, ls="--"))
        ranking.set_yticks(range(len(models)), names)
        ranking.set(title="best layer, 90 % interval over folds", ylim=(len(models) - 0.4, -0.6))
        ranking.set(xlabel="cross-validated R2")
        depths.set(title="every layer, the best marked", xlabel="depth (0: embeddings)", ylabel="cross-validated R2")
        depths.set_ylim(bottom=max(depths.get_ylim()[0], -0.3))
        depths.legend(curves, [*names, "bag of words"], loc="center left", bbox_to_anchor=(1, 0.5))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=8)
        figure.suptitle(f"{result['config']['dataset_name']}, {result['num_samples']['train']} texts")
    return figure
