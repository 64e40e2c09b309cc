"""fig_plot/collect.py: the tables equal the results they were read from; unreadable files are named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import cache
import K_sweep
import linear_sklearn
import linear_training
import lora_finetuning
from fig_plot import collect
from fig_plot.tables import read_table, save_csv
from tests.conftest import configure, run_in_process
from utils.algebra.scores import SCORES
from utils.results import save_json
from utils.script import UserError
from utils.settings import result_settings

pytestmark = pytest.mark.slow

SCRIPT = "fig_plot/collect.py"


def run_scripts(model: Path, rows: Path, results_dir: Path, seed: int, is_trained: bool) -> None:
    """Runs the scripts of a small study for one model and seed."""
    shared: dict[str, Any] = {"model_name": str(model), "dataset_name": str(rows), "seed": seed}
    shared["results_dir"] = results_dir
    for split in ("train", "test"):
        cache.main(configure(cache, **shared, split=split, save_pooled="all", device="cpu"))
    for control in ({}, {"subspace": "random"}, {"eigenvectors": "smallest", "center": True}):
        K_sweep.main(configure(K_sweep, **shared, **control, picture=False, num_null_draws=5))
    linear_sklearn.main(configure(linear_sklearn, **shared, device="cpu", num_workers=1, picture=False))
    if is_trained:
        linear_training.main(configure(linear_training, **shared, device="cpu", num_epochs=2))
        steps = {"num_steps": 2, "steps_per_evaluation": 1, "batch_size": 4, "dtype": "float32"}
        lora_finetuning.main(configure(lora_finetuning, **shared, **steps, device="cpu"))


@pytest.fixture(scope="module")
def made_once(model_dirs, rows_path, tmp_path_factory) -> Path:
    """Two models and two seeds in nested folders, the second model not trained."""
    results_dir = tmp_path_factory.mktemp("made") / "study"
    run_scripts(model_dirs["qwen2"], rows_path, results_dir / "seed0", 0, is_trained=True)
    run_scripts(model_dirs["qwen2"], rows_path, results_dir / "seed1", 1, is_trained=True)
    run_scripts(model_dirs["llama"], rows_path, results_dir / "seed0", 0, is_trained=False)
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
    keys = ["model", "seed", "subspace", "eigenvectors"]
    scores, layers = (pd.read_csv(data / name) for name in ("scores.csv", "layers.csv.gz"))
    assert len(scores) == len(results) == 9 and set(scores["dataset"]) == {"rows"}
    scores, layers = scores.set_index(keys).sort_index(), layers.set_index([*keys, "layer", "fraction"]).sort_index()
    num_layers = 0
    for path, result in results.items():
        config, last = result["config"], result["layers"][-1]
        order = "smallest" if ".smallest" in path.name else "largest"
        subspace = "random" if ".random" in path.name else "autoregression"
        key = (path.parent.name, int(path.parents[2].name.removeprefix("seed")), subspace, order)
        row = scores.loc[key]
        assert row["center"] == config["center"] == (".centered" in path.name)
        assert row["split"] == "train" and row["num_samples"] == result["num_samples"] == 168
        for name in SCORES:
            for entry, expected in result["score"][name].items():
                assert row[name if entry == "value" else f"{name}_{entry}"] == six_digits(expected)
        for name in ("probe_r2", "probe_mse_held_out", "rank_u", "rank_label", "layer"):
            assert row[name] == six_digits(last[name])
        kept = result["layers"] if subspace == "autoregression" else [result["layers"][len(result["layers"]) // 2]]
        num_layers += len(kept)
        for layer in kept:
            for index, fraction in enumerate(result["fractions"]):
                for name in (*SCORES, "chance"):
                    assert layers.loc[(*key, layer["layer"], six_digits(fraction)), name] == six_digits(
                        layer[name][index]
                    )
    assert len(layers) == num_layers * len(result["fractions"])


def test_probes_training_and_datasets_equal_the_results(results_dir, model_dirs):
    data = collected(results_dir)
    probes = pd.read_csv(data / "probes.csv").set_index(["model", "seed", "layer"])
    for path, result in read_results(results_dir, "linear_sklearn/*/*.json").items():
        for layer in result["layers"]:
            row = probes.loc[(path.parent.name, result["config"]["seed"], layer["layer"])]
            for split in ("train", "test"):
                for name, value in layer[split].items():
                    assert row[f"{split}_{name}"] == six_digits(value)
    training = pd.read_csv(data / "training.csv").set_index(["method", "seed"])
    results = read_results(results_dir, "metrics.json")
    assert len(training) == len(results) == 4 and set(training["dataset"]) == {"rows"}
    for path, result in results.items():
        row = training.loc[(path.parents[2].name, result["config"]["seed"])]
        assert row["num_steps"] == result["num_steps"] and row["num_train"] == 168
        for name in ("test_accuracy", "test_loss", "train_loss"):
            assert row[name] == six_digits(result["last"][name])
    datasets = pd.read_csv(data / "datasets.csv")
    assert datasets["seed"].tolist() == [0, 1] and datasets["num_train"].tolist() == [168, 168]  # once, not per model
    baselines = read_results(results_dir / "seed1", "linear_sklearn/*/*.json").popitem()[1]["baselines"]
    assert datasets["majority_accuracy"].iloc[1] == six_digits(baselines["majority"]["accuracy"])
    assert set(pd.read_csv(data / "models.csv")["model"]) == {path.name for path in model_dirs.values()}


def test_a_second_run_is_the_same_to_the_byte_and_deletes_nothing(results_dir, capsys):
    data = collected(results_dir)
    assert capsys.readouterr().out.splitlines()[-1] == str(data)
    first = {path.name: path.read_bytes() for path in data.iterdir()}
    collected(results_dir)
    assert first == {path.name: path.read_bytes() for path in data.iterdir()}
    assert {Path(name).suffix for name in first} == {".csv", ".gz", ".json"}
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


def test_a_study_in_two_pieces_has_the_tables_of_the_whole(results_dir):
    whole = collected(results_dir)
    expected = {path.name: path.read_bytes() for path in whole.glob("*.csv*")}
    shutil.rmtree(whole)
    for piece in ("seed1", "seed0", "seed0"):  # once more changes nothing
        collect.main(collect.Config(results_dir / piece, whole, keep=True))
    assert {path.name: path.read_bytes() for path in whole.glob("*.csv*")} == expected
    assert json.loads((whole / "sources.json").read_text())["command"].endswith("--keep")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("scores", b"a,b\n1,2\n", "it has no column model"),
        ("training", b"model,dataset,seed,method\na,b,0,lora\na,b", "it has been cut off"),
        ("probes", b"model,dataset,seed,layer\na,b,zero,1\n", "its column seed is not of numbers"),
    ],
)
def test_a_damaged_table_is_not_kept_and_no_other_is_touched(results_dir, name, content, why):
    data = collected(results_dir)
    (data / f"{name}.csv").write_bytes(content)
    shutil.rmtree(results_dir / "seed1")  # rows that a table written anew would lose
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    with pytest.raises(UserError, match=rf"{name}\.csv is no complete table \({why}.*python -m fig_plot\.collect$"):
        collected(results_dir, keep=True)
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


# ------------------------------------------------------------------ rows and names
def test_names_that_pandas_would_take_for_something_else_are_kept_once(tmp_path):
    rows = [{"model": "a", "dataset": name, "seed": 0, "layer": 0, "word": word}
            for name in ("2024", "NA", "1e3") for word in ("null", "None", "nan", "")]  # fmt: skip
    table = collect.to_table("alignment", placed(rows))
    save_csv(tmp_path / "alignment.csv", table)
    written = (tmp_path / "alignment.csv").read_text()
    save_csv(tmp_path / "alignment.csv", collect.with_rows_of("alignment", tmp_path, table))
    assert (tmp_path / "alignment.csv").read_text() == written and written.count("\n") == 13
    assert set(read_table("alignment", tmp_path)["dataset"]) == {"2024", "NA", "1e3"}


def test_baselines_that_machines_round_differently_are_one_row_other_rows_are_not():
    row = {"dataset": "imdb", "seed": 0, "num_classes": 2, "num_train": 100, "bag_of_words_accuracy": 0.878}
    table = collect.to_table("datasets", placed([row, row | {"bag_of_words_accuracy": 0.877}]))
    assert table["bag_of_words_accuracy"].tolist() == [0.878]
    with pytest.raises(UserError, match=r"two different results of dataset imdb, seed 0: file0\.json and file1\.json"):
        collect.to_table("datasets", placed([row, row | {"num_train": 99}]))


def test_whole_numbers_keep_all_their_digits(tmp_path):
    """Whole numbers keep their digits even in a column that is empty for another model."""
    rows = [{"model": "a", "num_parameters": 1378944, "loss": 2.123456789}, {"model": "b", "num_parameters": None}]
    save_csv(tmp_path / "models.csv", collect.to_table("models", placed(rows)))
    assert (tmp_path / "models.csv").read_text().splitlines()[1:] == ["a,1378944,2.12346", "b,,"]


def ntps_result(found: dict | None = None, **options) -> dict:
    """A result of K_sweep.py with two layers, of which the last has closed forms."""
    layer = {"rank_u": 1, "rank_v": 1, "rank_label": 1, **{name: [0.5] for name in (*SCORES, "chance")}}
    layers = [{"layer": 0, **layer, "closed_form": None}, {"layer": 1, **layer, "closed_form": found}]
    score = {name: {"value": 0.5} for name in SCORES}
    counts = {"num_samples": 9, "num_classes": 2, "hidden_size": 4, "fractions": [0.1]}
    return {"config": result_settings(configure(K_sweep, **options)), "layers": layers, "score": score, **counts}


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
    path = Path(f"ntps/tiny/{name}.json")
    assert K_sweep.output_path(configure(K_sweep, dataset_name=dataset, **options)).name == path.name
    [row] = collect.ntps_rows(path, ntps_result(**options))["scores"]
    assert row["dataset"] == dataset and row["model"] == "tiny"


def test_a_closed_form_score_without_a_meaning_is_left_out_and_so_are_those_of_test_rows_and_after_lora():
    found = {"ridge_r2": {"value": 0.5, "meaningless": False}, "h_oas": {"value": 9.0, "meaningless": True}}
    rows = collect.ntps_rows(Path("ntps/org__model/emotion.json"), ntps_result(found, seed=3))
    assert rows["features"] == [{"model": "org/model", "dataset": "emotion", "seed": 3, "layer": 1, "ridge_r2": 0.5}]
    assert [row["layer"] for row in rows["layers"]] == [0, 1]
    after = collect.ntps_rows(Path("ntps/org__model+lora/emotion.json"), ntps_result(found))
    assert not after["features"] and not after["layers"] and len(after["scores"]) == 1
    of_test = collect.ntps_rows(Path("ntps/org__model/emotion.test.json"), ntps_result(found, split="test"))
    assert not of_test["features"]


def test_the_converged_probe_is_a_method_of_its_own_on_the_same_dataset():
    config = {"seed": 1, "learning_rate": 1e-3, "standardize": True}
    result = {"config": config, "last": {"test_accuracy": 0.75, "train_loss": 0.5}, "seconds": 1.26}
    result |= dict.fromkeys(("num_train", "num_steps", "texts_per_step", "num_trained_parameters"), 7)
    path = Path("seed1/linear_training/tiny/emotion.standardized/metrics.json")
    [row] = collect.training_rows(path, result)["training"]
    assert (row["dataset"], row["method"], row["model"]) == ("emotion", "linear_training_converged", "tiny")
    assert (row["test_accuracy"], row["train_loss"], row["seconds"]) == (0.75, 0.5, 1.3)


# ------------------------------------------------------------------ results that are not
def test_each_problem_is_named_skipped_and_counted(monkeypatch, results_dir, model_dirs, capsys):
    model = model_dirs["qwen2"].name
    partial = results_dir / "seed0" / "lora" / model / "rows"
    (partial / "metrics.json").rename(partial / "state.safetensors")
    ntps = results_dir / "seed1" / "ntps" / model
    damaged, foreign = ntps / "rows.random.json", ntps / "notes.json"
    damaged.write_text(damaged.read_text()[:1000])
    foreign.write_text('{"title": "not a result"}')
    stray = results_dir / "seed1" / "linear_sklearn" / model / "numbers.json"
    stray.write_text("[1, 2]")
    wrong = ntps / "rows.json"
    save_json(wrong, json.loads(wrong.read_text()) | {"hidden_size": "wide"})
    expected = [
        f"partial: {partial} has no metrics.json",
        f"skipped: {damaged} is damaged",
        f"skipped: {foreign} is incomplete",
        f"skipped: {stray} was not written",
        f"skipped: {wrong} is not a result of ntps (TypeError: hidden_size is 'wide')",
    ]
    assert run_in_process(monkeypatch, SCRIPT, "--results_dir", results_dir) == 0
    printed = capsys.readouterr()
    assert "13 results, 5 skipped" in printed.out
    named = printed.err.strip().splitlines()
    for start in expected:
        assert len([line for line in named if line.startswith(start)]) == 1, (start, named)
    assert len(named) == len(expected) and len(pd.read_csv(results_dir / "tables" / "scores.csv")) == 7


def test_no_results_is_a_users_mistake(tmp_path):
    path = tmp_path / "results" / "ntps" / "tiny" / "kind.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(UserError, match=f"No results under {tmp_path / 'results'}; 1 skipped.*python cache.py"):
        collected(tmp_path / "results")
    assert not (tmp_path / "data").exists()
