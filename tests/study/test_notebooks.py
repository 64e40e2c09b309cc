"""The notebooks draw every study from its CSV files alone, also a new one, and are committed without outputs."""

import json
import os
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from fig_plot import import_published
from fig_plot.findings import __main__ as findings
from fig_plot.findings import page
from fig_plot.findings.correlations import Draws
from fig_plot.tables import figure_name, find_studies, read_table, save_csv
from tests.conftest import PUBLISHED, ROOT

pytestmark = pytest.mark.slow

NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "fig_plot").glob("*.ipynb"))}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The tables of a copy of the repository, with a second real LLM: those of SmolLM2 under another name."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("fig_plot", "utils"):
        ignored = shutil.ignore_patterns("__pycache__", "figures", "published")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    data = folder / "fig_plot" / "data"
    shutil.copytree(data / "smollm2", data / "second")
    (data / "second" / "study.json").write_text(json.dumps({"title": "Second LLM"}))
    for path in (data / "second").glob("*.csv*"):
        if not path.name.startswith("repro"):
            table = read_table(path.name.split(".")[0], data / "second")
            if "model" in table:
                table["model"] = table["model"].str.replace("smollm2", "second")
            if path.name in ("probes.csv", "training.csv"):  # and a little better than SmolLM2
                table["test_accuracy"] += 0.01
            save_csv(path, table)
    findings.write_tables(data, findings.comparison_tables((data / "smollm2", data / "second"), (), Draws(50, 0, 50)))
    return data


@pytest.fixture(scope="module")
def executed(data, tmp_path_factory):
    """All notebooks as one, executed by one kernel with the docstring study and the new one; the folder of figures."""
    folder = tmp_path_factory.mktemp("drawn")
    shutil.copytree(data, folder / "tables", ignore=shutil.ignore_patterns("smollm2*"))
    if "NTPS_PUBLISHED" in os.environ:
        import_published.main(import_published.Config(path=PUBLISHED, output_dir=data.parent / "published"))
    cells = [cell for notebook in NOTEBOOKS.values() for cell in notebook.cells if cell.cell_type == "code"]
    every = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.source) for cell in cells])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TABLES", str(folder / "tables"))
        patch.setenv("FIGURES", str(folder / "figures"))
        NotebookClient(every, timeout=120, resources={"metadata": {"path": str(data.parent)}}).execute()
    return every, folder / "figures"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_draws_the_committed_figures_and_those_of_a_new_study(executed, name):
    committed = {path.name for path in (ROOT / "fig_plot" / "figures").glob(f"{name}*")}
    expected = {path for path in committed if "_smollm2" not in path}
    expected |= {path.replace("_smollm2.", "_second.") for path in committed if "_smollm2." in path}
    assert {path.name for path in executed[1].glob(f"{name}*")} == expected
    assert {path.rsplit(".")[-1] for path in expected} == {"png", "pdf"}


def test_every_cell_that_draws_shows_its_pictures_also_of_the_published_values(executed, data):
    shown = [any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in executed[0].cells]
    published = {path.stem for path in (data.parent / "published").glob("*.png")}
    assert sum(shown) == (10 if published else 7)
    assert published == ({"Fig1", "Fig2_train_accuracy", "Fig2_train_mse", "Fig3"} if PUBLISHED.name else set())


def test_the_page_has_the_rows_of_a_new_study_beside_the_others(data, monkeypatch):
    monkeypatch.setattr(page, "DATA_DIR", data)
    assert find_studies(data)[data / "second"] == "Second LLM"
    assert figure_name("Fig3", data / "second", data) == "Fig3_second" and figure_name("Fig3", data, data) == "Fig3"
    tables = {}
    for name in page.TABLES:
        of_all = name in ("which_model", "coordinates", "first_choice")
        studies = "docstrings" if of_all else "smollm2 second missing"
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
    assert {row.split(" | ")[0] for row in tables["coordinates"][2:]} == {"| `smollm2`", "| `second`"}


def test_notebooks_are_committed_without_outputs():
    for notebook in NOTEBOOKS.values():
        assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
        assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
