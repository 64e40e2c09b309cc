"""One pure function per kind of panel: results in, matplotlib figure out."""

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

STYLE = Path(__file__).with_name("paper.mplstyle")
LABELS = {
    "ntps": "NTPS",
    "ntps_label": "NTPS, label directions",
    "ntps_whitened": "NTPS, whitened",
    "retained": "retained by the probe",
    "lora_gain": "LoRA gain",
    "mse": "MSE",
    "probe_mse": "probe MSE / variance",
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


SUBSPACES = {"U": "Perception space, U'x", "V": "Autoregression space, V'x"}
CATEGORY_COLOURS = ("Greens", "Reds", "Blues", "Purples", "Oranges", "Greys")
CATEGORY_MARKERS = "os^Dv"  # the paper has colours alone; green and red look alike to one man in twelve


def standardize(coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale, (k,) each, that give the columns of (n, k) mean 0 and variance 1; a constant one has scale inf.

    Constant is what spreads by less than 1e-6 of its mean: rounding of float32 states, not to be blown up to variance
    1. The first component of an uncentred problem is constant where tokens are fewer than dimensions.
    """
    mean, spread = coordinates.mean(0), coordinates.std(0)
    return mean, np.where(spread > 1e-6 * np.abs(mean), spread, np.inf)


def separating_line(coordinates: np.ndarray, is_first: np.ndarray) -> dict:
    """The line w'z + b = 0 of a logistic regression (scikit-learn, C = 1, standardised coordinates) of two categories.

    Args:
        coordinates: z, (n, 2).
        is_first: whether a row is of the first category, (n,); on its side w'z + b > 0.

    Returns:
        `weights` w and `intercept` b, for the coordinates as they are, not standardised.
    """
    from sklearn.linear_model import LogisticRegression  # only here: the import takes a second

    mean, scale = standardize(coordinates)
    model = LogisticRegression().fit((coordinates - mean) / scale, is_first)
    weights = model.coef_[0] / scale
    return {"weights": weights.tolist(), "intercept": float(model.intercept_[0] - weights @ mean)}


def draw_words(axes: Axes, words: pd.DataFrame, boundary: dict) -> None:
    """Words of one subspace as points, a colour and marker per category and a shade per word, and the dashed line."""
    styles = zip(cycle(CATEGORY_COLOURS), cycle(CATEGORY_MARKERS), words.groupby("category", sort=False))
    for colours, marker, (category, of_category) in styles:
        axes.plot([], [], ls="", label=category)  # a heading in the legend
        shades = plt.get_cmap(colours)(np.linspace(0.4, 1, len(of_category)))
        for shade, row in zip(shades, of_category.itertuples(), strict=True):
            axes.plot(row.component_1, row.component_2, ls="", marker=marker, ms=4.5, color=shade, label=row.word)
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
            of_subspace = words[words.subspace == subspace]
            compared = of_subspace[of_subspace.category.isin([first, second])]
            boundary = (boundaries or {}).get(subspace) or separating_line(
                compared[["component_1", "component_2"]].to_numpy(), (compared.category == first).to_numpy()
            )
            draw_words(panel, of_subspace, boundary)
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


def draw_rank_scatter(axes: Axes, x: np.ndarray, y: np.ndarray, title: str, names: list[str] | None = None) -> None:
    """Ranks of y over ranks of x, 1 = lowest on both axes, with their Spearman correlation and least-squares line.

    Args:
        x: (n,).
        y: (n,). Pairs with a missing side are left out before ranking.
        title: stands above the correlation.
        names: of the dots, for a legend, each then drawn as its number; None: plain dots.
    """
    from fig_plot.correlations import rank, spearman  # only here: scipy.stats takes half a second to import

    complete = np.isfinite(x) & np.isfinite(y)
    rank_x, rank_y, r = rank(x[complete]), rank(y[complete]), spearman(x, y)
    if np.isfinite(r):
        ends = np.array([rank_x.min(), rank_x.max()])
        axes.plot(ends, np.polyval(np.polyfit(rank_x, rank_y, 1), ends), color="tab:red", lw=1, ls="--", alpha=0.8)
    for i, position in enumerate(np.flatnonzero(complete)):
        number = position + 1  # that of the name, also where a model misses a dataset
        # markers fill a square, so two digits side by side need a larger one
        numeral = {"marker": f"${number}$", "s": 28 if number < 10 else 60, "lw": 0.2}
        style = numeral if names else {"marker": "o", "s": 8}
        axes.scatter(rank_x[i], rank_y[i], color="black", zorder=2, label=names[position] if names else None, **style)
    limits, ticks = (0, len(x) + 1), sorted({1, (len(x) + 1) // 2, len(x)})
    axes.set(xlim=limits, ylim=limits, xticks=ticks, yticks=ticks, aspect="equal")
    axes.set_title(f"{title}\n" + (f"r = {r:.2f}" if np.isfinite(r) else "r undefined"), fontsize=8)


def plot_rank_grid(data: pd.DataFrame, x: str, y: str, names: bool = False) -> Figure:
    """The paper's Figures 2 and 3: one panel per model, ranks of its datasets in x and in y, neither reversed.

    Args:
        data: a row per model and dataset, with columns model, dataset and those of x and y. Panels and dots follow the
            order of the rows.
        x: column of the horizontal axis; named after LABELS if it stands there.
        y: column of the vertical axis.
        names: draw each dot as a number and list the datasets beside the panels.
    """
    models, datasets = list(dict.fromkeys(data.model)), list(dict.fromkeys(data.dataset))
    cells = data.set_index(["model", "dataset"])
    num_columns = min(4, len(models))
    num_rows = -(-len(models) // num_columns)
    with plt.style.context(STYLE):
        legend_height = 0.17 * len(datasets) + 0.3 if names else 0
        # inches; the note needs 3.8
        size = (max(3.9, 1.5 * num_columns + 0.4) + 1.8 * names, max(1.8 * num_rows + 0.6, legend_height))
        figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False, sharex=True, sharey=True)
        for panel in axes.flat[len(models) :]:
            panel.set_axis_off()
        for panel, model in zip(axes.flat, models, strict=False):
            of_model = cells.loc[model].reindex(datasets)
            values_x, values_y = (of_model[column].to_numpy(float) for column in (x, y))
            draw_rank_scatter(panel, values_x, values_y, model.rsplit("/")[-1], datasets if names else None)
        for panel in axes.flat[max(0, len(models) - num_columns) : len(models)]:
            panel.tick_params(labelbottom=True)  # the lowest of its column, also above an empty place
        label_x, label_y = (f"{LABELS.get(column, column.replace('_', ' '))} (rank, 1 = lowest)" for column in (x, y))
        figure.supxlabel(label_x, fontsize=9)
        figure.supylabel(label_y, fontsize=9)
        note = "a dot is one dataset; r: Spearman; dashed: least-squares fit of the ranks"
        figure.suptitle(note, fontsize=7)
        if names:
            pairs = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in axes.flat]
            handles = {label: handle for pair in pairs for handle, label in pair}
            shown = [name for name in datasets if name in handles]
            labels = [name.rsplit("/")[-1] for name in shown]
            figure.legend([handles[name] for name in shown], labels, loc="outside right center", fontsize=7)
    return figure


def plot_before_after(scores: pd.DataFrame, names: tuple[str, ...]) -> Figure:
    """The paper's Figure 4, left: scores after LoRA over the same before it, a panel per score, a colour per model.

    Args:
        scores: a row per model and dataset, with columns model, `<score>_before` and `<score>`.
        names: the scores.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, len(names), figsize=(2.5 * len(names) + 1.2, 2.7), squeeze=False)
        for panel, name in zip(axes[0], names, strict=True):
            for model, rows in scores.groupby("model", sort=False):
                panel.scatter(rows[f"{name}_before"], rows[name], s=10, label=str(model).rsplit("/")[-1])
            both = scores[[f"{name}_before", name]].to_numpy()
            ends = [both.min(), both.max()]
            panel.plot(ends, ends, color="0.5", lw=1, ls="--", label="no change")
            difference = (scores[name] - scores[f"{name}_before"]).mean()
            panel.set(title=f"{LABELS[name]}\nmean change {difference:+.3f}", xlabel="before LoRA", ylabel="after LoRA")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def plot_methods(cells: pd.DataFrame, methods: dict[str, str]) -> Figure:
    """The paper's Figure 4, right, and Table 1: test accuracy of every way of training, a panel per model.

    Args:
        cells: a row per model and dataset, with columns model, dataset, majority_accuracy and those of `methods`.
        methods: column -> label; missing values leave a gap.
    """
    models, datasets = list(dict.fromkeys(cells.model)), sorted(set(cells.dataset), reverse=True)
    heights = np.arange(len(datasets))
    with plt.style.context(STYLE):
        size = (1.9 * len(models) + 2.6, 0.22 * len(datasets) + 1.1)
        figure, axes = plt.subplots(1, len(models), figsize=size, squeeze=False, sharey=True)
        for panel, model in zip(axes[0], models, strict=True):
            rows = cells[cells.model == model].set_index("dataset").reindex(datasets)
            panel.scatter(rows.majority_accuracy, heights, marker="|", color="0.5", s=40, label="majority class")
            for (column, label), marker in zip(methods.items(), "osD^v", strict=False):
                panel.scatter(rows[column], heights, marker=marker, s=14, alpha=0.8, label=label)
            panel.set(title=model.rsplit("/")[-1], xlabel="test accuracy")
            panel.grid(axis="y", lw=0.3)
        axes[0, 0].set_yticks(heights, [name.rsplit("/")[-1] for name in datasets])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def plot_sensitivity(table: pd.DataFrame, names: tuple[str, ...], title: str) -> Figure:
    """Correlation across tasks at every layer and K, a panel per score: what choosing a layer and K would choose from.

    Args:
        table: a row per score, layer and fraction, with columns score, layer, fraction, spearman.
        names: the scores.
        title: of the figure.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, len(names), figsize=(2.4 * len(names) + 0.8, 2.4), squeeze=False, sharey=True)
        for panel, name in zip(axes[0], names, strict=True):
            values = table[table.score == name].pivot(index="layer", columns="fraction", values="spearman")
            extent = (values.columns[0], values.columns[-1], values.index[0] - 0.5, values.index[-1] + 0.5)
            style = {"origin": "lower", "aspect": "auto", "cmap": "RdBu_r", "vmin": -1, "vmax": 1}
            image = panel.imshow(values, extent=extent, **style)
            panel.set(title=LABELS[name], xlabel="K / rank V", yticks=values.index)
        axes[0, 0].set_ylabel("layer")
        figure.colorbar(image, ax=axes[0].tolist(), label="Spearman")
        figure.suptitle(title)
    return figure


def plot_forest(table: pd.DataFrame, scores: dict[str, str], measures: dict[str, str]) -> Figure:
    """Correlation of each score (a row) with each measure (a panel), with its 95 % interval.

    Args:
        table: a row per score and measure, with columns score, measure, value, low, high.
        scores: name -> label, from top to bottom; "" draws a gap.
        measures: name -> title.
    """
    with plt.style.context(STYLE):
        size = (2.1 * len(measures) + 1.9, 0.2 * len(scores) + 0.9)
        figure, axes = plt.subplots(1, len(measures), figsize=size, squeeze=False, sharey=True)
        for panel, (measure, title) in zip(axes[0], measures.items(), strict=True):
            rows = table[table.measure == measure].set_index("score")
            for height, name in enumerate(reversed(scores)):
                if name in rows.index:
                    row = rows.loc[name]
                    colour = "tab:blue" if row.low > 0 else "tab:red" if row.high < 0 else "0.5"
                    panel.plot([row.low, row.high], [height, height], color=colour, lw=1)
                    panel.plot(row.value, height, "o", ms=4, color=colour)
            panel.axvline(0, color="black", lw=0.6)
            panel.set(title=title, xlabel="Spearman", xlim=(-1.02, 1.02))
        axes[0, 0].set_yticks(range(len(scores)), list(reversed(scores.values())))
    return figure
