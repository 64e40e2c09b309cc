"""The notebooks draw every study from its CSV files alone, also a new one, and are committed without outputs."""

import json
import shutil

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from fig_plot import import_published
from fig_plot.findings import __main__ as findings
from fig_plot.findings import page
from fig_plot.tables import figure_name, find_studies, read_table, save_csv
from tests.conftest import PUBLISHED, ROOT, needs_published

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted(path.stem for path in (ROOT / "fig_plot").glob("*.ipynb"))


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the files that a notebook needs, with the study of a second real LLM: SmolLM2's under another name."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("fig_plot", "utils"):
        ignored = shutil.ignore_patterns("__pycache__", "figures", "published")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    data = folder / "fig_plot" / "data"
    shutil.copytree(data / "smollm2", data / "second", ignore=shutil.ignore_patterns("findings_*"))
    (data / "second" / "study.json").write_text(json.dumps({"title": "Second LLM"}))
    for path in (data / "second").glob("*.csv*"):
        if not path.name.startswith("repro"):
            table = read_table(path.name.split(".")[0], data / "second")
            if "model" in table:
                table["model"] = table["model"].str.replace("smollm2", "second")
            if path.name in ("probes.csv", "training.csv"):  # and a little better than SmolLM2
                table["test_accuracy"] += 0.01
            save_csv(path, table)
    findings.main(findings.Config(tables_dir=data, num_draws=50, num_permutations=50))
    return folder / "fig_plot"


def execute(folder, name: str) -> nbformat.NotebookNode:
    """The notebook with its outputs; an error in a cell is raised."""
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    return NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_draws_the_committed_figures_and_those_of_a_new_study(copied, name):
    notebook = execute(copied, name)
    drawn = {path.name for path in (copied / "figures").glob(f"{name}*")}
    committed = {path.name for path in (ROOT / "fig_plot" / "figures").glob(f"{name}*")}
    of_new = {path.replace("_smollm2.", "_second.") for path in committed if "_smollm2." in path}
    assert drawn == committed | of_new and {path.rsplit(".")[-1] for path in drawn} == {"png", "pdf"}
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not (copied / "published").exists()


def test_the_page_has_the_rows_of_a_new_study_beside_the_others(copied, monkeypatch):
    data = copied / "data"
    monkeypatch.setattr(page, "DATA_DIR", data)
    assert find_studies(data)[data / "second"] == "Second LLM"
    assert figure_name("Fig3", data / "second", data) == "Fig3_second" and figure_name("Fig3", data, data) == "Fig3"
    tables = {}
    for name in page.TABLES:
        studies = "docstrings" if name in ("which_model", "coordinates") else "smollm2 second missing"
        text = page.fill_page(f"<!-- table: {name} of {studies} -->\n<!-- end -->", page.PAGES[0])
        tables[name] = text.splitlines()[1:-1]
    for name in ("tasks", "correlations", "layer_choice", "claims"):
        assert tables[name][0].startswith("| study |"), name
        first, second = (
            [row for row in tables[name] if f"| {title} |" in row] for title in ("SmolLM2-135M", "Second LLM")
        )
        assert len(first) == len(second) > 2, name
    for name in ("controls", "after_lora"):
        assert {row.split(" | ")[0] for row in tables[name][2:]} == {
            f"| `{model}`" for model in ("smollm2", "smollm2-random", "second", "second-random")
        }
    for outcome in ("best layer", "LoRA"):
        assert any(row.startswith(f"| second, smollm2 | {outcome} | `ntps`") for row in tables["which_model"])
    assert tables["coordinates"] == ["No study has these rows yet."]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_without_outputs(name):
    notebook = nbformat.read(ROOT / "fig_plot" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@needs_published
def test_notebooks_draw_the_published_values_where_they_are(copied, monkeypatch, tmp_path):
    monkeypatch.setenv("TABLES", str(copied / "data" / "second"))
    monkeypatch.setenv("FIGURES", str(tmp_path))
    import_published.main(import_published.Config(path=PUBLISHED, output_dir=copied / "published"))
    for name in ("Fig1", "Fig2", "Fig3"):
        execute(copied, name)
    drawn = {path.stem for path in (copied / "published").glob("*.png")}
    assert drawn == {"Fig1", "Fig2_train_accuracy", "Fig2_train_mse", "Fig3"}
    shutil.rmtree(copied / "published")


def test_committed_tables_hold_the_whole_study():
    """The tables hold at least twelve tasks, several seeds, every way of training and every control."""
    training, scores = (pd.read_csv(ROOT / "fig_plot" / "data" / f"{name}.csv") for name in ("training", "scores"))
    assert training.groupby("method").dataset.nunique().min() >= 12 and training.seed.nunique() >= 2
    assert set(training.method) == {"linear_training", "lora", "full_finetuning", "from_scratch"}
    assert set(scores.subspace) == {"autoregression", "pca", "random"} and scores.model.str.endswith("+lora").any()
