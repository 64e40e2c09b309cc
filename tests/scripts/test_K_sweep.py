"""K_sweep.py through its command line: results, their identity, held-out numbers, and mistakes in one sentence."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cache
import K_sweep
from tests.conftest import configure, make_texts, retrain, run_in_process, write_rows
from tests.data.test_real_data import DATASETS
from utils.algebra.moments import load_layer
from utils.algebra.scores import SCORES
from utils.data.load import load_texts
from utils.models.table import MODELS, models_dir
from utils.results import open_tensors
from utils.script import UserError
from utils.settings import with_values


def test_only_options_other_than_the_default_stand_in_the_name():
    def name(**options):
        return K_sweep.output_path(configure(K_sweep, dataset_name="docstrings/kind", **options)).as_posix()

    folder = "results/ntps/tiny/docstrings__kind"
    assert name() == name(subspace="autoregression") == f"{folder}.json"
    assert name(subspace="random", split="test", center=True) == f"{folder}.test.random.centered.json"
    assert name(eigenvectors="smallest", coordinates="standardized") == f"{folder}.smallest.standardized.json"
    assert name(coordinates="prefix_standardized") == f"{folder}.prefix_standardized.json"


# ------------------------------------------------------------------ real models: however the moments are computed
def shuffled_texts(settings, run, split):
    """The texts of `load_texts` in another order."""
    data = load_texts(settings, run, split)
    order = np.random.default_rng(1).permutation(len(data.texts))
    return dataclasses.replace(data, texts=[data.texts[i] for i in order], labels=data.labels[order])


def sweep_all(folder: Path, **options) -> tuple[list, list]:
    """The moments of every layer, of a docstring task if no other is named, and their scores."""
    config = configure(cache, **{"dataset_name": "docstrings/kind", "results_dir": folder} | options)
    cache.main(config)
    with open_tensors(cache.config_path(config)) as (file, metadata):
        layers = [load_layer(file, metadata, layer, torch.device("cpu")) for layer in metadata["layers"]]
    sweep = K_sweep.Config(num_null_draws=2)
    return layers, [K_sweep.sweep_layer(moments, None, sweep, i) for i, moments in enumerate(layers)]


def assert_equal_scores(one: list, other: list, tolerance: float, averaged: bool = False) -> None:
    """NTPS within 1e-4, the others within the tolerance, at every layer and fraction or averaged over these."""
    for a, b in zip(one, other, strict=True):
        assert (a.rank_u, a.rank_v, a.rank_label) == (b.rank_u, b.rank_v, b.rank_label)
        for name in SCORES:
            difference = a.scores[name] - b.scores[name]
            difference = (difference.mean() if averaged else difference).abs().max()
            assert difference < (1e-4 if name == "ntps" else tolerance), (name, a.layer, difference)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return sweep_all(tmp_path_factory.mktemp("tiny"), max_samples=800)


@pytest.mark.slow
def test_scores_of_the_embedded_model_equal_the_reference_and_excess_lies_within_its_bounds(tiny):
    fractions = K_sweep.Config().fractions
    for moments, layer in zip(*tiny, strict=True):
        expected = [K_sweep.ntps_reference(moments, fraction) for fraction in fractions[::6]]
        np.testing.assert_allclose(layer.scores["ntps"][::6], expected, atol=1e-6)
        excess, slack = layer.scores["excess_loss"], 1e-9
        for form in ("", "_euclidean"):
            assert torch.all(layer.scores[f"excess_lower{form}"] <= excess + slack), layer.layer
            assert torch.all(excess <= layer.scores[f"excess_upper{form}"] + slack), layer.layer
        assert torch.all(excess[:-1] - excess[1:] >= -slack)  # a larger V never loses more


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"tokens_per_batch": 256}, 1e-4), ({"product_dtype": "float64"}, 1e-4), ({"product_dtype": "bfloat16x2"}, 2e-4)],
)
def test_score_does_not_depend_on_how_it_is_computed(tiny, options, tolerance, tmp_path, monkeypatch):
    if "tokens_per_batch" in options:  # in another order, too
        monkeypatch.setattr(cache, "load_texts", shuffled_texts)
    assert_equal_scores(tiny[1], sweep_all(tmp_path, max_samples=800, **options)[1], tolerance)


@pytest.mark.slow
@pytest.mark.skipif(
    not DATASETS.is_dir() or not (models_dir() / MODELS["smollm2"].path).is_file(),
    reason="needs a dataset beside the repository, and the model that demo.real_llm fetches",
)
def test_bfloat16_parts_give_the_scores_of_a_real_llm(tmp_path):
    """The mean over fractions, which is a run's score, as closely as always; so few texts move single fractions more.

    `auto` takes float64 for them: float32 moves a fraction by up to 2.8e-4 here, and by 6e-5 with 700 texts.
    """
    options = {"model_name": "smollm2", "dataset_name": "rotten_tomatoes", "datasets_dir": DATASETS}
    options |= {"max_samples": 200, "layers": (20, -1)}
    exact, parts = (sweep_all(tmp_path / name, product_dtype=name, **options)[1] for name in ("float64", "bfloat16x2"))
    assert_equal_scores(exact, parts, 2e-4, averaged=True)
    assert_equal_scores(exact[-1:], parts[-1:], 5e-4)


# ------------------------------------------------------------------ the command line
@pytest.fixture(scope="module")
def cached(model_dirs, rows_path, tmp_path_factory):
    """A results folder with the moments of both splits in bfloat16; and the settings K_sweep.py needs to find them."""
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path)}
    names["results_dir"] = tmp_path_factory.mktemp("cached")
    for split in ("train", "test"):
        cache.main(configure(cache, **names, split=split, dtype="bfloat16"))
    return names


@pytest.fixture
def names(cached, tmp_path):
    """The settings of a copy of `cached`."""
    return cached | {"results_dir": shutil.copytree(cached["results_dir"], tmp_path / "results")}


@pytest.fixture
def config(names):
    return configure(K_sweep, **names, picture=False, num_null_draws=2)


def test_from_texts_to_json_and_picture(model_dirs, rows_path, tmp_path, monkeypatch, capsys):
    """Runs the commands that a user types."""
    call = ["--model_name", model_dirs["qwen2"], "--dataset_name", rows_path, "--results_dir", tmp_path]
    for script in (["cache.py", "--split", "test"], ["cache.py"], ["K_sweep.py"]):
        assert run_in_process(monkeypatch, *script, *call) == 0
    path = tmp_path / "ntps" / Path(model_dirs["qwen2"]).name / "rows.json"
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(path)
    content = json.loads(path.read_text())
    assert len(content["layers"]) == 3 and content["num_samples"] == 168 and content["num_classes"] == 3
    for layer in content["layers"]:
        for name in (*SCORES, "chance", "excess_loss", "excess_lower", "excess_upper"):
            assert len(layer[name]) == len(content["fractions"]) == 19
        assert set(layer["null"]) == {"ntps_label", "ntps_whitened", "retained"}
        assert 0 <= layer["probe_r2"] <= 1 and layer["probe_r2_held_out"] is not None
    assert content["score"]["retained"]["value"] == pytest.approx(np.mean(content["layers"][-1]["retained"]))
    assert path.with_suffix(".png").stat().st_size > 10_000 and path.with_suffix(".pdf").is_file()


def test_settings_left_at_their_default_are_those_of_the_moments(names, config):
    assert K_sweep.main(config)["config"]["dtype"] == "bfloat16"
    with pytest.raises(UserError, match=r"dtype: 'bfloat16' there, 'float16' now"):
        K_sweep.main(with_values(config, dtype="float16"))
    with pytest.raises(UserError, match=r"max_samples: None there, 20 now"):
        K_sweep.main(with_values(config, max_samples=20))
    cache.main(configure(cache, **names, dtype="bfloat16", pooling="last", overwrite=True))
    with pytest.raises(UserError, match=r"other moments.*--overwrite"):
        K_sweep.main(config)


# ------------------------------------------------------------------ held-out numbers
def held_out_of(result: dict) -> list:
    return [layer["probe_r2_held_out"] for layer in result["layers"]]


def test_held_out_numbers_come_and_go_with_their_moments(names, config, tmp_path, capsys):
    """A stored result is made again, and not stale, after held-out moments were added, removed or of other rows."""
    rows = Path(shutil.copy(names["dataset_name"], tmp_path / "rows.jsonl"))
    config = with_values(config, dataset_name=str(rows))
    test = next(names["results_dir"].glob("moments/*/*/test.safetensors"))
    away = test.rename(names["results_dir"] / "away.safetensors")
    without = K_sweep.main(config)
    assert held_out_of(without) == [None] * 3 and without["held_out"] is None
    away.rename(test)
    found = K_sweep.main(config)
    assert None not in held_out_of(found) and "made again" in capsys.readouterr().out
    assert K_sweep.main(config) == found and "made again" not in capsys.readouterr().out
    changed = [json.loads(line) for line in rows.read_text().splitlines()]
    write_rows(rows, [row | {"text": row["text"] + " again"} for row in changed])
    other = names | {"dataset_name": str(rows), "split": "test", "dtype": "bfloat16", "overwrite": True}
    cache.main(configure(cache, **other))
    assert None not in held_out_of(K_sweep.main(config)) and held_out_of(K_sweep.main(config)) != held_out_of(found)
    test.unlink()
    assert held_out_of(K_sweep.main(config)) == [None] * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed: 1 there, 0 now"),
        ({"label_column": "other"}, "label_column: 'other' there, 'label' now"),
        ({"weights": "other"}, "other weights of the model"),
    ],
)
def test_held_out_moments_of_other_settings_are_left_out_with_a_sentence(
    names, model_dirs, tmp_path, capsys, change, said
):
    """Scores are those without held-out moments."""
    old = [json.loads(line) for line in Path(names["dataset_name"]).read_text().splitlines()]
    rows = write_rows(tmp_path / "two.jsonl", [row | {"other": f"kind {i % 4}"} for i, row in enumerate(old)])
    model = shutil.copytree(model_dirs["qwen2"], tmp_path / "model")
    names = {"model_name": str(model), "dataset_name": str(rows), "results_dir": tmp_path / "mine"}
    names["label_column"] = "label"
    settings = {name: value for name, value in change.items() if name != "weights"}
    cache.main(configure(cache, **names | {"split": "test"} | settings))
    if "weights" in change:
        retrain(model)
    cache.main(configure(cache, **names))
    del names["label_column"]  # that of the moments
    config = configure(K_sweep, **names, picture=False, num_null_draws=2)
    assert held_out_of(K_sweep.main(config)) == [None] * 3
    told = capsys.readouterr().out
    assert "No held-out numbers: " in told and said in told and "Run cache.py --split test --overwrite." in told
    cache.main(configure(cache, **names, label_column="label", split="test", overwrite=True))
    assert None not in held_out_of(K_sweep.main(config))


# ------------------------------------------------------------------ mistakes
def test_missing_moments_name_the_script_that_makes_them(tmp_path):
    wanted = {"model_name": "tiny+lora", "dataset_name": "docstrings/kind", "results_dir": tmp_path}
    with pytest.raises(UserError, match=r"No moments at .*train\.safetensors. Run cache\.py .*--adapter_dir"):
        K_sweep.main(configure(K_sweep, **wanted))


def test_impossible_values_are_refused_before_the_pass(tmp_path):
    with pytest.raises(ValueError, match=r"--fractions must be in \(0, 1\]"):
        K_sweep.Config(fractions=(0.5, 1.5))
    with pytest.raises(UserError, match="--device gpu9 cannot be used here"):
        K_sweep.main(configure(K_sweep, device="gpu9", results_dir=tmp_path))
    assert not any(tmp_path.iterdir())


def test_targets_that_are_all_equal_have_no_score(model_dirs, tmp_path):
    """The train split still has scores, because the test split only judges the probe."""
    (folder := tmp_path / "numbers").mkdir()
    for split, spread in (("train", 0.1), ("test", 0.0)):
        rows = [{"text": text, "label": 0.1 + spread * (i % 7)} for i, text in enumerate(make_texts(40))]
        write_rows(folder / f"{split}.jsonl", rows)
    shared = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(folder), "results_dir": tmp_path / "results"}
    cache.main(configure(cache, **shared, split="test"))
    with pytest.raises(UserError, match=r"labels of .*test.safetensors are all equal. Change --split"):
        K_sweep.main(configure(K_sweep, **shared, split="test", picture=False))
    cache.main(configure(cache, **shared))
    K_sweep.main(configure(K_sweep, **shared, picture=False))
