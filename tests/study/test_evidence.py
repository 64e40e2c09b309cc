"""What prescreen.py rests on: calibration lines and the table of evidence, on studies whose answer is known."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

from fig_plot import calibration, evidence
from tests.conftest import ROOT
from utils.algebra import features as closed_form
from utils.script import UserError

pytestmark = pytest.mark.slow


def made_up_cells(noise: float) -> pd.DataFrame:
    """Six models on ten tasks; the gain is 5 - 8 x plus noise."""
    random = np.random.default_rng(0)
    rows = [
        {"model": f"model{model}", "dataset": f"task{task}", "x": random.random(), "constant": 1.0}
        for model in range(6)
        for task in range(10)
    ]
    cells = pd.DataFrame(rows)
    return cells.assign(gain=5 - 8 * cells["x"] + noise * random.standard_normal(len(cells)))


def test_line_is_scikit_learns_and_is_trusted_where_it_predicts():
    cells = made_up_cells(0.5)
    line = calibration.fit("made-up", "x", cells, calibration.Config(num_draws=200))
    assert line is not None and line.is_better
    direct = LinearRegression().fit(cells[["x"]], cells["gain"])
    assert (line.intercept, line.slope) == pytest.approx((direct.intercept_, direct.coef_[0]))
    for error, group in ((line.error, "dataset"), (line.error_new_model, "model")):
        out = LeaveOneGroupOut()
        predicted = cross_val_predict(LinearRegression(), cells[["x"]], cells["gain"], groups=cells[group], cv=out)
        assert error == pytest.approx(np.abs(cells["gain"] - predicted).mean())
    assert (line.cells, line.tasks, line.models) == (60, 10, 6)


def test_line_through_noise_or_one_model_is_not_trusted():
    config = calibration.Config(num_draws=200)
    noise = calibration.fit("made-up", "x", made_up_cells(200.0), config)
    assert noise is not None and not noise.is_better
    cells = made_up_cells(0.5)
    alone = calibration.fit("made-up", "x", cells[cells["model"] == "model0"], config)
    assert alone is not None and alone.lead_low > 0 and not alone.is_better
    assert calibration.fit("made-up", "constant", cells, config) is None


def test_evidence_of_a_score_that_orders_and_of_one_that_does_not():
    random = np.random.default_rng(1)
    cells = made_up_cells(0.0).rename(columns={"x": "retained"})
    cells = cells.assign(probe_skill=cells["retained"], lora_gain=cells["gain"] / 100, ntps=random.random(len(cells)))
    names = ["retained", "ntps", "mean_of_others"]
    table = pd.DataFrame(evidence.evidence_rows(cells, names, evidence.Config(num_draws=40)))
    found = table.set_index(["direction", "measure", "score", "statistic"])["value"]
    assert found["across tasks", "probe_skill", "retained", "spearman"] == pytest.approx(1)
    assert found["across models", "lora_gain", "retained", "spearman"] == pytest.approx(-1)
    assert found["gain > 2", "lora_gain", "retained", "auc"] == pytest.approx(0)
    assert abs(found["across tasks", "probe_skill", "ntps", "spearman"]) < 0.4
    others = cells.assign(of_task=cells.groupby("dataset")["lora_gain"].transform("sum"))
    others = others.assign(mean=(others["of_task"] - others["lora_gain"]) / 5, gains=others["lora_gain"] > 0.02)
    expected = roc_auc_score(others["gains"], others["mean"])
    assert found["gain > 2", "lora_gain", "mean_of_others", "auc"] == pytest.approx(expected)
    assert set(table.loc[table["statistic"] == "auc", "cells_above"]) == {others["gains"].sum()}
    assert (table["without_a_model_low"] <= table["without_a_model_high"]).all()
    known = table[table["statistic"] != "weighted_tau"]  # which has no interval
    assert (known["low"] <= known["value"] + 1e-9).all() and table["low"].notna().sum() == len(known)
    assert (table["without_a_task_low"] <= table["value"] + 1e-9).all()


def test_scores_of_the_last_layer_are_read_and_meaningless_ones_left_out(tmp_path):
    entry = {"value": 0.5, "null_mean": 0.1, "null_std": 0.1, "z": 4.0, "meaningless": False}
    held_out = [{"probe_r2_held_out": entry | {"value": value}} for value in (0.2, 0.3, 0.25)]
    layers: list[dict] = [{"layer": i, "closed_form": found} for i, found in enumerate(held_out)]
    layers[2]["closed_form"] |= {"cka": entry, "h_score": entry | {"meaningless": True}}
    config = {"seed": 3, "split": "train", "eigenvectors": "largest", "subspace": "autoregression", "center": False}
    folder = tmp_path / "ntps" / "Qwen__Qwen2-0.5B"
    files = {"docstrings__kind.json": {}, "docstrings__kind.test.json": {"split": "test"}}
    files["docstrings__kind.pca.json"] = {"subspace": "pca"}
    for name, changes in files.items():
        found = [{"layer": 2}] if "subspace" in changes else layers
        for place in (folder, folder.with_name("Qwen__Qwen2-0.5B+lora")):
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(json.dumps({"config": config | changes, "layers": found}))
    [row] = evidence.closed_form_rows(tmp_path)
    assert row == {
        **{"model": "Qwen/Qwen2-0.5B", "dataset": "docstrings/kind", "seed": 3, "layer": 2, "cka": 0.5},
        **{"probe_r2_held_out": 0.25, "layer_lead": pytest.approx(0.05)},
    }


def test_no_scores_anywhere_is_said(tmp_path):
    with pytest.raises(UserError, match=r"No result of K_sweep\.py with closed-form scores"):
        evidence.main(evidence.Config(results_dir=tmp_path, data_dir=tmp_path))


def test_committed_tables_hold_every_score():
    table = pd.read_csv(evidence.DATA_DIR / "prescreen_evidence.csv")
    held_out = {"probe_r2_held_out"}  # the committed scores were read from train alone
    assert set(table["score"]) >= {*closed_form.SEEING, *evidence.BASELINES} - held_out
    assert set(table["measure"]) == set(evidence.MEASURES)


def test_committed_evidence_is_that_of_the_committed_tables():
    cells = evidence.closed_form_cells(evidence.DATA_DIR)
    table = pd.read_csv(evidence.DATA_DIR / "prescreen_evidence.csv")
    known = cells.dropna(subset=["ridge_r2"])
    assert set(known["model"]) == {"tiny", "micro"}
    of = table.set_index(["cells", "direction", "measure", "score", "statistic"])["value"]
    for score in ("ridge_r2", "cka", "retained"):
        for measure in evidence.MEASURES:
            each = [model[score].rank().corr(model[measure].rank()) for _, model in known.groupby("model")]
            found = of["closed form", "across tasks", measure, score, "spearman"]
            assert found == pytest.approx(np.mean(each), abs=1e-5), (score, measure)


def test_numbers_of_the_scores_page_are_those_of_the_evidence():
    """docs/scores.md, "Which score to trust": every interval that it quotes."""
    words = " ".join((ROOT / "docs" / "scores.md").read_text().split())
    table = pd.read_csv(evidence.DATA_DIR / "prescreen_evidence.csv")
    table = table.set_index(["cells", "direction", "measure", "score", "statistic"])[["value", "low", "high"]]
    number = r"([+-]?\d\.\d\d)"
    interval = rf"{number} \[{number}, {number}\]"
    of_probe, of_gain = (("closed form", "across tasks", measure) for measure in evidence.MEASURES)
    of_decision = ("closed form", "gain > 2", "lora_gain")
    quoted = {
        rf"above majority is {interval}": [(*of_probe, "ridge_r2", "spearman")],
        rf"OAS H-score {interval}, CKA {interval}, LogME {interval}, `retained` {interval}, `ntps` {interval}": [
            (*of_probe, score, "spearman") for score in ("h_oas", "cka", "logme", "retained", "ntps")
        ],
        rf"`layer_lead` says nothing: {interval}": [(*of_probe, "layer_lead", "spearman")],
        rf"Together nothing is left: {interval}, {interval}, {interval}": [
            (*of_gain, score, "spearman") for score in ("ridge_r2", "logme", "cka")
        ],
        rf"`ntps_whitened` {interval}, `h_share` {interval}": [
            (*of_decision, score, "auc") for score in ("ntps_whitened", "h_share")
        ],
        rf"number of parameters has {interval}": [(*of_decision, "num_parameters", "auc")],
        rf"`retained` {interval}, its z {interval}": [
            ("all", *of_gain[1:], score, "spearman") for score in ("retained", "retained_z")
        ],
        rf"`retained` orders gains \({interval}": [("all", "across models", "lora_gain", "retained", "spearman")],
        rf"with an AUC of {interval}": [("all", *of_decision[1:], "retained", "auc")],
    }
    for sentence, rows in quoted.items():
        shown = re.search(sentence, words)
        assert shown, sentence
        expected = [value for row in rows for value in table.loc[row]]
        assert [float(text) for text in shown.groups()] == pytest.approx(expected, abs=0.00501), sentence
