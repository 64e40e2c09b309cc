"""fig_plot/collect.py: the tables equal the results they were read from, and what cannot be read is named."""

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
    """What a small study leaves of one model and seed."""
    shared: dict[str, Any] = {"model_name": str(model), "dataset_name": str(rows), "seed": seed}
    shared["results_dir"] = results_dir
    for split in ("train", "test"):
        cache.main(configure(cache, **shared, split=split, save_pooled="all", device="cpu"))
    for control in ({}, {"subspace": "pca"}, {"eigenvectors": "smallest", "center": True}):
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


def collected(monkeypatch, results_dir: Path, *options: str) -> tuple[int | str | None, Path]:
    """Exit code or message of the command, and where its tables are."""
    output_dir = results_dir.parent / "data"
    places = ["--results_dir", results_dir, "--output_dir", output_dir]
    return run_in_process(monkeypatch, SCRIPT, *places, *options), output_dir


def read_results(results_dir: Path, pattern: str) -> dict[Path, dict]:
    """The JSON results of a pattern, read without the code under test."""
    return {path: json.loads(path.read_text()) for path in sorted(results_dir.rglob(pattern))}


def placed(rows: list[dict]) -> list[tuple[Path, dict]]:
    """Each row with a file of its own."""
    return [(Path(f"file{i}.json"), row) for i, row in enumerate(rows)]


def six_digits(value: float) -> float:
    return float(f"{value:.6g}")


# ------------------------------------------------------------------ what is collected
def test_scores_equal_the_results(monkeypatch, results_dir, model_dirs):
    code, data = collected(monkeypatch, results_dir)
    assert code == 0
    scores = pd.read_csv(data / "scores.csv")
    results = read_results(results_dir, "ntps/*/*.json")
    assert len(scores) == len(results) == 9 and not scores.duplicated().any()
    assert set(scores["dataset"]) == {"rows"} and set(scores["model"]) == {path.name for path in model_dirs.values()}
    for path, result in results.items():
        config, subspace = result["config"], "pca" if ".pca" in path.name else "autoregression"
        order = "smallest" if ".smallest" in path.name else "largest"
        [row] = scores[
            (scores["model"] == path.parent.name)
            & (scores["seed"] == int(path.parent.parent.parent.name.removeprefix("seed")))
            & (scores["subspace"] == subspace)
            & (scores["eigenvectors"] == order)
        ].to_dict("records")
        assert row["center"] == config["center"] == (".centered" in path.name)
        assert row["split"] == "train" and row["num_samples"] == result["num_samples"] == 168
        for name in SCORES:
            expected = result["score"][name]
            assert row[name] == six_digits(expected["value"])
            for key in set(expected) - {"value"}:
                assert row[f"{name}_{key}"] == six_digits(expected[key])
        for name in ("probe_r2", "probe_mse_held_out", "rank_u", "rank_label", "layer"):
            assert row[name] == six_digits(result["layers"][-1][name])


def test_layers_equal_the_results(monkeypatch, results_dir):
    _, data = collected(monkeypatch, results_dir)
    layers = pd.read_csv(data / "layers.csv.gz").set_index(["model", "seed", "eigenvectors", "layer", "fraction"])
    results = {path: of for path, of in read_results(results_dir, "ntps/*/*.json").items() if ".pca" not in path.name}
    assert len(layers) == sum(len(of["layers"]) * len(of["fractions"]) for of in results.values())
    for path, result in results.items():
        for layer in result["layers"]:
            for index, fraction in enumerate(result["fractions"]):
                config = result["config"]
                key = (path.parent.name, config["seed"], config["eigenvectors"], layer["layer"], six_digits(fraction))
                for name in (*SCORES, "chance"):
                    assert layers.loc[key, name] == six_digits(layer[name][index])


def test_probes_training_and_datasets_equal_the_results(monkeypatch, results_dir, model_dirs):
    _, data = collected(monkeypatch, results_dir)
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
        row = training.loc[(path.parent.parent.parent.name, result["config"]["seed"])]
        assert row["num_steps"] == result["num_steps"] and row["num_train"] == 168
        for name in ("test_accuracy", "test_loss", "train_loss"):
            assert row[name] == six_digits(result["last"][name])
    datasets = pd.read_csv(data / "datasets.csv")
    assert datasets["seed"].tolist() == [0, 1] and datasets["num_train"].tolist() == [168, 168]  # once, not per model
    baselines = read_results(results_dir / "seed1", "linear_sklearn/*/*.json").popitem()[1]["baselines"]
    assert datasets["majority_accuracy"].iloc[1] == six_digits(baselines["majority"]["accuracy"])
    assert set(pd.read_csv(data / "models.csv")["model"]) == {path.name for path in model_dirs.values()}


