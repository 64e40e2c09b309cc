"""benchmarks/reproducibility.py: its formulas against K_sweep.py's where these must agree, and its command line."""

import numpy as np
import pandas as pd
import pytest
import torch

import K_sweep
from benchmarks import reproducibility
from tests.conftest import configure, run_in_process
from tests.method.test_K_sweep import make_data, moments_of
from utils.algebra.linalg import whiten
from utils.algebra.scores import SCORES

# several K within the rank of the labels, where nothing is tied
FRACTIONS = tuple(i / 12 for i in range(1, 13))


def our_score(moments, **options) -> float:
    result = K_sweep.sweep_layer(moments, None, configure(K_sweep, **options), 0)
    return result.scores["ntps"].mean().item()


def moments_of_rank(num_labels: int, hidden_size: int = 12):
    """Moments at full rank, well conditioned, with as many informative directions as labels."""
    features, _, states = make_data(400, hidden_size, 3, decades=0.5)
    random = np.random.default_rng(1)
    targets = features @ random.normal(size=(hidden_size, num_labels)) + random.normal(size=(400, num_labels))
    return moments_of(features, targets, states)


def test_released_formula_equals_ours_where_nothing_is_tied():
    """As many labels as dimensions: every eigenvector of U carries one, so that there is no basis to choose."""
    moments = moments_of_rank(12)
    ours = our_score(moments, eigenvectors="smallest", fractions=FRACTIONS)
    assert reproducibility.released_score(moments, FRACTIONS, torch.float64) == pytest.approx(ours, abs=1e-8)
    # F F' squares the condition number: float32 loses the smallest eigenvectors even here
    assert 1e-8 < abs(reproducibility.released_score(moments, FRACTIONS, torch.float32) - ours) < 0.2
    assert ours != pytest.approx(our_score(moments, fractions=FRACTIONS), abs=1e-3)


def test_released_formula_equals_ours_at_the_whole_tied_space():
    """Three labels in 12 dimensions: at K = 9 all tied vectors are taken, whatever their basis; below, it matters."""
    moments = moments_of_rank(3)
    ours = our_score(moments, eigenvectors="smallest", fractions=(9 / 12,))
    assert reproducibility.released_score(moments, (9 / 12 + 1e-9,), torch.float64) == pytest.approx(ours, abs=1e-8)
    below = our_score(moments, eigenvectors="smallest", fractions=(0.25,))
    assert abs(reproducibility.released_score(moments, (0.25,), torch.float64) - below) > 1e-4


def test_released_cut_is_absolute():
    """In another unit the released formula keeps other directions, ours the same."""
    matrix = torch.diag(torch.logspace(0, -6, 7, dtype=torch.float64))
    factor = torch.ones(7, 1, dtype=torch.float64)
    for scale, kept in ((1, 7), (3e-4, 5)):
        assert reproducibility.released_eigenvectors(factor, scale * matrix).shape == (7, kept)
        assert whiten(scale * matrix).shape == (7, 7)


@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_drawn_bases_scatter_around_the_average(order):
    moments = moments_of_rank(3)
    config = configure(K_sweep, eigenvectors=order)
    draws = list(reproducibility.drawn_basis_scores(moments, config, 400, seed=0))
    spread = np.std(draws)
    assert spread > 1e-3
    # nearly: an average of ratios here, a ratio of averages there
    assert np.mean(draws) == pytest.approx(our_score(moments, eigenvectors=order), abs=spread)
    assert draws[:3] == list(reproducibility.drawn_basis_scores(moments, config, 3, seed=0))


@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_a_drawn_basis_is_exact_where_nothing_is_tied(order):
    moments = moments_of_rank(12)
    config = configure(K_sweep, eigenvectors=order, fractions=FRACTIONS)
    draws = list(reproducibility.drawn_basis_scores(moments, config, 2, seed=0))
    expected = our_score(moments, eigenvectors=order, fractions=FRACTIONS)
    np.testing.assert_allclose(draws, expected, atol=1e-9)


