"""One pure function per kind of panel: results in, matplotlib figure out."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # figures go to files; no screen is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("paper.mplstyle")
LABELS = {
    "ntps": "NTPS",
    "ntps_label": "NTPS, label directions",
    "ntps_whitened": "NTPS, whitened",
    "retained": "retained by the probe",
}


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure beside `path` as PNG and PDF, and prints where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".pdf"):
        target = path.with_name(path.stem + suffix)
        temporary = target.with_name(f"{target.name}.tmp")
        # no date in the file, so that the same result gives the same bytes
        metadata = {"CreationDate": None} if suffix == ".pdf" else {}
        figure.savefig(temporary, format=suffix[1:], metadata=metadata)
        temporary.replace(target)
        print(target)
    plt.close(figure)


def draw_layer_map(axes: Axes, result: dict, name: str) -> None:
    """Map of one score over layers (up) and fractions (right), annotated with its range in the colour bar."""
    values = np.array([layer[name] for layer in result["layers"]])
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
        values = [np.mean(layer[name]) for layer in ntps["layers"]]
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
