"""K_sweep.py through its command line: results, their identity, held-out numbers, and mistakes in one sentence."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cache
import K_sweep
from tests.conftest import configure, flags, make_texts, only_result, retrain, run_in_process, write_rows
from utils.algebra.moments import load_layer
from utils.algebra.scores import SCORES
from utils.data.load import load_texts
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


def shuffled_texts(settings, run, split):
    """The texts of `load_texts` in another order."""
    data = load_texts(settings, run, split)
    order = np.random.default_rng(1).permutation(len(data.texts))
    return dataclasses.replace(data, texts=[data.texts[i] for i in order], labels=data.labels[order])


def sweep_all(folder: Path, **options) -> tuple[list, list]:
    """The moments of every layer of a docstring task, and their scores."""
    config = configure(cache, dataset_name="docstrings/kind", results_dir=folder, max_samples=800, **options)
    cache.main(config)
    with open_tensors(cache.config_path(config)) as (file, metadata):
        layers = [load_layer(file, metadata, layer, torch.device("cpu")) for layer in metadata["layers"]]
    sweep = K_sweep.Config(num_null_draws=2)
    return layers, [K_sweep.sweep_layer(moments, None, sweep, i) for i, moments in enumerate(layers)]


def assert_equal_scores(one: list, other: list, tolerance: float) -> None:
    """NTPS within 1e-4, the others within the tolerance, at every layer and fraction."""
    for a, b in zip(one, other, strict=True):
        assert (a.rank_u, a.rank_v, a.rank_label) == (b.rank_u, b.rank_v, b.rank_label)
        for name in SCORES:
            difference = (a.scores[name] - b.scores[name]).abs().max()
            assert difference < (1e-4 if name == "ntps" else tolerance), (name, a.layer, difference)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return sweep_all(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_scores_of_the_embedded_model_equal_the_reference(tiny):
    fractions = K_sweep.Config().fractions
    for moments, layer in zip(*tiny, strict=True):
        expected = [K_sweep.ntps_reference(moments, fraction) for fraction in fractions[::6]]
        np.testing.assert_allclose(layer.scores["ntps"][::6], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"tokens_per_batch": 256}, 1e-4), ({"product_dtype": "float64"}, 1e-4), ({"product_dtype": "bfloat16x2"}, 2e-4)],
)
def test_score_does_not_depend_on_how_it_is_computed(tiny, options, tolerance, tmp_path, monkeypatch):
    if "tokens_per_batch" in options:  # in another order, too
        monkeypatch.setattr(cache, "load_texts", shuffled_texts)
    assert_equal_scores(tiny[1], sweep_all(tmp_path, **options)[1], tolerance)


def test_from_texts_to_json_and_picture(names, tmp_path, monkeypatch, capsys):
    """Runs the commands that a user types."""
    for script in (["cache.py", "--split", "test"], ["cache.py"], ["K_sweep.py"]):
        assert run_in_process(monkeypatch, *script, *flags(names | {"results_dir": tmp_path})) == 0
    path, content = only_result(tmp_path, "ntps/random-qwen2/rows.json")
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(path)
    assert len(content["layers"]) == 3 and content["num_samples"] == 168 and content["num_classes"] == 3
    for layer in content["layers"]:
        for name in (*SCORES, "chance", "excess_loss", "excess_lower", "excess_upper"):
            assert len(layer[name]) == len(content["fractions"]) == 19
        assert set(layer["null"]) == {"ntps_label", "ntps_whitened", "retained"}
        assert 0 <= layer["probe_r2"] <= 1 and layer["probe_r2_held_out"] is not None
    assert content["score"]["retained"]["value"] == pytest.approx(np.mean(content["layers"][-1]["retained"]))
    assert path.with_suffix(".png").stat().st_size > 10_000 and path.with_suffix(".pdf").is_file()


def held_out_of(result: dict) -> list:
    return [layer["probe_r2_held_out"] for layer in result["layers"]]


def test_held_out_numbers_come_and_go_with_their_moments(names, tmp_path, capsys):
    """A stored result is made again, and not stale, after held-out moments were added, removed or of other rows."""
    (folder := tmp_path / "rows").mkdir()
    shared = names | {"dataset_name": str(folder), "results_dir": tmp_path / "results"}

    def write(split, seed):
        write_rows(folder / f"{split}.jsonl", [{"text": t, "label": i % 3} for i, t in enumerate(make_texts(60, seed))])

    def make(split, **options):
        cache.main(configure(cache, **shared, split=split, dtype="bfloat16", **options))

    write("train", 0)
    write("test", 1)
    make("train")
    config = configure(K_sweep, **shared, picture=False, num_null_draws=2)
    without = K_sweep.main(config)
    assert held_out_of(without) == [None] * 3 and without["held_out"] is None
    make("test")
    found = K_sweep.main(config)
    assert found["config"]["dtype"] == "bfloat16"  # that of the moments
    assert None not in held_out_of(found) and "made again" in capsys.readouterr().out
    assert K_sweep.main(config) == found and "made again" not in capsys.readouterr().out
    write("test", 2)
    with pytest.raises(UserError, match=r"test\.safetensors was made from other rows.*--overwrite"):
        K_sweep.main(config)
    make("test", overwrite=True)
    assert None not in held_out_of(K_sweep.main(config)) and held_out_of(K_sweep.main(config)) != held_out_of(found)
    [test] = config.run.results_dir.glob("moments/*/*/test.safetensors")
    test.unlink()
    assert held_out_of(K_sweep.main(config)) == [None] * 3
    of_copy = with_values(config, dataset_name=str(shutil.copytree(folder, tmp_path / "copy" / "rows")))
    write("train", 3)
    with pytest.raises(UserError, match=r"train\.safetensors was made from other rows"):
        K_sweep.main(config)
    make("train", overwrite=True)
    with pytest.raises(UserError, match=r"other moments.*--overwrite"):
        K_sweep.main(config)
    with pytest.raises(UserError, match="made from other rows"):  # of another folder of the same name
        K_sweep.main(of_copy)


@pytest.mark.parametrize(
    ("change", "said"), [("seed", "seed: 1 there, 0 now"), ("weights", "other weights of the model")]
)
def test_held_out_moments_of_other_settings_are_left_out_with_a_sentence(names, tmp_path, capsys, change, said):
    """Scores are those without held-out moments."""
    model = shutil.copytree(names["model_name"], tmp_path / "model")
    names = names | {"model_name": str(model), "results_dir": tmp_path / "mine"}
    cache.main(configure(cache, **names, split="test", seed=int(change == "seed")))
    if change == "weights":
        retrain(model)
    cache.main(configure(cache, **names))
    config = configure(K_sweep, **names, picture=False, num_null_draws=2)
    assert held_out_of(K_sweep.main(config)) == [None] * 3
    told = capsys.readouterr().out
    assert "No held-out numbers: " in told and said in told
    assert "Run cache.py anew with --split test --overwrite." in told


def test_missing_moments_name_the_script_that_makes_them(tmp_path):
    wanted = {"model_name": "tiny+lora", "dataset_name": "docstrings/kind", "results_dir": tmp_path}
    with pytest.raises(UserError, match=r"No moments at .*train\.safetensors. Run cache\.py .*--adapter_dir"):
        K_sweep.main(configure(K_sweep, **wanted))


def test_targets_that_are_all_equal_have_no_score(names, tmp_path):
    """The train split still has scores, because the test split only judges the probe."""
    (folder := tmp_path / "numbers").mkdir()
    for split, spread in (("train", 0.1), ("test", 0.0)):
        rows = [{"text": text, "label": 0.1 + spread * (i % 7)} for i, text in enumerate(make_texts(40))]
        write_rows(folder / f"{split}.jsonl", rows)
    shared = names | {"dataset_name": str(folder), "results_dir": tmp_path / "results"}
    cache.main(configure(cache, **shared, split="test"))
    with pytest.raises(UserError, match=r"labels of .*test.safetensors are all equal. Change --split"):
        K_sweep.main(configure(K_sweep, **shared, split="test", picture=False))
    cache.main(configure(cache, **shared))
    K_sweep.main(configure(K_sweep, **shared, picture=False))
