"""Pictures of one result: scores over layers and K, probes over layers, words in two subspaces."""

from itertools import cycle
from pathlib import Path

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


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure beside `path` as PNG and PDF, and prints where."""
    for suffix in (".png", ".pdf"):
        target = path.with_name(path.stem + suffix)
        # no date in the file, so that the same result gives the same bytes
        metadata = {"CreationDate": None} if suffix == ".pdf" else {}
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


def draw_null_curve(axes: Axes, result: dict, name: str) -> None:
    """The last layer's score over fractions, with its permuted-label band (two standard deviations) and chance."""
    layer, fractions = result["layers"][-1], result["fractions"]
    if layer[name] is None:
        axes.set(title="last layer: no score", xlabel="K / rank V", ylabel=LABELS[name], ylim=(0, 1.02))
        return
    null, score = layer["null"][name], result["score"][name]
    mean, std = np.array(null["mean"]), np.array(null["std"])
    axes.fill_between(fractions, mean - 2 * std, mean + 2 * std, color="tab:orange", alpha=0.3, lw=0)
    axes.plot(fractions, mean, color="tab:orange", lw=1, label="permuted labels ± 2 sd")
    axes.plot(fractions, layer["chance"], color="0.5", lw=1, ls="--", label="chance K / d")
    axes.plot(fractions, layer[name], color="tab:blue", label=LABELS[name])
    z = "" if score["z"] is None else f",  z = {score['z']:+.1f}"
    axes.set(title=f"last layer: {score['value']:.3f}{z}", xlabel="K / rank V", ylabel=LABELS[name], ylim=(0, 1.02))
    axes.legend(loc="lower right")


def plot_sweep(result: dict) -> Figure:
    """The picture of one run of K_sweep.py: maps over layer and fraction above, last-layer curves below."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(9.5, 5.6))
        for panel, name in zip(axes[0], ("ntps", "ntps_whitened", "retained"), strict=True):
            draw_layer_map(panel, result, name)
        for panel, name in zip(axes[1], ("ntps_label", "ntps_whitened", "retained"), strict=True):
            draw_null_curve(panel, result, name)
        config = result["config"]
        rows = f"{config['dataset_name']} ({config['split']}, n = {result['num_samples']})"
        figure.suptitle(f"{config['model_name']}, {rows}, {config['eigenvectors']} eigenvalues first")
    return figure


def draw_probe_scores(axes: Axes, result: dict, split: str) -> None:
    """Accuracy (Pearson correlation for regression) and R2 of the probes over layers, with the text-only baselines."""
    layers = [layer["layer"] for layer in result["layers"]]
    main = "accuracy" if result["num_classes"] else "pearson"
    for name, label, colour in ((main, main, "tab:blue"), ("r2", "R2, least squares", "tab:orange")):
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
    for name, colour in (("ntps", "tab:blue"), ("ntps_whitened", "tab:green"), ("retained", "tab:red")):
        values = [np.nan if layer[name] is None else np.mean(layer[name]) for layer in ntps["layers"]]
        axes.plot(layers, values, color=colour, marker="o", ms=3, label=LABELS[name])
    axes.set(title="NTPS, mean over K", xlabel="layer", ylim=(0, 1.02))


def plot_probes(result: dict, ntps: dict | None, split: str) -> Figure:
    """The picture of one run of linear_sklearn.py: probes by layer and, if there is any, NTPS by layer beside them."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, 2 if ntps else 1, figsize=(7.2 if ntps else 3.9, 3.2), squeeze=False)
        draw_probe_scores(axes[0, 0], result, split)
        if ntps:
            draw_ntps_over_layers(axes[0, 1], ntps)
        for panel in axes[0]:
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.legend(loc="best")
        config, num = result["config"], result["num_samples"]
        rows = f"n = {num['train']} train, {num['test']} test, d = {result['num_features']}"
        figure.suptitle(f"{config['model_name']}, {config['dataset_name']} ({rows})", fontsize=8)
    return figure


SUBSPACES = {"U": "Perception space, U'x", "V": "Autoregression space, V'x"}
CATEGORY_COLOURS = ("Greens", "Reds", "Blues", "Purples", "Oranges", "Greys")
CATEGORY_MARKERS = "os^Dv"  # the paper has colours alone; green and red look alike to one man in twelve


def draw_words(axes: Axes, words: pd.DataFrame, boundary: dict) -> None:
    """Words of one subspace as points, a colour and marker per category and a shade per word, and the dashed line."""
    styles = zip(cycle(CATEGORY_COLOURS), cycle(CATEGORY_MARKERS), words.groupby("category", sort=False))
    for colours, marker, (category, in_category) in styles:
        axes.plot([], [], ls="", label=category)  # a heading in the legend
        shades = plt.get_cmap(colours)(np.linspace(0.4, 1, len(in_category)))
        for shade, row in zip(shades, in_category.itertuples(), strict=True):
            seen_through = {"mec": shade, "mfc": (*shade[:3], 0.4)}  # words may lie on one another
            style = {"ls": "", "marker": marker, "ms": 4.5, "color": shade, **seen_through}
            axes.plot(row.component_1, row.component_2, label=row.word, **style)
    axes.margins(0.1)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim(), xlabel="component 1", ylabel="component 2")  # fixed: it clips
    weights = np.array(boundary["weights"])
    if weights.any():
        foot = -boundary["intercept"] * weights / (weights @ weights)
        axes.axline(foot, foot + weights[::-1] * (-1, 1), color="black", lw=1, ls="--")


def plot_alignment(words: pd.DataFrame, boundaries: dict | None = None, notes: dict | None = None) -> Figure:
    """The paper's Figure 1: words in the first two components of U, left, and of V, right.

    Args:
        words: a row per subspace ("U", "V") and word, with columns subspace, category, word, component_1, component_2,
            as alignment_vis.py writes them.
        boundaries: of each subspace, as `separating_line` gives them; None: of the first two categories, made here.
        notes: a line under the title of each subspace.
    """
    first, second = list(dict.fromkeys(words.category))[:2]
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.9))
        for panel, (subspace, title) in zip(axes, SUBSPACES.items(), strict=True):
            in_subspace = words[words.subspace == subspace]
            compared = in_subspace[in_subspace.category.isin([first, second])]
            boundary = (boundaries or {}).get(subspace) or separating_line(
                compared[["component_1", "component_2"]].to_numpy(), (compared.category == first).to_numpy()
            )
            draw_words(panel, in_subspace, boundary)
            panel.set_title(f"{title}\n{notes[subspace]}" if notes else title)
        handles, labels = axes[0].get_legend_handles_labels()
        handles.append(Line2D([], [], color="black", lw=1, ls="--"))
        legend = figure.legend(
            handles,
            [*labels, f"{first} / {second}"],
            loc="outside right center",
            ncols=1 + len(labels) // 18,
            labelspacing=0.3,
        )
        for text, handle in zip(legend.get_texts(), handles, strict=True):
            text.set_fontweight("bold" if handle.get_linestyle() == handle.get_marker() == "None" else "normal")
    return figure