@pytest.mark.slow
def test_command_line_from_rows_to_table(model_dirs, rows_path, tmp_path, monkeypatch, capsys):
    output = tmp_path / "made" / "reproducibility.csv"
    options = ["--model_name", model_dirs["qwen2"], "--tasks", rows_path, "--num_draws", "2", "--output", output]
    assert run_in_process(monkeypatch, "benchmarks/reproducibility.py", *options) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(output) and "largest_difference" in printed
    table = pd.read_csv(output)
    assert list(table) == ["dataset", "score", "variant", "draw", "value"]
    assert table["value"].between(0, 1).all() and set(table["dataset"]) == {str(rows_path)}
    recomputed = {(score, variant) for score in (*SCORES, "ntps_smallest", "ntps_released")
                  for variant in reproducibility.RECOMPUTED}  # fmt: skip
    drawn = {(score, "drawn basis") for score in ("ntps", "ntps_smallest")}
    released = {("ntps_smallest", "released formula"), ("ntps_released", "float32 formula")}
    assert set(zip(table["score"], table["variant"], strict=True)) == recomputed | drawn | released
    assert len(table) == len(recomputed) + 2 * len(drawn) + len(released)
    assert table.loc[table["variant"] == "drawn basis", "draw"].tolist() == [0, 1, 0, 1]
    of = table.set_index(["score", "variant"])["value"]
    for score in SCORES:
        for variant, tolerance in (("float64 products", 1e-4), ("4096 tokens a batch", 1e-4), ("bfloat16 model", 0.1)):
            assert of[score, variant] == pytest.approx(of[score, "baseline"], abs=tolerance)
    names = sorted(path.name for path in output.parent.iterdir())
    assert names == ["reproducibility.csv", "reproducibility_summary.csv"]


def test_spread_is_the_studys_where_it_is_there(tmp_path):
    rows = [
        {
            "dataset": f"docstrings/{task}",
            "score": score,
            "variant": variant,
            "value": value + 0.01 * (variant != "baseline"),
        }
        for score in (*SCORES, "ntps_smallest", "ntps_released")
        for task, value in (("kind", 0.5), ("torch", 0.6))
        for variant in ("baseline", "bfloat16 model")
    ]
    study = [
        {"model": "tiny", "dataset": f"docstrings/{task}", "seed": 0, "split": "train", "eigenvectors": order,
         "subspace": subspace, "center": False, **dict.fromkeys(SCORES, value)}
        for order in ("largest", "smallest") for subspace in ("autoregression", "pca")
        for task, value in (("kind", 0.1 + (subspace == "pca")), ("torch", 0.3), ("scipy", 0.5))
    ]  # fmt: skip
    config = reproducibility.Config(scores=tmp_path / "scores.csv")
    compared = reproducibility.compare(pd.DataFrame(rows), config)
    assert len(compared) == 6 and set(compared["spread_of"]) == {"the 2 datasets"}
    sd = 0.1 / 2**0.5  # of two values .1 apart
    assert np.allclose(compared["sd_over_tasks"], sd) and np.allclose(compared["share"], 0.01 / sd)
    pd.DataFrame(study).to_csv(config.scores, index=False)
    compared = reproducibility.compare(pd.DataFrame(rows), config)
    assert compared["spread_of"].str.startswith("3 tasks of").all()
    assert np.allclose(compared["sd_over_tasks"], 0.2) and np.allclose(compared["share"], 0.05)


@pytest.mark.parametrize(
    ("task", "named"), [("docstrings/libary", "Did you mean library"), ("no_such_rows.jsonl", "no_such_rows.jsonl")]
)
def test_an_unknown_task_ends_in_one_sentence(tmp_path, monkeypatch, task, named):
    options = ["--tasks", task, "--output", tmp_path / "out.csv"]
    message = str(run_in_process(monkeypatch, "benchmarks/reproducibility.py", *options))
    assert message.startswith("error: ") and named in message and "\n" not in message
    assert not list(tmp_path.iterdir())
