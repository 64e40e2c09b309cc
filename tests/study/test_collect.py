"""Figures from one's own results: two models x three tasks by the scripts, collected into equal tables, and drawn."""

import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import cache
import K_sweep
import linear_sklearn
import linear_training
import lora_finetuning
from fig_plot import collect
from fig_plot.plotting import plot_rank_grid
from fig_plot.tables import find_studies, load_cells, read_table, save_csv, trained_models
from tests.conftest import ROOT, configure, make_texts, run_in_process, write_rows
from utils.algebra.scores import SCORES
from utils.results import save_json
from utils.script import UserError
from utils.settings import result_settings

pytestmark = pytest.mark.slow

SCRIPT = "fig_plot/collect.py"


@pytest.fixture(scope="module")
def made_once(model_dirs, tmp_path_factory) -> Path:
    """Results of two models on three tasks in seed0, of which one cell is trained; the same in seed1, as of seed 1."""
    folder = tmp_path_factory.mktemp("made")
    results_dir = folder / "results"
    for number in range(3):
        rows = [{"text": text, "label": (i // (number + 1)) % 2} for i, text in enumerate(make_texts(60, number))]
        path = write_rows(folder / f"task{number}.jsonl", rows)
        for model in ("qwen2", "llama"):
            shared = {"model_name": str(model_dirs[model]), "dataset_name": str(path)}
            shared |= {"results_dir": results_dir / "seed0", "device": "cpu"}
            for split in ("train", "test"):
                cache.main(configure(cache, **shared, split=split, save_pooled="all"))
            for control in ({}, {"subspace": "random"}, {"eigenvectors": "smallest", "center": True})[: 3 - number]:
                K_sweep.main(configure(K_sweep, **shared, **control, picture=False, num_null_draws=3))
            linear_sklearn.main(configure(linear_sklearn, **shared, num_workers=1, picture=False))
            if (number, model) == (0, "qwen2"):
                for probe in ({}, {"standardize": True}):
                    linear_training.main(configure(linear_training, **shared, **probe, num_epochs=2))
                steps = {"num_steps": 2, "steps_per_evaluation": 1, "batch_size": 4, "dtype": "float32"}
                lora_finetuning.main(configure(lora_finetuning, **shared, **steps))
    shutil.rmtree(results_dir / "seed0" / "moments")
    for path in (results_dir / "seed0").rglob("*.json"):
        content = json.loads(path.read_text())
        if "config" in content:
            copy = results_dir / "seed1" / path.relative_to(results_dir / "seed0")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(json.dumps(content | {"config": content["config"] | {"seed": 1}}))
    return results_dir


@pytest.fixture
def results_dir(made_once, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made_once, tmp_path / "results"))


def collected(results_dir: Path, **options) -> Path:
    """The folder of the tables of these results."""
    output_dir = results_dir.parent / "data"
    collect.main(collect.Config(results_dir=results_dir, output_dir=output_dir, **options))
    return output_dir


def read_results(results_dir: Path, pattern: str) -> dict[Path, dict]:
    """The JSON results of a pattern, read without the code under test."""
    return {path: json.loads(path.read_text()) for path in sorted(results_dir.rglob(pattern))}


def placed(rows: list[dict]) -> list[dict]:
    """Each row with a file of its own."""
    return [{**row, "path": Path(f"file{i}.json")} for i, row in enumerate(rows)]


def six_digits(value: float) -> float:
    return float(f"{value:.6g}")


# ------------------------------------------------------------------ results that are collected
def test_scores_and_layers_equal_the_results(results_dir):
    """A random V has rows for the middle layer alone."""
    data, results = collected(results_dir), read_results(results_dir, "ntps/*/*.json")
    keys = ["model", "dataset", "seed", "subspace", "eigenvectors"]
    scores, layers = (pd.read_csv(data / name) for name in ("scores.csv", "layers.csv.gz"))
    assert len(scores) == len(results) == 24
    scores, layers = scores.set_index(keys).sort_index(), layers.set_index([*keys, "layer", "fraction"]).sort_index()
    num_layers = 0
    for path, result in results.items():
        config, last = result["config"], result["layers"][-1]
        key = (path.parent.name, path.name.split(".")[0], *(config[name] for name in keys[2:]))
        row = scores.loc[key]
        assert row["center"] == config["center"] == (".centered" in path.name)
        assert row["split"] == "train" and row["num_samples"] == result["num_samples"]
        for name in SCORES:
            for entry, expected in result["score"][name].items():
                assert row[name if entry == "value" else f"{name}_{entry}"] == six_digits(expected)
        for name in ("probe_r2", "probe_mse_held_out", "rank_u", "rank_label", "layer"):
            assert row[name] == six_digits(last[name])
        middle = result["layers"][len(result["layers"]) // 2]
        kept = result["layers"] if config["subspace"] == "autoregression" else [middle]
        num_layers += len(kept)
        for layer in kept:
            for index, fraction in enumerate(result["fractions"]):
                found = layers.loc[(*key, layer["layer"], six_digits(fraction))]
                assert all(found[name] == six_digits(layer[name][index]) for name in (*SCORES, "chance"))
    assert len(layers) == num_layers * len(result["fractions"])


def test_probes_training_and_datasets_equal_the_results(results_dir, model_dirs):
    data = collected(results_dir)
    probes = pd.read_csv(data / "probes.csv").set_index(["model", "dataset", "seed", "layer"])
    results = read_results(results_dir, "linear_sklearn/*/*.json")
    for path, result in results.items():
        for layer in result["layers"]:
            row = probes.loc[(path.parent.name, path.stem, result["config"]["seed"], layer["layer"])]
            for split in ("train", "test"):
                assert all(row[f"{split}_{name}"] == six_digits(value) for name, value in layer[split].items())
    training = pd.read_csv(data / "training.csv").set_index(["method", "seed"])
    trained = read_results(results_dir, "metrics.json")
    assert len(training) == len(trained) == 6 and set(training["dataset"]) == {"task0"}
    for path, metrics in trained.items():
        converged = "_converged" if path.parent.name == "task0.standardized" else ""
        row = training.loc[(path.parents[2].name + converged, metrics["config"]["seed"])]
        assert row["num_steps"] == metrics["num_steps"] and row["num_train"] == metrics["num_train"]
        for name in ("test_accuracy", "test_loss", "train_loss"):
            assert row[name] == six_digits(metrics["last"][name])
    datasets = pd.read_csv(data / "datasets.csv")
    assert datasets["seed"].tolist() == [0, 1] * 3  # once, not per model
    assert datasets["majority_accuracy"].iloc[-1] == six_digits(result["baselines"]["majority"]["accuracy"])
    assert set(pd.read_csv(data / "models.csv")["model"]) == {path.name for path in model_dirs.values()}


def test_a_second_run_is_the_same_to_the_byte_and_deletes_nothing(results_dir, capsys):
    data = collected(results_dir)
    assert capsys.readouterr().out.splitlines()[-1] == str(data)
    first = {path.name: path.read_bytes() for path in data.iterdir()}
    collected(results_dir)
    assert first == {path.name: path.read_bytes() for path in data.iterdir()}
    assert len(json.loads(first["sources.json"])["environments"]) == 1
    for folder in [*results_dir.rglob("lora"), *results_dir.rglob("linear_training")]:
        shutil.rmtree(folder)
    collected(results_dir)
    assert (data / "training.csv").read_bytes() == first["training.csv"]
    assert f"older: {data / 'training.csv'} is of an earlier run" in capsys.readouterr().err


def test_by_default_the_tables_are_beside_the_results_without_studies_and_benchmarks(monkeypatch, results_dir):
    """`results/study/` is collected only by its own name; the committed tables are not touched."""
    for name in ("study", "benchmarks"):
        shutil.copytree(results_dir / "seed1", results_dir / name / "seed1")
    shutil.move(results_dir / "seed1", results_dir.parent / "elsewhere")
    assert run_in_process(monkeypatch, SCRIPT, "--results_dir", results_dir) == 0
    assert set(pd.read_csv(results_dir / "tables" / "scores.csv")["seed"]) == {0}
    assert run_in_process(monkeypatch, SCRIPT, "--results_dir", results_dir / "study") == 0
    assert set(pd.read_csv(results_dir / "study" / "tables" / "scores.csv")["seed"]) == {1}


def test_a_study_in_two_pieces_has_the_tables_of_the_whole_and_a_damaged_table_stops_it(results_dir):
    whole = collected(results_dir)
    expected = {path.name: path.read_bytes() for path in whole.glob("*.csv*")}
    shutil.rmtree(whole)
    for piece in ("seed1", "seed0", "seed0"):  # once more changes nothing
        collect.main(collect.Config(results_dir / piece, whole, keep=True))
    assert {path.name: path.read_bytes() for path in whole.glob("*.csv*")} == expected
    assert json.loads((whole / "sources.json").read_text())["command"].endswith("--keep")
    (whole / "training.csv").write_bytes(b"model,dataset,seed,method\na,b,0,lora\na,b")
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    shutil.rmtree(results_dir / "seed1")  # rows that a table written anew would lose
    with pytest.raises(UserError, match=r"training\.csv is no complete table .*python -m fig_plot\.collect$"):
        collected(results_dir, keep=True)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


# ------------------------------------------------------------------ figures from one's own results
def test_two_models_by_three_tasks_become_two_panels_and_the_repository_stays_as_it_is(results_dir, monkeypatch):
    status = ("git", "status", "--short")
    before = subprocess.run(status, cwd=ROOT, capture_output=True).stdout
    shutil.rmtree(results_dir / "seed1")
    shutil.rmtree(results_dir / "seed0" / "lora")
    own_tables, figures = collected(results_dir), results_dir.parent / "figures"
    assert list(find_studies(own_tables)) == [own_tables]
    for name, lacking in (("features", ["ridge_r2", "probe_r2_held_out"]), ("training", ["test_accuracy"])):
        path = own_tables / f"{name}.csv"  # as of moments without folds and test rows, and of regressions
        save_csv(path, pd.read_csv(path).drop(columns=lacking))
    options = ("--tables_dir", own_tables, "--num_draws", "20", "--num_permutations", "20")
    assert run_in_process(monkeypatch, "fig_plot/findings/__main__.py", *options) == 0
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
    figure = plot_rank_grid(trained_models(load_cells(own_tables)), "ntps", "probe_accuracy")
    panels = [panel for panel in figure.axes if panel.axison]
    assert len(panels) == 2 and all(len(panel.collections) == 3 for panel in panels)
    assert subprocess.run(status, cwd=ROOT, capture_output=True).stdout == before


# ------------------------------------------------------------------ rows and names
def test_names_that_pandas_would_take_for_something_else_are_kept_once_and_whole_numbers_with_all_digits(tmp_path):
    """Whole numbers keep their digits even in a column with empty cells."""
    rows = [{"model": "a", "dataset": name, "layer": 0, "word": word, "size": 1378944 if word else None}
            for name in ("2024", "NA", "1e3") for word in ("null", "None", "nan", "")]  # fmt: skip
    table = collect.to_table("alignment", placed(rows))
    save_csv(tmp_path / "alignment.csv", table)
    written = (tmp_path / "alignment.csv").read_text()
    save_csv(tmp_path / "alignment.csv", collect.with_rows_of("alignment", tmp_path, table.astype({"size": object})))
    assert (tmp_path / "alignment.csv").read_text() == written and written.count("\n") == 13
    assert set(read_table("alignment", tmp_path)["dataset"]) == {"2024", "NA", "1e3"} and ",1378944\n" in written


def test_baselines_that_machines_round_differently_are_one_row_other_rows_are_not():
    row = {"dataset": "imdb", "seed": 0, "num_classes": 2, "num_train": 100, "bag_of_words_accuracy": 0.878}
    table = collect.to_table("datasets", placed([row, row | {"bag_of_words_accuracy": 0.877}]))
    assert table["bag_of_words_accuracy"].tolist() == [0.878]
    with pytest.raises(UserError, match=r"two different results of dataset imdb, seed 0: file0\.json and file1\.json"):
        collect.to_table("datasets", placed([row, row | {"num_train": 99}]))


def ntps_rows(path: str, found: dict | None = None, **options) -> dict[str, list[dict]]:
    """The rows, by table, of a result of K_sweep.py with two layers, of which the last has closed forms."""
    layer = {"rank_u": 1, "rank_v": 1, "rank_label": 1, **{name: [0.5] for name in (*SCORES, "chance")}}
    layers = [{"layer": 0, **layer, "closed_form": None}, {"layer": 1, **layer, "closed_form": found}]
    result = {"config": result_settings(configure(K_sweep, **options)), "layers": layers, "fractions": [0.1],
              "num_samples": 9, "num_classes": 2, "hidden_size": 4,
              "score": {name: {"value": 0.5} for name in SCORES}}  # fmt: skip
    rows = list(collect.ntps_rows(Path(path), result))
    return {table: [row for name, row in rows if name == table] for table in ("scores", "layers", "features")}


@pytest.mark.parametrize(
    ("name", "dataset", "options"),
    [
        ("emotion.smallest.centered", "emotion", {"eigenvectors": "smallest", "center": True}),
        ("org__set.test.largest", "org/set.test.largest", {}),  # not an option's name: left as it is
        ("my.test.test", "my.test", {"split": "test"}),
        ("rows.v1.0.standardized", "rows.v1.0", {"coordinates": "standardized"}),
    ],
)
def test_options_are_not_part_of_the_datasets_name(name, dataset, options):
    assert K_sweep.output_path(configure(K_sweep, dataset_name=dataset, **options)).name == f"{name}.json"
    [row] = ntps_rows(f"ntps/tiny/{name}.json", **options)["scores"]
    assert row["dataset"] == dataset and row["model"] == "tiny"


def test_a_closed_form_score_without_a_meaning_is_left_out_and_so_are_those_of_test_rows_and_after_lora():
    found = {"ridge_r2": {"value": 0.5, "meaningless": False}, "h_oas": {"value": 9.0, "meaningless": True}}
    rows = ntps_rows("ntps/org__model/emotion.json", found, seed=3)
    assert rows["features"] == [{"model": "org/model", "dataset": "emotion", "seed": 3, "layer": 1, "ridge_r2": 0.5}]
    assert [row["layer"] for row in rows["layers"]] == [0, 1]
    after = ntps_rows("ntps/org__model+lora/emotion.json", found)
    assert not after["features"] and not after["layers"] and len(after["scores"]) == 1
    assert not ntps_rows("ntps/org__model/emotion.test.json", found, split="test")["features"]


# ------------------------------------------------------------------ results that are not
def test_each_problem_is_named_skipped_and_counted(monkeypatch, results_dir, model_dirs, capsys):
    ntps, probes = (results_dir / "seed1" / name / model_dirs["qwen2"].name for name in ("ntps", "linear_sklearn"))
    whole = (ntps / "task1.json").read_text()
    problems = {
        ntps / "task0.random.json": (whole[:1000], "is damaged"),
        ntps / "notes.json": ('{"title": "not a result"}', "is incomplete"),
        probes / "numbers.json": ("[1, 2]", "was not written"),
        ntps / "task1.json": (json.dumps(json.loads(whole) | {"score": "high"}), "is not a result of ntps (TypeError"),
    }
    for path, (content, _) in problems.items():
        path.write_text(content)
    assert run_in_process(monkeypatch, SCRIPT, "--results_dir", results_dir) == 0
    printed = capsys.readouterr()
    assert "40 results, 4 skipped" in printed.out and printed.err.count("\n") == 4
    for path, (_, fault) in problems.items():
        assert printed.err.count(f"skipped: {path} {fault}") == 1
    assert len(pd.read_csv(results_dir / "tables" / "scores.csv")) == 22


def test_scripts_that_used_different_rows_of_a_dataset_are_refused(results_dir):
    [path] = (results_dir / "seed0" / "lora").rglob("metrics.json")
    save_json(path, json.loads(path.read_text()) | {"test_fingerprint": "of others"})
    with pytest.raises(UserError, match=r"rows: two different results of dataset task0, seed 0, split test.*lora"):
        collected(results_dir)


def test_no_results_is_a_users_mistake(tmp_path):
    path = tmp_path / "results" / "ntps" / "tiny" / "kind.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(UserError, match=f"No results under {tmp_path / 'results'}; 1 skipped.*python cache.py"):
        collected(tmp_path / "results")
    assert not (tmp_path / "data").exists()