def test_a_second_run_is_the_same_to_the_byte_and_nothing_is_pickled(monkeypatch, results_dir, capsys):
    code, data = collected(monkeypatch, results_dir)
    assert code == 0 and capsys.readouterr().out.splitlines()[-1] == str(data)
    first = {path.name: path.read_bytes() for path in data.iterdir()}
    collected(monkeypatch, results_dir)
    assert first == {path.name: path.read_bytes() for path in data.iterdir()}
    assert {Path(name).suffix for name in first} == {".csv", ".gz", ".json"}
    assert not any(content.startswith(b"\x80") for content in first.values())  # a pickle's first byte
    sources = json.loads(first["sources.json"])
    assert sources["num_results"] == 16 and len(sources["environments"]) == 1


def test_nothing_is_deleted_and_a_table_without_rows_now_is_named(monkeypatch, results_dir, capsys):
    _, data = collected(monkeypatch, results_dir)
    before = (data / "training.csv").read_bytes()
    for folder in [*results_dir.rglob("lora"), *results_dir.rglob("linear_training")]:
        shutil.rmtree(folder)
    code, _ = collected(monkeypatch, results_dir)
    assert code == 0 and (data / "training.csv").read_bytes() == before
    assert f"older: {data / 'training.csv'} is of an earlier run" in capsys.readouterr().err


def test_by_default_the_tables_are_beside_the_results_without_studies_and_benchmarks(monkeypatch, results_dir):
    """`results/study/` is collected only by its own name; the committed tables are not touched."""
    for name in ("study", "benchmarks"):
        shutil.copytree(results_dir / "seed1", results_dir / name / "seed1")
    shutil.move(results_dir / "seed1", results_dir.parent / "elsewhere")
    assert run_in_process(monkeypatch, SCRIPT, "--results_dir", results_dir) == 0
    scores = pd.read_csv(results_dir / "tables" / "scores.csv")
    assert set(scores["seed"]) == {0}
    assert run_in_process(monkeypatch, SCRIPT, "--results_dir", results_dir / "study") == 0
    assert set(pd.read_csv(results_dir / "study" / "tables" / "scores.csv")["seed"]) == {1}


def test_a_study_in_two_pieces_has_the_tables_of_the_whole(monkeypatch, results_dir):
    code, whole = collected(monkeypatch, results_dir)
    expected = {path.name: path.read_bytes() for path in whole.glob("*.csv*")}
    for path in whole.iterdir():
        path.unlink()
    for piece in ("seed1", "seed0", "seed0"):  # once more changes nothing
        places = ["--results_dir", results_dir / piece, "--output_dir", whole, "--keep"]
        assert code == run_in_process(monkeypatch, SCRIPT, *map(str, places)) == 0
    assert {path.name: path.read_bytes() for path in whole.glob("*.csv*")} == expected
    assert json.loads((whole / "sources.json").read_text())["command"].endswith("--keep")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("scores", b"a,b\n1,2\n", "it has no column model"),
        ("scores", b"", "No columns"),
        ("training", b"model,dataset,seed,method\na,b,0,lora\na,b", "its last line has no end"),
        ("probes", b"model,dataset,seed,layer\na,b,zero,1\n", "its column seed is not of numbers"),
        ("models", b"model\n\xff\n", "can't decode"),
    ],
)
def test_a_damaged_table_is_not_kept_and_no_other_is_touched(monkeypatch, results_dir, name, content, why):
    _, data = collected(monkeypatch, results_dir)
    (data / f"{name}.csv").write_bytes(content)
    shutil.rmtree(results_dir / "seed1")  # what would be lost, were a table written anew
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    message, _ = collected(monkeypatch, results_dir, "--keep")
    assert str(message).startswith(f"error: {data / name}.csv is no whole table (") and why in str(message)
    assert str(message).endswith("). Make it again: python -m fig_plot.collect")
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


