"""The statistics of the study on planted answers, and its committed tables made again."""

import shutil

import numpy as np
import pandas as pd
import pytest

from fig_plot import tables
from fig_plot.findings import __main__ as findings
from fig_plot.findings import questions
from fig_plot.findings.correlations import Draws, mean_partial_spearman, spearman, value_of
from fig_plot.findings.procedure import STEPS, like_for_like_rows
from tests.study.test_correlations import regressed_partial
from utils.algebra.scores import SCORES

DRAWS = Draws(40, 0, 200)
TASKS = [f"task{i:02d}" for i in range(10)]


# ------------------------------------------------------------------ question 1: the procedure
def swept_study(models: tuple[str, ...], gain_of: dict[str, np.ndarray]) -> tuple[pd.DataFrame, ...]:
    """Cells, layers and probes of models with noise as scores; at layer 0, fraction .5 they fall with the gain.

    `train_accuracy` of layer 1 rises with the tasks' place, `test_accuracy` falls with it.
    """
    random = np.random.default_rng(0)
    cells, layers, probes = [], [], []
    for model in models:
        for place, task in enumerate(TASKS):
            keys = {"model": model, "dataset": task, "seed": 0}
            gain = gain_of[model][place]
            cells.append({**keys, "lora_gain": gain, "lora_gain_paper": gain, "num_classes": 2 + place % 4})
            for layer in (0, 1):
                probes.append({**keys, "layer": layer, "train_accuracy": place if layer else random.random(),
                               "test_accuracy": -place if layer else random.random()})  # fmt: skip
                for fraction in (0.25, 0.5, 0.75):
                    is_planted = (layer, fraction) == (0, 0.5)
                    score = -place if is_planted and np.isnan(gain) else -gain if is_planted else random.random()
                    score = place + random.random() if layer else score  # of the last layer: rises with the place
                    for order in ("largest", "smallest"):
                        scores = dict.fromkeys(SCORES, score)
                        layers.append({**keys, "split": "train", "eigenvectors": order, "center": False, "layer": layer,
                                       "fraction": fraction, **scores})  # fmt: skip
    return tuple(map(pd.DataFrame, (cells, layers, probes)))


def test_the_procedure_chooses_in_the_claimed_direction_and_its_joint_p_counts_in_it_too():
    """A negative claim with a negative relation in both models: small p, of each and of both."""
    random = np.random.default_rng(1)
    gains = {model: random.permutation(10) / 10 for model in ("one", "two")}
    cells, layers, probes = swept_study(("one", "two"), gains)
    rows = pd.DataFrame(like_for_like_rows(cells, layers, probes, DRAWS)).set_index(["measure", "step", "model"])
    for model in ("one", "two", "mean"):
        row = rows.loc[("lora_gain", STEPS[0], model)]
        assert row.spearman == pytest.approx(-1) and row.p < 0.02
    assert rows.loc[("lora_gain", STEPS[0], "one"), ["layer", "fraction"]].tolist() == [0, 0.5]
    assert rows.loc[("lora_gain", STEPS[0], "mean"), "noise"] < 0
    assert rows.layer[("lora_gain", STEPS[1], "one")] == 1


def test_the_last_two_steps_take_the_last_layer_on_train_and_on_test_rows():
    cells, layers, probes = swept_study(("one",), {"one": np.linspace(0, 1, 10)})
    noisy = layers.assign(ntps=layers.ntps + np.random.default_rng(3).normal(scale=4, size=len(layers)))
    steps, noisy_steps = (
        pd.DataFrame(like_for_like_rows(cells, table, probes, DRAWS))
        .query("model == 'one' and measure == 'train_accuracy'").set_index("step") for table in (layers, noisy)
    )  # fmt: skip
    assert steps.spearman[list(STEPS[2:])].tolist() == pytest.approx([1, -1])
    mean = noisy.query("layer == 1 and eigenvectors == 'largest'").groupby("dataset").ntps.mean()
    place, classes = np.arange(10), cells["num_classes"].to_numpy()
    found = noisy_steps.given_classes[STEPS[2]]
    assert found == pytest.approx(regressed_partial(mean, place, classes))
    assert abs(found - regressed_partial(mean, classes, place)) > 0.05  # it tells outcome from given


