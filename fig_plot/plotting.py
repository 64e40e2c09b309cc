"""Draw the figures of a study: one pure function per kind of panel, from tables to a matplotlib figure."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from scipy.stats import rankdata, spearmanr

from fig_plot.tables import LABELS
from utils.pictures import PLAIN_TEXT, title_of


def shown(name: str) -> str:
    """The label of a score or measure, or a name without its owner, as figures show it."""
    return LABELS.get(name, name.replace("_", " ")).replace("`", "")


def draw_rank_scatter(axes: Axes, x: np.ndarray, y: np.ndarray, title: str) -> dict[int, Artist]:
    """Draws ranks of y over ranks of x, (n,) each, 1 = lowest, with their Spearman and least-squares line.

    Skips pairs with a missing side. Returns each dot by its position in x; its marker is that position, from 1.
    """
    complete = np.isfinite(x) & np.isfinite(y)
    rank_x, rank_y = rankdata(x[complete]), rankdata(y[complete])
    is_defined = complete.sum() > 2 and np.ptp(rank_x) > 0 and np.ptp(rank_y) > 0
    if is_defined:
        ends = np.array([rank_x.min(), rank_x.max()])
        axes.plot(ends, np.polyval(np.polyfit(rank_x, rank_y, 1), ends), color="tab:red", lw=1, ls="--", alpha=0.8)
    dots: dict[int, Artist] = {}
    for position, of_x, of_y in zip(np.flatnonzero(complete), rank_x, rank_y, strict=True):
        with plt.rc_context({"text.parse_math": True}):
            marker = MarkerStyle(f"${position + 1}$")
        size = 28 if position < 9 else 60  # markers fill a square, so two digits side by side need a larger one
        dots[int(position)] = axes.scatter(of_x, of_y, color="black", zorder=2, marker=marker, s=size, lw=0.2)
    limits, ticks = (0, len(x) + 1), sorted({1, (len(x) + 1) // 2, len(x)})
    axes.set(xlim=limits, ylim=limits, xticks=ticks, yticks=ticks, aspect="equal")
    r = f"r = {spearmanr(rank_x, rank_y).statistic:.2f}" if is_defined else "r undefined"
    axes.set_title(f"{title}\n{r}", fontsize=8)
    return dots


def plot_rank_grid(data: pd.DataFrame, x: str, y: str) -> Figure:
    """The paper's Figures 2 and 3: one panel per model, ranks of its datasets in x and in y, neither reversed.

    Args:
        data: a row per model and dataset, with columns model, dataset and those of x and y. Panels and dots follow the
            order of the rows; the figure skips datasets without x or y.
        x: column of the horizontal axis; named after LABELS if they have it.
        y: column of the vertical axis.
    """
    models, datasets = list(dict.fromkeys(data.model)), list(dict.fromkeys(data.dropna(subset=[x, y]).dataset))
    cells = data.set_index(["model", "dataset"])
    num_columns = min(4, len(models))
    num_rows = -(-len(models) // num_columns)
    with plt.style.context(PLAIN_TEXT):
        # inches; the note needs 3.8, a line of the legend 0.17
        size = (max(3.9, 1.5 * num_columns + 0.4) + 1.8, max(1.8 * num_rows + 0.6, 0.17 * len(datasets) + 0.3))
        figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False, sharex=True, sharey=True)
        for panel in axes.flat[len(models) :]:
            panel.set_axis_off()
        dots: dict[int, Artist] = {}
        for panel, model in zip(axes.flat, models, strict=False):
            values_x, values_y = cells.loc[model].reindex(datasets)[[x, y]].to_numpy(float).T
            dots |= draw_rank_scatter(panel, values_x, values_y, title_of(model))
        for panel in axes.flat[max(0, len(models) - num_columns) : len(models)]:
            panel.tick_params(labelbottom=True)  # the lowest panel of its column, even above an empty cell
        figure.supxlabel(f"{shown(x)} (rank, 1 = lowest)", fontsize=9)
        figure.supylabel(f"{shown(y)} (rank, 1 = lowest)", fontsize=9)
        figure.suptitle("a dot is one dataset; r: Spearman; dashed: least-squares fit of the ranks", fontsize=7)
        labels = [datasets[position].rsplit("/")[-1] for position in sorted(dots)]
        figure.legend([dots[position] for position in sorted(dots)], labels, loc="outside right center", fontsize=7)
    return figure


def plot_before_after(scores: pd.DataFrame, names: Sequence[str]) -> Figure:
    """The paper's Figure 4, left: scores after LoRA over the same before it, a panel per score, a colour per model.

    `scores` has a row per model and dataset, with columns model, `<score>_before` and `<score>` for each of `names`.
    """
    with plt.style.context(PLAIN_TEXT):
        figure, axes = plt.subplots(1, len(names), figsize=(2.5 * len(names) + 1.2, 2.8), squeeze=False)
        handles: dict[str, Artist] = {}
        for panel, name in zip(axes[0], names, strict=True):
            for model, rows in scores.groupby("model", sort=False):
                handles[title_of(str(model))] = panel.scatter(rows[f"{name}_before"], rows[name], s=10)
            both = scores[[f"{name}_before", name]].to_numpy()
            ends = [both.min(), both.max()]
            [handles["no change"]] = panel.plot(ends, ends, color="0.5", lw=1, ls="--")
            panel.set(title=shown(name), xlabel="before LoRA", ylabel="after LoRA")
        figure.suptitle("a dot is a dataset", fontsize=7)
        figure.legend(list(handles.values()), list(handles), loc="outside right center")
    return figure


def plot_methods(cells: pd.DataFrame, methods: dict[str, str]) -> Figure:
    """The paper's Figure 4, right, and Table 1: test accuracy of each training method, a panel per model.

    `cells` has a row per model and dataset, and the columns of `methods` (column -> label); missing values leave a gap.
    """
    models, datasets = list(dict.fromkeys(cells.model)), sorted(set(cells.dataset), reverse=True)
    heights = np.arange(len(datasets))
    with plt.style.context(PLAIN_TEXT):
        size = (1.9 * len(models) + 2.6, 0.22 * len(datasets) + 1.1)
        figure, axes = plt.subplots(1, len(models), figsize=size, squeeze=False, sharey=True)
        for panel, model in zip(axes[0], models, strict=True):
            rows = cells[cells.model == model].set_index("dataset").reindex(datasets)
            panel.scatter(rows.majority_accuracy, heights, marker="|", color="0.5", s=40, label="majority class")
            for (column, label), marker in zip(methods.items(), "osD^v", strict=False):
                panel.scatter(rows[column], heights, marker=marker, s=14, alpha=0.8, label=label)
            panel.set(title=title_of(model), xlabel="test accuracy")
            panel.grid(axis="y", lw=0.3)
        axes[0, 0].set_yticks(heights, [name.rsplit("/")[-1] for name in datasets], parse_math=False)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def plot_overview(rows: pd.DataFrame) -> Figure:
    """Draws a panel per claim, with a bar for each row of `findings.page.overview_rows`; positive is as claimed."""
    claims, labels = list(dict.fromkeys(rows["claim"])), list(dict.fromkeys(rows["label"]))
    colours = {"published": "black", "same procedure": "tab:orange", "fixed rule": "tab:blue", "best simple": "0.5"}
    with plt.style.context(PLAIN_TEXT):
        figure, axes = plt.subplots(1, len(claims), figsize=(8.6, 0.34 * len(labels) + 1.2), sharey=True)
        for panel, claim in zip(axes, claims, strict=True):
            for _, row in rows[rows["claim"] == claim].iterrows():
                height = -labels.index(row["label"])
                colour = next(colour for start, colour in colours.items() if row["label"].startswith(start))
                panel.plot([row["low"], row["high"]], [height, height], color=colour, lw=1)
                panel.plot(row["value"], height, "o", ms=4, color=colour)
                if pd.notna(row["noise"]):
                    panel.plot(row["noise"], height, "|", ms=9, color="tab:red")
                if pd.notna(row["note"]):
                    panel.text(0.04, height + 0.22, row["note"], fontsize=7, color="0.3")  # right of the line at 0
            panel.axvline(0, color="black", lw=0.6)
            panel.set(title=f"higher NTPS:\n{claim}", xlabel="Spearman", xlim=(-1.02, 1.25))
        axes[0].set_yticks([-height for height in range(len(labels))], [textwrap.fill(name, 36) for name in labels])
        axes[0].plot([], [], "|", color="tab:red", ms=9, ls="", label="the same procedure in noise")
        title = "positive: as the paper claims. Bars: range of the models (black), 95 % interval; none if chosen"
        figure.legend(loc="outside lower right", fontsize=7, title=title, title_fontsize=7)
    return figure
