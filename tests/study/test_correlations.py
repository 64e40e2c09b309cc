"""Rank statistics against scipy, scikit-learn and direct formulas; on noise; and the paper's 24 correlations."""

import math
from itertools import permutations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.metrics

from fig_plot.findings import correlations
from fig_plot.findings.questions import WORTHWHILE_GAIN, mean_auc
from fig_plot.findings.selection import joint_p_value, selection_null
from fig_plot.import_published import Config, main
from fig_plot.plotting import plot_rank_grid
from tests.conftest import PUBLISHED, ROOT, needs_published


def regressed_partial(x, y, z):
    """Correlation of the residuals of the ranks of x and y after least squares on the ranks of z."""
    ranks = scipy.stats.rankdata([x, y, z], axis=1)
    design = np.column_stack([np.ones(len(x)), ranks[2]])
    left = ranks[:2].T - design @ np.linalg.lstsq(design, ranks[:2].T)[0]
    return np.corrcoef(left.T)[0, 1] if (left.std(0) > 1e-9).all() else math.nan  # not the rounding of nothing left


def mean_of_each(statistic):
    """Mean over models of a function of the complete rows, for tables (models, tasks) with repeated tasks."""

    def of_tables(*tables):
        of_models = [np.array(rows) for rows in zip(*tables, strict=True)]
        with np.errstate(all="ignore"):
            return np.nanmean([statistic(*rows[:, np.isfinite(rows).all(0)]) for rows in of_models])

    return of_tables


def auc_by_hand(x, gain):
    is_positive = gain > WORTHWHILE_GAIN
    return sklearn.metrics.roc_auc_score(is_positive, x) if len(set(is_positive)) == 2 else math.nan


mean_spearman_by_hand = mean_of_each(lambda x, y: scipy.stats.spearmanr(x, y).statistic)


def lead_by_hand(score, baseline, target):
    return abs(mean_spearman_by_hand(score, target)) - abs(mean_spearman_by_hand(baseline, target))