def test_models_of_different_tasks_have_no_joint_p():
    """Their permutations are not the same; the mean of their correlations stands all the same."""
    random = np.random.default_rng(1)
    gains = {"one": random.permutation(10) / 10, "two": random.permutation(10) / 10}
    gains["two"][3] = np.nan
    cells, layers, probes = swept_study(("one", "two"), gains)
    rows = pd.DataFrame(like_for_like_rows(cells, layers, probes, DRAWS))
    mean = rows[(rows.model == "mean") & (rows.step == STEPS[0])].set_index("measure")
    assert np.isnan(mean.p["lora_gain"]) and np.isfinite(mean.spearman["lora_gain"])
    assert mean.p["train_accuracy"] <= 1  # of the same tasks
    cells, layers = (table[(table.model == "one") | (table.dataset != TASKS[3])] for table in (cells, layers))
    rows = pd.DataFrame(like_for_like_rows(cells, layers, probes, DRAWS))  # one model lacks the whole task
    assert rows[rows.step == STEPS[0]].set_index(["measure", "model"]).tasks["lora_gain"].to_dict() == {
        "one": 10, "two": 9, "mean": 10}  # fmt: skip


# ------------------------------------------------------------------ question 2: the fixed rule
def made_up_cells(**columns: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"model": "one", "dataset": TASKS, **columns})


def test_partial_holds_the_named_column_fixed_and_no_other():
    random = np.random.default_rng(5)
    headroom, score = random.random((2, 10))
    gain = headroom + score + random.random(10)
    cells = made_up_cells(lora_gain=gain, ntps=score, headroom=headroom)
    [row] = questions.partial_rows(cells, DRAWS, ("ntps",))
    assert row["given"] == "headroom" and row["value"] == pytest.approx(regressed_partial(score, gain, headroom))
    for wrong in (regressed_partial(score, headroom, gain), regressed_partial(headroom, gain, score)):
        assert abs(row["value"] - wrong) > 0.05


def test_a_score_is_set_beside_the_best_baseline_on_the_cells_of_both():
    """Bag of words orders the tasks, the number of classes does not; one task misses the score, another its classes."""
    place = np.arange(10.0)
    score = np.array([0, 1, 2, 3, 4, 6, 5, 7, 8, np.nan])
    bag = np.array([0, 1, 2, 3, 4, 5, 6, 8, 7, -50])  # without the last task nearly perfect
    classes = np.array([3, 2, 5, 4, np.nan, 2, 3, 5, 4, 2])
    cells = made_up_cells(probe_accuracy=place, ntps=score, bag_of_words_accuracy=bag, num_classes=classes)
    [row] = questions.lead_rows(cells, DRAWS)
    known = np.isfinite(score)
    sizes = [spearman(side[known], place[known]) for side in (score, bag)]
    assert row["best_baseline"] == "bag_of_words_accuracy" and row["tasks"] == 9
    assert [row["baseline_size"], row["lead"]] == pytest.approx([sizes[1], sizes[0] - sizes[1]])


# ------------------------------------------------------------------ questions 3 to 5: a twin, LoRA, a task left out
def test_a_twin_and_a_change_by_lora_are_set_beside_the_seeds_that_they_have():
    """Seed 1 has neither a twin nor scores after LoRA; its scores and gains have the opposite order."""
    place = np.arange(10.0)
    first, second = (made_up_cells(seed=i, ntps=sign * place, lora_gain=sign * place) for i, sign in ((0, 1), (1, -9)))
    twin = first.assign(model="one-random", ntps=place - 1)
    after = made_up_cells(seed=0, ntps=1 + place, ntps_before=1 + place / 2)
    row, *_ = questions.random_weights_rows(pd.concat([first, second, twin]), after, DRAWS)
    assert row["name"] == "ntps" and [row["lead"], row["spearman"]] == pytest.approx([1, 1]) and row["tasks"] == 10
    [row] = questions.after_lora_rows(after, pd.concat([first, second]), DRAWS)
    assert [row["change"], row["spearman_with_gain"]] == pytest.approx([2.25, 1])


