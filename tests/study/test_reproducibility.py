"""benchmarks/reproducibility.py: its formulas against K_sweep.py's if both must agree, and its command line."""

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import reproducibility
from tests.conftest import ROOT, configure, run_in_process
from tests.method.toy import make_data, moments_of, solve
from utils.algebra.scores import SCORES


def test_released_formula_equals_ours_where_nothing_is_tied():
    """Every eigenvector of U carries a label, with as many labels as dimensions: the basis is unique."""
    fractions = tuple(i / 12 for i in range(1, 13))  # several K within the rank of the labels, without ties
    features, _, states = make_data(400, 12, 3, decades=0.5)
    random = np.random.default_rng(1)
    targets = features @ random.normal(size=(12, 12)) + random.normal(size=(400, 12))
    moments = moments_of(features, targets, states)
    ours = solve(moments, eigenvectors="smallest", fractions=fractions)["ntps"].mean().item()
    assert reproducibility.released_score(moments, fractions, torch.float64) == pytest.approx(ours, abs=1e-8)
    # F F' squares the condition number: float32 loses the smallest eigenvectors even here
    assert 1e-8 < abs(reproducibility.released_score(moments, fractions, torch.float32) - ours) < 0.2
    assert ours != pytest.approx(solve(moments, fractions=fractions)["ntps"].mean().item(), abs=1e-3)


@pytest.mark.slow
def test_every_score_is_measured_in_every_way(model_dirs, rows_path, tmp_path, monkeypatch, capsys):
    output = tmp_path / "made" / "reproducibility.csv"
    options = ["--model_name", model_dirs["qwen2"], "--tasks", rows_path, "--output", output]
    assert run_in_process(monkeypatch, "benchmarks/reproducibility.py", *options) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(output) and "largest_difference" in printed
    table = pd.read_csv(output)
    assert list(table) == ["dataset", "score", "variant", "value"]
    assert table["value"].between(0, 1).all() and set(table["dataset"]) == {str(rows_path)}
    recomputed = {(score, variant) for score in (*SCORES, "ntps_smallest", "ntps_released")
                  for variant in reproducibility.RECOMPUTED}  # fmt: skip
    released = {("ntps_smallest", "released formula"), ("ntps_released", "float32 formula")}
    assert set(zip(table["score"], table["variant"], strict=True)) == recomputed | released
    of = table.set_index(["score", "variant"])["value"]
    for score in SCORES:
        for variant, tolerance in (("float64 products", 1e-4), ("4096 tokens a batch", 1e-4), ("bfloat16 model", 0.1)):
            assert of[score, variant] == pytest.approx(of[score, "baseline"], abs=tolerance)
    assert output.with_name("reproducibility_summary.csv").is_file()


@pytest.mark.parametrize(("study", "model_name"), [("", "tiny"), *(2 * (name,) for name in ("smollm2", "gemma3-270m"))])
def test_the_committed_comparison_follows_from_the_committed_values(study, model_name):
    folder = ROOT / "fig_plot" / "data" / study
    config = configure(reproducibility, model_name=model_name, scores=folder / "scores.csv")
    compared = reproducibility.compare(pd.read_csv(folder / "reproducibility.csv"), config)
    pd.testing.assert_frame_equal(compared, pd.read_csv(folder / "reproducibility_summary.csv"), rtol=5e-3)