@pytest.mark.parametrize(
    ("statistic", "by_hand", "num_tables"),
    [
        (correlations.mean_cell, np.nanmean, 1),
        (correlations.mean_spearman, mean_spearman_by_hand, 2),
        (correlations.mean_partial_spearman, mean_of_each(regressed_partial), 3),
        (mean_auc, mean_of_each(auc_by_hand), 2),
        (correlations.spearman_lead, lead_by_hand, 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_statistics_of_counts_are_those_of_tables_with_repeated_tasks(statistic, by_hand, num_tables):
    """Every draw again with its tasks written out, by scipy, scikit-learn and least squares."""
    random = np.random.default_rng(8)
    tables = random.normal(size=(3, 3, 12)).round(1)[:num_tables]
    tables += tables[:1].copy()
    for i, table in enumerate(tables):
        table[i, 2 * i] = np.nan
    counts = correlations.draw_tasks(12, 60, seed=1)
    assert (counts.sum(1) == 12).all()
    expected = [by_hand(*(np.repeat(table, row.astype(int), axis=1) for table in tables)) for row in counts]
    np.testing.assert_allclose(statistic(counts, *tables), expected, atol=1e-10)
    found = correlations.bootstrap_interval(statistic, *tables, draws=correlations.Draws(60, seed=1))
    assert found == pytest.approx((by_hand(*tables), *np.quantile(expected, [0.025, 0.975])), abs=1e-10)


def test_spearman_of_too_few_or_equal_values_is_undefined():
    for a, b in (([1, 2], [1, 2]), ([1, 2, 3], [4, 4, 4]), ([0, 1, 2, np.inf], [3, 3, 3, 9])):
        assert math.isnan(correlations.spearman(a, b))


def test_selection_equals_a_loop_over_every_permutation():
    """5 tasks have 120 permutations, fewer than the draws asked for, so that the null is complete."""
    random = np.random.default_rng(10)
    maps, targets = random.normal(size=(4, 5)).round(1), random.normal(size=5)
    own = random.normal(size=(4, 5)).round(1)  # a target of its own for each configuration
    for outcome, direction in ((targets, 1), (targets, -1), (own, 1), (own, -1)):
        pairs = list(zip(maps, np.broadcast_to(outcome, maps.shape), strict=True))
        every = [
            max(direction * scipy.stats.spearmanr(row, target[list(order)]).statistic for row, target in pairs)
            for order in permutations(range(5))
        ]
        observed = [scipy.stats.spearmanr(row, target).statistic for row, target in pairs]
        found = selection_null(maps, outcome, direction=direction)
        assert found.configuration == int(np.argmax(direction * np.array(observed)))
        assert found.best == pytest.approx(observed[found.configuration], abs=1e-12)
        assert found.null_mean == pytest.approx(direction * np.mean(every), abs=1e-12)
        assert found.p_value == pytest.approx(np.mean(np.array(every) >= direction * found.best - 1e-9), abs=1e-12)


@pytest.mark.parametrize("direction", [1, -1])
def test_p_of_several_models_permutes_their_tasks_together(direction):
    random = np.random.default_rng(17)
    shared = random.normal(size=5)
    models = [(random.normal(size=(4, 5)), shared + random.normal(size=5)) for _ in range(3)]

    def best(maps, target):
        return max(direction * scipy.stats.spearmanr(row, target).statistic for row in maps)

    every = [np.mean([best(maps, target[list(order)]) for maps, target in models]) for order in permutations(range(5))]
    found = [selection_null(maps, target, direction=direction) for maps, target in models]
    p = joint_p_value([each.best for each in found], [each.null for each in found], direction)
    reached = np.sum(np.array(every) >= np.mean([best(*model) for model in models]) - 1e-9)
    assert p == pytest.approx((1 + reached) / (1 + 120))
    alone = joint_p_value([found[0].best], [found[0].null], direction)
    assert alone == pytest.approx((1 + 120 * found[0].p_value) / 121)


def test_selection_skips_what_is_missing_and_keeps_the_index():
    targets = np.array([1.0, 2, 3, 4, 5, np.nan])
    maps = np.array([[1, 2, 3, 4, np.nan, 0], [7, 7, 7, 7, 7, 0], [1, 2, 3, 5, 4, np.nan]], float)
    found = selection_null(maps, targets, num_permutations=50)
    assert (found.configuration, found.best) == (2, pytest.approx(0.9))


@pytest.mark.parametrize(("num_models", "grid"), [(1, (1, 1)), (5, (2, 4))])
def test_rank_grid_is_not_reversed_and_names_are_no_formulas(num_models, grid):
    """y falls in x; the last model misses a dataset, and one that every model misses has neither rank nor name."""
    names = ["_hidden", "pay $5$_{x", "plain", "q", "r", "s"]
    rows = [(f"org/m{m}", name, d + m, -(d**2)) for m in range(num_models) for d, name in enumerate(names)]
    cells = pd.DataFrame(rows[:-1], columns=["model", "dataset", "ntps", "mse"])
    cells.loc[cells.dataset == "q", "mse"] = np.nan
    figure = plot_rank_grid(cells, "ntps", "mse")
    figure.canvas.draw()
    panels, texts = [panel for panel in figure.axes if panel.axison], figure.legends[0].get_texts()
    shown = [name for name in names if name != "q"][: 5 - (num_models == 1)]
    assert figure.axes[0].get_gridspec().get_geometry() == grid and panels[0].get_xticks()[-1] == len(shown)
    assert [text.get_text() for text in texts] == shown and not any(text.get_parse_math() for text in texts)
    assert [panel.get_title() for panel in panels] == [f"m{m}\nr = -1.00" for m in range(num_models)]
    for panel, num in zip(panels, [5] * (num_models - 1) + [4], strict=True):
        dots = [tuple(dot.get_offsets()[0]) for dot in panel.collections]
        assert dots == [(d + 1, num - d) for d in range(num)]
    assert figure.get_supylabel() == "mse (rank, 1 = lowest)"
    plt.close(figure)


@needs_published
def test_committed_published_correlations_are_those_of_the_authors_files(tmp_path):
    main(Config(path=PUBLISHED, output_dir=tmp_path))
    probes = pd.read_csv(tmp_path / "fig2.csv").rename(columns={"metric": "measure"})
    probes["measure"] = probes.measure.map({"train_accuracy": "probe_accuracy", "train_mse": "probe_mse"})
    gains = pd.read_csv(tmp_path / "fig3.csv")
    gains = gains.assign(measure="lora_gain", value=gains.lora_accuracy - gains.linear_accuracy)
    cells = pd.concat([probes, gains])
    committed = pd.read_csv(ROOT / "fig_plot" / "data" / "published_correlations.csv", comment="#")
    assert committed.value_counts(["direction", "measure"]).to_dict() == {
        **{("across tasks", measure): 8 for measure in ("probe_accuracy", "probe_mse", "lora_gain")},
        ("across models", "probe_accuracy"): 12,
    }
    for row in committed.itertuples():
        group = cells[(cells.measure == row.measure) & (cells[["model", "dataset"]] == row.group).any(axis=1)]
        assert len(group) == (12 if row.direction == "across tasks" else 8)
        assert round(scipy.stats.spearmanr(group.ntps, group.value).statistic, 2) == row.spearman, row