def test_a_gain_is_predicted_without_the_task_itself():
    """Equals a fit written out for every task, with an intercept per model."""
    random = np.random.default_rng(6)
    rows = pd.DataFrame([{"model": model, "dataset": task, "x": random.random(), "gain": random.random()}
                         for model in ("one", "two") for task in TASKS])  # fmt: skip
    design, gain = np.column_stack([rows.model == "one", rows.model == "two", rows.x]).astype(float), rows.gain
    expected = []
    for i, task in enumerate(rows.dataset):
        weights = np.linalg.lstsq(design[rows.dataset != task], gain[rows.dataset != task])[0]
        expected.append(design[i] @ weights - gain[i])
    np.testing.assert_allclose(questions.without_each_task(rows, ["x"], "gain"), expected, atol=1e-12)


def test_headroom_predicts_the_gain_it_makes_and_a_partial_of_nothing_left_is_undefined():
    """Gain = .3 headroom + a little of the score. A partial correlation is nan for lack of spread, or of tasks."""
    random = np.random.default_rng(7)
    headroom, score = random.random((2, 10))
    gain = 0.3 * headroom + 0.02 * score
    cells = made_up_cells(lora_gain=gain, headroom=headroom, ntps=score)
    errors = pd.DataFrame(questions.calibration_rows(cells, DRAWS)).set_index("predictors")
    assert 0 < errors.error_points["headroom"] < 1 < 5 < errors.error_points["nothing"]
    assert errors.low["headroom"] > 0 and errors.lead["ntps"] < errors.lead["headroom"]
    # x follows the covariate exactly and y does not: nothing of x is left, although both other correlations exist
    given, y = np.arange(6.0), np.array([3.0, 1, 2, 6, 5, 4])
    assert np.isnan(value_of(mean_partial_spearman, given**3, y, given))
    assert np.isfinite(value_of(mean_partial_spearman, y, given[[1, 0, 2, 3, 5, 4]], given))
    assert value_of(mean_partial_spearman, y, given, np.ones(6)) == pytest.approx(spearman(y, given))
    # four tasks at least: three with a defined plain correlation are too few
    assert np.isnan(value_of(mean_partial_spearman, [1, 2, 3], [1, 3, 2], [2, 1, 3]))
    assert np.isfinite(value_of(mean_partial_spearman, [1, 2, 3, 4], [1, 3, 2, 4], [2, 1, 3, 4]))


