"""The notebooks run from the committed CSV files alone, and are committed without outputs."""

import shutil

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from fig_plot import import_published
from tests.conftest import PUBLISHED, ROOT, needs_published

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted(path.stem for path in (ROOT / "fig_plot").glob("*.ipynb"))


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of what a notebook needs, so that the committed figures stay as they are."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("fig_plot", "utils"):
        ignored = shutil.ignore_patterns("__pycache__", "figures", "published")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder / "fig_plot"


def execute(folder, name: str) -> nbformat.NotebookNode:
    """The notebook with its outputs; an error in a cell is raised."""
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    return NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()


def test_there_is_a_notebook_for_every_figure():
    assert NOTEBOOKS == ["Fig1", "Fig2", "Fig3", "Fig4", "Findings"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_draws_its_figures_and_nothing_published(copied, name):
    notebook = execute(copied, name)
    drawn = sorted(path.name for path in (copied / "figures").glob(f"{name}*"))
    committed = sorted(path.name for path in (ROOT / "fig_plot" / "figures").glob(f"{name}*"))
    assert drawn == committed and {path.rsplit(".")[-1] for path in drawn} == {"png", "pdf"}
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not (copied / "published").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_without_outputs_and_says_what_it_claims(name):
    notebook = nbformat.read(ROOT / "fig_plot" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@needs_published
def test_notebooks_draw_the_published_values_where_they_are(copied):
    import_published.main(import_published.Config(path=PUBLISHED, output_dir=copied / "published"))
    for name in ("Fig1", "Fig2", "Fig3"):
        execute(copied, name)
    drawn = {path.stem for path in (copied / "published").glob("*.png")}
    assert drawn == {"Fig1", "Fig2_train_accuracy", "Fig2_train_mse", "Fig3"}
    shutil.rmtree(copied / "published")


def test_committed_tables_hold_the_whole_study():
    """At least twelve tasks, four models, several seeds, every way of training, and the tasks' rows named."""
    training = pd.read_csv(ROOT / "fig_plot" / "data" / "training.csv")
    assert training.groupby("method").dataset.nunique().min() >= 12
    assert set(training.method) == {"linear_training", "lora", "full_finetuning", "from_scratch"}
    assert training.seed.nunique() >= 2
    scores = pd.read_csv(ROOT / "fig_plot" / "data" / "scores.csv")
    assert set(scores.subspace) == {"autoregression", "pca", "random"} and scores.model.str.endswith("+lora").any()