@pytest.mark.parametrize(
    ("entry", "value"),
    [("num_samples", [1, 2]), ("num_samples", {"train": 1}), ("hidden_size", "wide"), ("config", "seed")],
)
def test_a_result_with_a_list_or_a_word_in_place_of_a_number_is_skipped(monkeypatch, results_dir, capsys, entry, value):
    path = sorted(results_dir.rglob("ntps/*/rows.json"))[0]
    result = json.loads(path.read_text())
    if entry == "config":
        result["config"][value] = [0]
    else:
        result[entry] = value
    save_json(path, result)
    code, data = collected(monkeypatch, results_dir)
    assert code == 0 and f"skipped: {path} is not a result of ntps (TypeError" in capsys.readouterr().err
    assert len(pd.read_csv(data / "scores.csv")) == 8


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
    """Also in a column that is empty for another model."""
    rows = [{"model": "a", "num_parameters": 1378944, "loss": 2.123456789}, {"model": "b", "num_parameters": None}]
    save_csv(tmp_path / "models.csv", collect.to_table("models", placed(rows)))
    assert (tmp_path / "models.csv").read_text().splitlines()[1:] == ["a,1378944,2.12346", "b,,"]


@pytest.mark.parametrize(
    ("name", "dataset", "options"),
    [
        ("emotion", "emotion", {}),
        ("docstrings__kind.smallest", "docstrings/kind", {"eigenvectors": "smallest"}),
        ("emotion.smallest.centered", "emotion", {"eigenvectors": "smallest", "center": True}),
        ("org__set.test.largest", "org/set.test.largest", {}),  # not an option's name: left as it is
        ("emotion.test.pca", "emotion", {"split": "test", "subspace": "pca"}),
        ("emotion.random", "emotion", {"subspace": "random"}),
        ("my.test", "my.test", {}),  # a name that ends like an option, without that option and with it
        ("my.test.test", "my.test", {"split": "test"}),
        ("rows.v1.0.smallest", "rows.v1.0", {"eigenvectors": "smallest"}),
    ],
)
def test_options_are_not_part_of_the_datasets_name(name, dataset, options):
    config = configure(K_sweep, dataset_name=dataset, **options)
    path = Path(f"ntps/tiny/{name}.json")
    assert K_sweep.output_path(config).name == path.name  # the name that K_sweep.py gives it
    assert collect.cell_keys(path, result_settings(config))["dataset"] == dataset


def test_a_closed_form_score_without_a_meaning_is_left_out():
    found = {"ridge_r2": {"value": 0.5, "meaningless": False}, "h_oas": {"value": 9.0, "meaningless": True}}
    config = {"seed": 3, "split": "train", "eigenvectors": "largest", "subspace": "autoregression", "center": False}
    result = {"config": config, "layers": [{"layer": 0, "closed_form": None}, {"layer": 1, "closed_form": found}]}
    rows = list(collect.feature_rows(Path("ntps/org__model/emotion.json"), result))
    assert rows == [{"model": "org/model", "dataset": "emotion", "seed": 3, "layer": 1, "ridge_r2": 0.5}]
    assert not list(collect.feature_rows(Path("ntps/org__model+lora/emotion.json"), result))
    result["config"] = config | {"split": "test"}
    assert not list(collect.feature_rows(Path("ntps/org__model/emotion.test.json"), result))


@pytest.mark.parametrize(
    ("method", "standardize", "name"),
    [
        ("linear_training", False, "linear_training"),
        ("linear_training", True, "linear_training_converged"),
        ("lora", None, "lora"),
    ],
)
def test_the_converged_probe_is_a_method_of_its_own_on_the_same_dataset(method, standardize, name):
    config = {"seed": 1, "learning_rate": 1e-3} | ({} if standardize is None else {"standardize": standardize})
    result = {"config": config, "last": {"test_accuracy": 0.75, "train_loss": 0.5}, "seconds": 1.26}
    result |= dict.fromkeys(("num_train", "num_steps", "texts_per_step", "num_trained_parameters"), 7)
    folder = "emotion.standardized" if standardize else "emotion"
    row = collect.training_row(Path(f"seed1/{method}/tiny/{folder}/metrics.json"), result)
    assert (row["dataset"], row["method"], row["model"], row["seed"]) == ("emotion", name, "tiny", 1)
    assert (row["test_accuracy"], row["train_loss"], row["seconds"]) == (0.75, 0.5, 1.3)