# ------------------------------------------------------------------ the columns of tables.py
def write_tables(folder) -> None:
    """One model, one task and one seed, each column with a value of its own."""
    keys = {"model": "one", "dataset": "task", "seed": 0}
    base = {**keys, "split": "train", "center": False, "num_classes": 3, "layer": 2, "rank_v": 8}
    values = {"ntps": 0.6, "ntps_label": 0.61, "ntps_whitened": 0.62, "retained": 0.63, "ntps_label_z": 1.0,
              "ntps_whitened_z": 2.0, "retained_z": 3.0}  # fmt: skip
    rows = []
    for order, subspace, shift in (("largest", "autoregression", 0.0), ("smallest", "autoregression", 0.1),
                                   ("largest", "pca", 0.2), ("largest", "random", 0.3)):  # fmt: skip
        row = base | {"eigenvectors": order, "subspace": subspace}
        row |= {name: value + shift for name, value in values.items()}
        rows += [row | {"coordinates": "as_is"}, row | {"coordinates": "standardized", "ntps": 55.0}]
        rows += [rows[-2] | {"center": True, "ntps": 99.0}, rows[-2] | {"split": "test", "ntps": -99.0}]
    rows[0] |= {"retained_random_mean": 0.5, "ntps_random_mean": 0.4}
    layer = {"train_accuracy": 0.9, "test_mse_over_variance": 0.7}
    save = {
        "scores": rows,
        "probes": [{**keys, "layer": i, "test_accuracy": a, **layer} for i, a in enumerate((0.5, 0.8, 0.7))],
        "features": [{**keys, "layer": i, "ridge_r2": r, "logme": logme, "h_oas": 1.0, "probe_r2_held_out": r / 2}
                     for i, (r, logme) in enumerate(((0.5, 0.2), (0.3, 0.9), (0.2, 0.4)))],
        "training": [{**keys, "method": method, "test_accuracy": accuracy} for method, accuracy in
                     (("linear_training", 0.65), ("linear_training_converged", 0.72), ("lora", 0.9),
                      ("full_finetuning", 0.95), ("from_scratch", 0.55))]
                    + [{**keys, "seed": 1, "method": "lora", "test_accuracy": 0.0}],
        "datasets": [{"dataset": "task", "seed": 0, "majority_accuracy": 0.25, "bag_of_words_accuracy": 0.6}],
        "models": [{"model": "one", "num_parameters": 1000}],
    }  # fmt: skip
    for name, table in save.items():
        pd.DataFrame(table).to_csv(folder / f"{name}.csv", index=False)


def test_every_column_of_a_cell_is_of_its_own_row(tmp_path):
    """Centred, standardized and test results take no part; last layer, highest LogME, mean of many random V.

    A LoRA run without a probe of its seed gives no gain, rather than one over another seed's probe.
    """
    write_tables(tmp_path)
    [cell] = tables.load_cells(tmp_path).to_dict("records")
    expected = {
        "ntps": 0.6, "ntps_smallest": 0.7, "ntps_pca": 0.8, "ntps_random": 0.4, "retained": 0.63,
        "retained_random": 0.5, "ntps_label_random": 0.91, "retained_lead": 0.13, "retained_z_pca": 3.2,
        "probe_accuracy": 0.7, "probe_mse": 0.7, "probe_skill": 0.45, "headroom": 0.3, "ridge_r2": 0.2, "logme": 0.4,
        "best_layer": 1, "best_layer_lead": 0.05, "best_layer_accuracy": 0.8, "lora_accuracy": 0.45, "lora_gain": 0.2,
        "lora_gain_paper": 0.25, "full_gain": 0.25, "converged_probe_accuracy": 0.72, "scratch_accuracy": 0.55,
        "num_classes": 3, "num_parameters": 1000,
    }  # fmt: skip
    assert {name: cell[name] for name in expected} == pytest.approx(expected)
    regression = pd.read_csv(tmp_path / "scores.csv").assign(num_classes=0)
    regression.to_csv(tmp_path / "scores.csv", index=False)
    assert tables.load_cells(tmp_path)["num_classes"].isna().all()


# ------------------------------------------------------------------ the committed tables
@pytest.mark.slow
def test_committed_findings_are_those_of_the_committed_tables(tmp_path):
    """`python -m fig_plot.findings` on a copy: no cell of any table moves, and the same files are written."""
    made = tmp_path / "data"
    shutil.copytree(tables.DATA_DIR, made, ignore=shutil.ignore_patterns("findings_*"))
    findings.main(findings.Config(tables_dir=made))
    names = sorted(path.relative_to(tables.DATA_DIR) for path in tables.DATA_DIR.rglob("findings_*"))
    assert sorted(path.relative_to(made) for path in made.rglob("findings_*")) == names and len(names) >= 34
    for name in names:
        found, committed = (pd.read_csv(folder / name) for folder in (made, tables.DATA_DIR))
        pd.testing.assert_frame_equal(found, committed, rtol=2e-6, atol=1e-12)
