"""Rank statistics against scipy, scikit-learn and direct formulas; on noise; and the paper's 24 correlations."""

import math
from itertools import permutations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.metrics

from fig_plot.findings.correlations import (
    Draws,
    bootstrap_interval,
    correlation,
    draw_tasks,
    drawn_auc,
    mean_cell,
    mean_partial_spearman,
    mean_spearman,
    rank,
    spearman,
    spearman_lead,
    value_of,
)
from fig_plot.findings.questions import WORTHWHILE_GAIN, mean_auc
from fig_plot.findings.selection import joint_p_value, leave_one_out_selection, selection_null
from fig_plot.import_published import published_tables
from fig_plot.plotting import plot_rank_grid
from tests.conftest import PUBLISHED, ROOT, needs_published


def correlated_pairs(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs with many ties on both sides."""
    random = np.random.default_rng(seed)
    x = random.normal(size=num)
    return x.round(), (x + random.normal(size=num)).round()


# ------------------------------------------------------------------ one pair of vectors
@pytest.mark.parametrize(
    ("kind", "statistic"),
    [("spearman", "spearmanr"), ("kendall", "kendalltau"), ("weighted_tau", "weightedtau")],
)
def test_equals_scipy_with_ties_and_without_the_missing(kind, statistic):
    x, y = correlated_pairs(30, seed=1)
    expected = getattr(scipy.stats, statistic)(x, y).statistic
    x, y = np.insert(x, [0, 7], [np.nan, 1e9]), np.insert(y, [0, 7], [5, np.inf])
    assert correlation(x, y, kind) == pytest.approx(expected, abs=1e-12)
    if kind == "spearman":
        assert spearman(x, y) == pytest.approx(expected, abs=1e-12)
    for a, b in (([1, 2], [1, 2]), ([1, 2, 3], [4, 4, 4]), ([0, 1, 2, np.nan], [3, 3, 3, 9])):
        assert math.isnan(correlation(a, b, kind)) and math.isnan(spearman(a, b))


def test_rank_one_is_the_smallest():
    np.testing.assert_array_equal(rank([30, 10, np.nan, 20, 10]), [4, 1.5, np.nan, 3, 1.5])
    np.testing.assert_array_equal(rank([[np.inf, 1, 0], [-np.inf, 0, 0]]), [[np.nan, 2, 1], [np.nan, 1.5, 1.5]])


def regressed_partial(x, y, z):
    """Correlation of the residuals of the ranks of x and y after least squares on the ranks of z."""
    ranks = scipy.stats.rankdata([x, y, z], axis=1)
    design = np.column_stack([np.ones(len(x)), ranks[2]])
    left = ranks[:2].T - design @ np.linalg.lstsq(design, ranks[:2].T)[0]
    return np.corrcoef(left.T)[0, 1] if (left.std(0) > 1e-9).all() else math.nan  # not the rounding of nothing left


def test_partial_is_the_correlation_of_what_regression_leaves():
    x, y = correlated_pairs(25, seed=2)
    z = x + np.random.default_rng(3).normal(size=25).round()
    expected = regressed_partial(x, y, z)
    assert value_of(mean_partial_spearman, x, y, z) == pytest.approx(expected, abs=1e-12)
    assert value_of(mean_partial_spearman, x, y, np.ones(25)) == pytest.approx(spearman(x, y))  # takes nothing away
    # three more rows, in each of which another side is missing
    with_missing = (np.insert(side, [0, 7, 9], gap) for side, gap in zip((x, y, z), np.diag([np.nan] * 3), strict=True))
    assert value_of(mean_partial_spearman, *with_missing) == pytest.approx(expected, abs=1e-12)


def test_auc_is_the_chance_that_a_positive_scores_higher():
    """Counted by hand: of 2 x 3 pairs 4 are in order and one ties; a missing score takes no part."""
    score, positive = np.array([3, 1, 1, 2, 0, np.nan]), np.array([True, True, False, False, False, False])
    assert drawn_auc(np.ones((1, 6)), score, positive) == pytest.approx(4.5 / 6)
    assert np.isnan(drawn_auc(np.ones((1, 3)), score[[0, 1, 5]], positive[[0, 1, 5]]))
    gains = np.where(positive, 2 * WORTHWHILE_GAIN, 0)
    assert value_of(mean_auc, [score, score], [gains, 0 * gains]) == pytest.approx(4.5 / 6)  # the second has no gain


# ------------------------------------------------------------------ resampled tasks
def mean_of_each(statistic):
    """Mean over models of a function of the complete rows, for tables (models, tasks) with repeated tasks."""

    def of_tables(*tables):
        values = []
        for model in zip(*tables, strict=True):
            rows = np.array(model)
            with np.errstate(all="ignore"):
                values.append(statistic(*rows[:, np.isfinite(rows).all(0)]))
        return np.nanmean(values)

    return of_tables


def auc_by_hand(x, gain):
    is_positive = gain > WORTHWHILE_GAIN
    return sklearn.metrics.roc_auc_score(is_positive, x) if len(set(is_positive)) == 2 else math.nan


BY_HAND = {
    mean_cell: lambda table: np.nanmean(table),
    mean_spearman: mean_of_each(lambda x, y: scipy.stats.spearmanr(x, y).statistic),
    mean_partial_spearman: mean_of_each(regressed_partial),
    mean_auc: mean_of_each(auc_by_hand),
    spearman_lead: lambda a, b, y: abs(BY_HAND[mean_spearman](a, y)) - abs(BY_HAND[mean_spearman](b, y)),
}
NUM_TABLES = {
    mean_cell: 1,
    mean_spearman: 2,
    mean_partial_spearman: 3,
    mean_auc: 2,
    spearman_lead: 3,
}


@pytest.mark.parametrize("statistic", BY_HAND)
def test_statistics_of_counts_are_those_of_tables_with_repeated_tasks(statistic):
    """Every draw again with its tasks written out, by scipy, scikit-learn and least squares."""
    random = np.random.default_rng(8)
    tables = random.normal(size=(3, 3, 12)).round(1)[: NUM_TABLES[statistic]]
    tables += tables[:1].copy()
    for i, table in enumerate(tables):
        table[i, 2 * i] = np.nan
    counts = draw_tasks(12, 60, seed=1)
    assert (counts.sum(1) == 12).all()
    expected = [BY_HAND[statistic](*(np.repeat(table, row.astype(int), axis=1) for table in tables)) for row in counts]
    np.testing.assert_allclose(statistic(counts, *tables), expected, atol=1e-10)
    found = bootstrap_interval(statistic, *tables, draws=Draws(60, seed=1))
    assert found == pytest.approx((BY_HAND[statistic](*tables), *np.quantile(expected, [0.025, 0.975])), abs=1e-10)


# ------------------------------------------------------------------ intervals
@pytest.mark.slow
def test_bootstrap_covers_the_truth():
    """A correlation of normal pairs, 40 rows: 95 % within some four standard errors of 200 trials."""
    random = np.random.default_rng(7)
    truth = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman's of a normal correlation of .5
    covered = []
    for trial in range(200):
        x = random.normal(size=40)
        y = 0.5 * x + math.sqrt(0.75) * random.normal(size=40)
        _, low, high = bootstrap_interval(mean_spearman, x, y, draws=Draws(200, seed=trial))
        covered.append(low < truth < high)
    assert 0.88 < np.mean(covered) < 0.99


# ------------------------------------------------------------------ choosing a configuration
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


@pytest.mark.parametrize("select", [selection_null, leave_one_out_selection])
def test_a_negative_claim_finds_a_negative_relation_and_no_positive_one(select):
    """One configuration falls with the target, one rises: each is found if the claim has its sign."""
    random = np.random.default_rng(16)
    targets = random.normal(size=12)
    maps = random.normal(size=(20, 12))
    maps[3], maps[8] = -targets, np.exp(targets)
    for direction, planted in ((-1, 3), (1, 8)):
        found = select(maps, targets, 200, direction=direction)
        value = found.best if select is selection_null else found.correlation
        assert value == pytest.approx(direction) and found.p_value < 0.01
        assert np.all((found.configuration if select is selection_null else found.chosen) == planted)
    falling = np.vstack([maps[:3], -targets])
    assert select(falling, targets, 200, direction=1).p_value > 0.05


def test_selection_skips_what_is_missing_and_keeps_the_index():
    targets = np.array([1.0, 2, 3, 4, 5, np.nan])
    maps = np.array([[1, 2, 3, 4, np.nan, 0], [7, 7, 7, 7, 7, 0], [1, 2, 3, 5, 4, np.nan]], float)
    found = selection_null(maps, targets, num_permutations=50)
    assert (found.configuration, found.best) == (2, pytest.approx(0.9))
    with pytest.raises(ValueError, match="three tasks"):
        selection_null(maps[:, :2], targets[:2])


def test_leave_one_out_predicts_the_fraction_of_the_others_below():
    """The correlation of a single configuration is therefore its Spearman."""
    x, y = correlated_pairs(12, seed=12)
    assert leave_one_out_selection(x[None], y, 50).correlation == pytest.approx(spearman(x, y), abs=1e-12)
    found = leave_one_out_selection([[10, 20, 20, 40, np.nan, 70]], [1, 2, 3, 4, 5, np.nan])
    np.testing.assert_allclose(found.predicted, [0, 0.5, 0.5, 1, np.nan, np.nan])
    np.testing.assert_array_equal(found.chosen, [0, 0, 0, 0, -1, -1])


def test_leave_one_out_does_not_see_the_task_left_out():
    random = np.random.default_rng(14)
    maps, targets = random.normal(size=(20, 12)), random.normal(size=12)
    changed = maps.copy()
    changed[:, 3] = random.normal(size=20)
    first, second = (leave_one_out_selection(table, targets, num_permutations=1) for table in (maps, changed))
    assert first.chosen[3] == second.chosen[3]
    assert (first.chosen != second.chosen).any()  # the other choices do see it


def test_leave_one_out_under_noise_has_mean_zero_and_a_wider_spread():
    """The sd of a plain Spearman of 12 tasks is .30."""
    random = np.random.default_rng(15)
    pairs = [(random.normal(size=(19, 12)), random.normal(size=12)) for _ in range(400)]
    values = [leave_one_out_selection(maps, target, num_permutations=1).correlation for maps, target in pairs]
    assert abs(np.mean(values)) < 0.07  # three standard errors
    assert 0.40 < np.std(values) < 0.52


# ------------------------------------------------------------------ the figure, and the paper's numbers
def made_up_cells(num_models: int) -> pd.DataFrame:
    """5 datasets per model, y falling in x; the last model misses one."""
    rows = [
        {"model": f"org/m{m}", "dataset": f"d{d}", "ntps": d + m, "mse": -(d**2)}
        for m in range(num_models)
        for d in range(5)
    ]
    return pd.DataFrame(rows[:-1])


@pytest.mark.parametrize(("num_models", "grid", "names"), [(1, (1, 1), True), (3, (1, 3), False), (5, (2, 4), True)])
def test_rank_grid_is_not_reversed(num_models, grid, names):
    figure = plot_rank_grid(made_up_cells(num_models), "ntps", "mse", names)
    panels = [panel for panel in figure.axes if panel.axison]
    assert figure.axes[0].get_gridspec().get_geometry() == grid and len(figure.legends) == names
    assert [panel.get_title() for panel in panels] == [f"m{m}\nr = -1.00" for m in range(num_models)]
    for panel, num in zip(panels, [5] * (num_models - 1) + [4], strict=True):
        dots = [tuple(dot.get_offsets()[0]) for dot in panel.collections]
        assert dots == [(d + 1, num - d) for d in range(num)]
    assert figure.get_supylabel() == "mse (rank, 1 = lowest)"
    plt.close(figure)


@needs_published
def test_committed_published_correlations_are_those_of_the_authors_files():
    tables = published_tables(PUBLISHED)
    probes = tables["fig2.csv"].rename(columns={"metric": "measure"})
    probes["measure"] = probes.measure.map({"train_accuracy": "probe_accuracy", "train_mse": "probe_mse"})
    gains = tables["fig3.csv"]
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