# ------------------------------------------------------------------ what is not
def spoil(results_dir: Path, model: str, other: str) -> list[str]:
    """Plants one problem of each kind; gives what has to be said of each."""
    partial = results_dir / "seed0" / "lora" / model / "rows"
    (partial / "metrics.json").rename(partial / "state.safetensors")
    damaged = results_dir / "seed1" / "ntps" / model / "rows.pca.json"
    damaged.write_text(damaged.read_text()[:1000])
    foreign = results_dir / "seed1" / "ntps" / model / "notes.json"
    foreign.write_text('{"title": "not a result"}')
    stray = results_dir / "seed1" / "linear_sklearn" / model / "numbers.json"
    stray.write_text("[1, 2]")
    unsolved = results_dir / "seed0" / "linear_training" / other / "rows"
    shutil.copytree(results_dir / "seed0" / "linear_training" / model / "rows", unsolved)
    shutil.rmtree(results_dir / "seed0" / "ntps" / other)
    return [
        f"partial: {partial} has no metrics.json",
        f"skipped: {damaged} is damaged",
        f"skipped: {foreign} is no whole result",
        f"skipped: {stray} was not written",
        f"missing: {other} on rows has no result of K_sweep.py",
    ]


def test_each_problem_is_named_skipped_and_counted(monkeypatch, results_dir, model_dirs, capsys):
    model, other = model_dirs["qwen2"].name, model_dirs["llama"].name
    expected = spoil(results_dir, model, other)
    code, data = collected(monkeypatch, results_dir)
    printed = capsys.readouterr()
    assert code == 0 and "12 results, 5 skipped or missing" in printed.out
    named = printed.err.strip().splitlines()
    assert len(named) == len(expected)
    for start in expected:
        assert len([line for line in named if line.startswith(start)]) == 1, (start, named)
    scores = pd.read_csv(data / "scores.csv")
    assert len(scores) == 5 and set(scores["model"]) == {model} and set(scores["dataset"]) == {"rows"}
    assert len(scores[scores["subspace"] == "pca"]) == 1
    training = pd.read_csv(data / "training.csv")
    assert training[["model", "method", "seed"]].values.tolist() == [
        *([other, "linear_training", 0], [model, "linear_training", 0]),
        *([model, "linear_training", 1], [model, "lora", 1]),
    ]


@pytest.mark.parametrize("is_foreign", [False, True])
def test_no_results_is_a_users_mistake(monkeypatch, tmp_path, is_foreign):
    if is_foreign:
        path = tmp_path / "results" / "ntps" / "tiny" / "kind.json"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    message, data = collected(monkeypatch, tmp_path / "results")
    assert str(message).startswith(f"error: No results under {tmp_path / 'results'}")
    assert "python cache.py" in str(message) and not data.exists()
    assert (f"skipped: {tmp_path}" in str(message)) == is_foreign


@pytest.mark.parametrize("lacking", ["environment", "model_name"])
def test_a_result_without_its_provenance_is_foreign(monkeypatch, results_dir, capsys, lacking):
    path = sorted(results_dir.rglob("ntps/*/rows.json"))[0]
    result = json.loads(path.read_text())
    del (result if lacking == "environment" else result["config"])[lacking]
    save_json(path, result)
    code, _ = collected(monkeypatch, results_dir)
    assert code == 0 and f"skipped: {path}" in capsys.readouterr().err


def test_two_different_results_of_the_same_name_are_refused(monkeypatch, results_dir, model_dirs):
    path = results_dir / "seed0" / "ntps" / model_dirs["qwen2"].name / "rows.json"
    again = results_dir / "again" / "ntps" / path.parent.name / path.name
    again.parent.mkdir(parents=True)
    shutil.copy(path, again)
    code, _ = collected(monkeypatch, results_dir)  # a copy is no contradiction
    assert code == 0
    result = json.loads(path.read_text())
    result["score"]["ntps"]["value"] += 0.1
    save_json(again, result)
    message, _ = collected(monkeypatch, results_dir)
    assert f": {again} and {path}. Name one" in str(message) and "two different results of model" in str(message)
