"""The table that puts prescreen.py to the test: planted choices, and the committed file and page made again."""

import pandas as pd
import pytest

from fig_plot.findings import first_choice
from tests.conftest import configure


def test_the_largest_r2_is_chosen_and_its_points_are_lost_against_the_best_probe():
    """Last layers decide the model, earlier ones the layer; the best probe may be of a layer without R2."""
    columns = ["model", "dataset", "seed", "layer", "test_accuracy", "ridge_r2"]
    rows = [
        *[("a", "x", seed, 0, 0.80, r2) for seed, r2 in ((0, 0.9), (1, 0.1))],  # seeds are averaged first
        *[("a", "x", seed, 1, accuracy, 0.6) for seed, accuracy in ((0, 0.70), (1, 0.74))],
        ("a", "x", 0, 2, 0.60, 0.7),
        ("b", "x", 0, 3, 0.50, 0.65),
        ("b", "x", 0, 2, 0.92, None),
        ("b", "x", 0, 1, 0.70, 0.95),
        ("smollm2-random", "x", 0, 1, 0.99, 0.99),
    ]
    table = pd.DataFrame(rows, columns=columns)
    [row] = first_choice.first_choices(table, table, pd.Series({"x": 0.7})).itertuples()
    assert (row.model, row.layer, row.best_model, row.best_layer) == ("a", 1, "b", 2)
    assert row.test_accuracy == pytest.approx(0.72) and row.points_lost == pytest.approx(20)
    assert row.over_words == pytest.approx(2)


def test_the_committed_file_and_the_page_follow_from_the_committed_tables(tmp_path, monkeypatch):
    page = tmp_path / "scores.md"
    page.write_text(first_choice.PAGE.read_text(), encoding="utf-8")
    monkeypatch.setattr(first_choice, "PAGE", page)
    monkeypatch.setattr(first_choice, "DATA_DIR", tmp_path)
    stored = first_choice.PAGE.read_text()
    first_choice.main(configure(first_choice))
    committed = first_choice.ROOT / "fig_plot" / "data" / "findings_first_choice.csv"
    assert (tmp_path / committed.name).read_bytes() == committed.read_bytes()
    assert page.read_text() == stored and "| `sst2` | `smollm2`, " in stored
    table = pd.read_csv(committed)
    is_docstring = table["dataset"].str.startswith("docstrings/")
    lost, above = table.groupby(is_docstring)["points_lost"], (table["over_words"] > 0).groupby(is_docstring)
    assert lost.mean().round(2).tolist() == [0.95, 2.59] and lost.max()[False] == pytest.approx(2.5)
    assert above.sum().tolist() == [10, 1] and lost.size().tolist() == [14, 12]
