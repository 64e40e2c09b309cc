"""Figures from one's own results: two models x three tasks by the scripts, collected and drawn into another folder."""

import subprocess

import nbformat
import pytest

import cache
import K_sweep
import linear_sklearn
from fig_plot import collect
from fig_plot.findings import __main__ as findings
from fig_plot.plotting import plot_rank_grid
from fig_plot.tables import find_studies, load_cells, trained_models
from tests.conftest import ROOT, configure, make_texts, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def own_tables(model_dirs, tmp_path_factory):
    """The tables of two random models on three made-up tasks."""
    folder = tmp_path_factory.mktemp("own")
    results_dir = folder / "results"
    for number in range(3):
        rows = [{"text": text, "label": (i // (number + 1)) % 2} for i, text in enumerate(make_texts(60, number))]
        path = write_rows(folder / f"task{number}.jsonl", rows)
        for model in ("qwen2", "llama"):
            shared = {"model_name": str(model_dirs[model]), "dataset_name": str(path), "results_dir": results_dir}
            for split in ("train", "test"):
                cache.main(configure(cache, **shared, split=split, save_pooled="all", device="cpu"))
            K_sweep.main(configure(K_sweep, **shared, picture=False, num_null_draws=3))
            K_sweep.main(configure(K_sweep, **shared, picture=False, num_null_draws=3, subspace="random"))
            linear_sklearn.main(configure(linear_sklearn, **shared, device="cpu", num_workers=1, picture=False))
    collect.main(collect.Config(results_dir=results_dir))
    return results_dir / "tables"


def git_status() -> str:
    return subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True).stdout


def test_two_models_by_three_tasks_become_two_panels_and_the_repository_stays_as_it_is(
    own_tables, monkeypatch, tmp_path
):
    before, figures = git_status(), tmp_path / "figures"
    assert list(find_studies(own_tables)) == [own_tables]
    findings.main(findings.Config(tables_dir=own_tables, num_draws=20, num_permutations=20))
    monkeypatch.setenv("TABLES", str(own_tables))
    monkeypatch.setenv("FIGURES", str(figures))
    monkeypatch.chdir(ROOT)
    # the cells run in this process, as a kernel takes seconds to start; test_notebooks.py executes the notebooks
    for name in ("Fig1", "Fig2", "Fig3", "Fig4", "Findings"):
        notebook = nbformat.read(f"fig_plot/{name}.ipynb", as_version=4)
        exec("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"), {})
    drawn = {path.name for path in figures.iterdir()}
    assert {"Fig2_ntps_probe_accuracy.png", "Fig2_retained_probe_mse.pdf", "Findings_idea.png"} <= drawn
    assert not {name for name in drawn if name.startswith(("Fig1", "Fig3", "Fig4"))}  # nothing was trained or drawn
    cells = trained_models(load_cells(own_tables))
    panels = [panel for panel in plot_rank_grid(cells, "ntps", "probe_accuracy", names=True).axes if panel.axison]
    assert len(panels) == 2 and all(len(panel.collections) == 3 for panel in panels)
    assert git_status() == before


def test_names_in_figures_are_no_formulas_and_none_is_left_out(own_tables):
    """A dollar sign, and a leading underscore, which matplotlib leaves out of legends."""
    cells = trained_models(load_cells(own_tables))
    cells["dataset"] = cells["dataset"].map({"task0": "_hidden", "task1": "pay $5$_{x", "task2": "plain"})
    figure = plot_rank_grid(cells, "ntps", "probe_accuracy", names=True)
    figure.canvas.draw()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == sorted(set(cells["dataset"]))
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())
