"""K_sweep.py through its command line: results, their identity, held-out numbers, and mistakes in one sentence."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cache
import K_sweep
from tests.conftest import configure, make_texts, retrain, run_in_process, write_rows
from utils.algebra.moments import load_layer
from utils.algebra.scores import SCORES
from utils.data.load import load_texts
from utils.results import open_tensors
from utils.script import UserError, parse
from utils.settings import with_values

CPU = torch.device("cpu")


def test_only_options_other_than_the_default_stand_in_the_name():
    def name(**options):
        return K_sweep.output_path(configure(K_sweep, dataset_name="docstrings/kind", **options)).as_posix()

    folder = "results/ntps/tiny/docstrings__kind"
    assert name() == name(subspace="autoregression") == f"{folder}.json"
    assert name(subspace="pca") == f"{folder}.pca.json"
    assert name(subspace="random", split="test", center=True) == f"{folder}.test.random.centered.json"
    assert name(eigenvectors="smallest") == f"{folder}.smallest.json"
    assert name(coordinates="standardized") == f"{folder}.standardized.json"


# ------------------------------------------------------------------ the embedded model, and the command line
def shuffled_texts(settings, run, split):
    """The texts of `load_texts` in another order."""
    data = load_texts(settings, run, split)
    order = np.random.default_rng(1).permutation(len(data.texts))
    return dataclasses.replace(data, texts=[data.texts[i] for i in order], labels=data.labels[order])


@pytest.fixture(scope="module")
def tiny_results(tmp_path_factory):
    """cache.py on one docstring task with the embedded model, 1,500 texts, under four ways of computing the same."""
    ways = {
        "reference": {},
        "small batches": {"tokens_per_batch": 256},
        "float64 products": {"product_dtype": "float64"},
        "shuffled texts": {},
    }
    results = {}
    for way, options in ways.items():
        folder = tmp_path_factory.mktemp("tiny")
        config = configure(cache, dataset_name="docstrings/kind", max_samples=1500, results_dir=folder, **options)
        with pytest.MonkeyPatch.context() as patch:
            if way == "shuffled texts":
                patch.setattr(cache, "load_texts", shuffled_texts)
            cache.main(config)
        [results[way]] = folder.glob("moments/*/*/train.safetensors")
    return results


def sweep_all(path) -> tuple[list, list]:
    with open_tensors(path) as (file, metadata):
        layers = [load_layer(file, metadata, layer, CPU) for layer in metadata["layers"]]
    config = K_sweep.Config(num_null_draws=2)
    return layers, [K_sweep.sweep_layer(moments, None, config, i) for i, moments in enumerate(layers)]


@pytest.mark.slow
def test_scores_of_the_embedded_model_equal_the_reference_and_excess_lies_within_its_bounds(tiny_results):
    layers, found = sweep_all(tiny_results["reference"])
    fractions = K_sweep.Config().fractions
    for moments, layer in zip(layers, found, strict=True):
        expected = [K_sweep.ntps_reference(moments, fraction) for fraction in fractions[::6]]
        np.testing.assert_allclose(layer.scores["ntps"][::6], expected, atol=1e-6)
        excess, slack = layer.scores["excess_loss"], 1e-9
        for form in ("", "_euclidean"):
            assert torch.all(layer.scores[f"excess_lower{form}"] <= excess + slack), layer.layer
            assert torch.all(excess <= layer.scores[f"excess_upper{form}"] + slack), layer.layer
        assert torch.all(excess[:-1] - excess[1:] >= -slack)  # a larger V never loses more


@pytest.mark.slow
@pytest.mark.parametrize("way", ["small batches", "float64 products", "shuffled texts"])
def test_score_does_not_depend_on_how_it_is_computed(tiny_results, way):
    reference, other = sweep_all(tiny_results["reference"])[1], sweep_all(tiny_results[way])[1]
    for a, b in zip(reference, other, strict=True):
        assert (a.rank_u, a.rank_v, a.rank_label) == (b.rank_u, b.rank_v, b.rank_label)
        for name in SCORES:
            assert (a.scores[name] - b.scores[name]).abs().max() < 1e-4, (name, a.layer)


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
    """Of a copy of `cached`."""
    return cached | {"results_dir": shutil.copytree(cached["results_dir"], tmp_path / "results")}


def test_from_moments_to_json_and_picture(names, monkeypatch, capsys):
    call = [word for name, value in names.items() for word in (f"--{name}", value)]
    assert run_in_process(monkeypatch, "K_sweep.py", *call) == 0
    path = names["results_dir"] / "ntps" / Path(names["model_name"]).name / "rows.json"
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(path)
    content = json.loads(path.read_text())
    assert len(content["layers"]) == 3 and content["num_samples"] == 168 and content["num_classes"] == 3
    for layer in content["layers"]:
        for name in (*SCORES, "chance", "excess_loss", "excess_lower", "excess_upper"):
            assert len(layer[name]) == len(content["fractions"]) == 19
        assert set(layer["null"]) == {"ntps_label", "ntps_whitened", "retained"}
        assert 0 <= layer["probe_r2"] <= 1 and layer["probe_r2_held_out"] is not None
    value = np.mean(content["layers"][-1]["retained"])
    assert content["score"]["retained"]["value"] == pytest.approx(value)
    assert path.with_suffix(".png").stat().st_size > 10_000 and path.with_suffix(".pdf").is_file()


def test_settings_left_at_their_default_are_those_of_the_moments(names):
    result = K_sweep.main(configure(K_sweep, **names, picture=False, num_null_draws=2))
    assert result["config"]["dtype"] == "bfloat16"
    with pytest.raises(UserError, match=r"dtype: 'bfloat16' there, 'float16' now"):
        K_sweep.main(configure(K_sweep, **names, picture=False, dtype="float16"))
    with pytest.raises(UserError, match=r"max_samples: None there, 20 now"):
        K_sweep.main(configure(K_sweep, **names, picture=False, max_samples=20))


def test_results_are_reused_refused_and_kept_apart(names, monkeypatch):
    config = configure(K_sweep, **names, picture=False, num_null_draws=2)
    first, solve = K_sweep.main(config), K_sweep.sweep_layer

    def no_work(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(K_sweep, "sweep_layer", no_work)
    assert K_sweep.main(config) == first
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        K_sweep.main(with_values(config, seed=1))
    monkeypatch.setattr(K_sweep, "sweep_layer", solve)
    K_sweep.main(with_values(config, eigenvectors="smallest", center=True))
    folder = names["results_dir"] / "ntps" / Path(names["model_name"]).name
    assert sorted(path.name for path in folder.iterdir()) == ["rows.json", "rows.smallest.centered.json"]
    cache.main(configure(cache, **names, dtype="bfloat16", pooling="last", overwrite=True))
    with pytest.raises(UserError, match=r"other moments.*--overwrite"):
        K_sweep.main(config)


# ------------------------------------------------------------------ held-out numbers
def held_out_of(result: dict) -> list:
    return [layer["probe_r2_held_out"] for layer in result["layers"]]


def test_held_out_numbers_come_and_go_with_their_moments(names, capsys):
    """A result that is stored is made again, not refused and not stale, where held-out moments have come or gone."""
    config = configure(K_sweep, **names, picture=False, num_null_draws=2)
    test = next(names["results_dir"].glob("moments/*/*/test.safetensors"))
    away = test.rename(names["results_dir"] / "away.safetensors")
    without = K_sweep.main(config)
    assert held_out_of(without) == [None] * 3 and without["held_out"] is None
    away.rename(test)
    found = K_sweep.main(config)
    assert None not in held_out_of(found) and "no held-out numbers yet: made again" in capsys.readouterr().out
    assert K_sweep.main(config) == found and "made again" not in capsys.readouterr().out
    test.unlink()
    assert held_out_of(K_sweep.main(config)) == [None] * 3
    assert "held-out numbers of moments that are gone: made again" in capsys.readouterr().out


def test_held_out_moments_of_other_rows_are_refused(names, tmp_path):
    """Same settings, same classes, same model: only the fingerprint of the rows tells them apart."""
    rows = Path(shutil.copy(names["dataset_name"], tmp_path / "rows.jsonl"))
    names = names | {"dataset_name": str(rows), "results_dir": tmp_path / "mine"}
    for split in ("train", "test"):
        cache.main(configure(cache, **names, split=split))
    config = configure(K_sweep, **names, picture=False, num_null_draws=2)
    K_sweep.main(config)
    changed = [json.loads(line) for line in rows.read_text().splitlines()]
    write_rows(rows, [row | {"text": row["text"] + " again"} for row in changed])
    cache.main(configure(cache, **names, split="test", overwrite=True))
    with pytest.raises(UserError, match=r"other moments of the held-out split.*--overwrite"):
        K_sweep.main(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed: 1 there, 0 now"),
        ({"pooling": "last"}, "pooling: 'last' there, 'mean' now"),
        ({"max_length": 5}, "max_length: 5 there, None now"),
        ({"label_column": "other"}, "label_column: 'other' there, 'label' now"),
    ],
)
def test_held_out_moments_of_other_settings_are_left_out_with_a_sentence(names, tmp_path, capsys, change, said):
    """As they would be without any; the command in the sentence makes the right ones."""
    old = [json.loads(line) for line in Path(names["dataset_name"]).read_text().splitlines()]
    rows = write_rows(tmp_path / "two.jsonl", [row | {"other": f"kind {i % 4}"} for i, row in enumerate(old)])
    names = names | {"dataset_name": str(rows), "results_dir": tmp_path / "mine"}
    cache.main(configure(cache, **names, label_column="label"))
    cache.main(configure(cache, **({**names, "label_column": "label", "split": "test"} | change)))
    config = configure(K_sweep, **names, picture=False, num_null_draws=2)
    assert held_out_of(K_sweep.main(config)) == [None] * 3
    told = capsys.readouterr().out
    assert "No held-out numbers: " in told and said in told and "Run: python cache.py " in told
    command = shlex.split(told.split("Run: python ")[1].splitlines()[0])
    assert parse(cache.Config, command[1:]).split == "test"
    cache.main(parse(cache.Config, command[1:]))
    assert None not in held_out_of(K_sweep.main(config))


# ------------------------------------------------------------------ identity and mistakes
def test_a_retrained_model_is_noticed(names, model_dirs, tmp_path, capsys):
    folder = shutil.copytree(model_dirs["qwen2"], tmp_path / "model")
    names = names | {"model_name": str(folder)}
    cache.main(configure(cache, **names))
    config = configure(K_sweep, **names, picture=False, num_null_draws=2)
    K_sweep.main(config)
    retrain(folder)
    with pytest.raises(UserError, match="other weights of the model"):
        K_sweep.main(config)
    cache.main(configure(cache, **names, split="test"))
    shutil.rmtree(folder)  # moments are solved without the model, where it is not there
    folder.mkdir()
    assert held_out_of(K_sweep.main(with_values(config, overwrite=True))) == [None] * 3
    assert "was made with other weights of the model. Run: python cache.py" in capsys.readouterr().out


def test_missing_moments_name_a_command_that_makes_them(tmp_path):
    """The name of an adapted model is of a folder of results; cache.py takes the model and its adapter."""
    wanted = {"model_name": "tiny+lora", "dataset_name": "docstrings/kind", "max_samples": 90, "split": "test"}
    with pytest.raises(UserError, match=r"No moments at .*Run: python cache\.py ") as raised:
        K_sweep.main(configure(K_sweep, **wanted, results_dir=tmp_path))
    script, *arguments = shlex.split(str(raised.value).split("Run: python ")[1])
    assert script == "cache.py"
    adapter = tmp_path / "lora" / "tiny" / "docstrings__kind" / "adapter"
    expected = wanted | {"model_name": "tiny", "adapter_dir": adapter, "results_dir": tmp_path}
    parsed = parse(cache.Config, arguments)
    assert parsed == configure(cache, **expected)
    assert str(cache.config_path(parsed)) in str(raised.value)  # where K_sweep.py looked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fractions", "0.5", "1.5"], r"--fractions must be in (0, 1]"),
        (["--num_null_draws", "1"], "--num_null_draws and --num_random_draws must be at least 2"),
        (["--device", "gpu9"], "--device gpu9 cannot be used here"),
    ],
)
def test_mistakes_end_in_one_sentence(options, message, tmp_path, monkeypatch, capsys):
    code, printed = run_in_process(monkeypatch, "K_sweep.py", *options, "--results_dir", tmp_path), capsys.readouterr()
    assert code == 2 or code.startswith("error: ")
    assert message in " ".join(f"{code} {printed.err} {printed.out}".replace("│", " ").split())
    assert not any(tmp_path.iterdir())  # before a pass through the model


def test_test_targets_that_are_all_equal_have_no_score(model_dirs, tmp_path, monkeypatch):
    """They do for the train split, where the test split only judges the probe."""
    folder = tmp_path / "numbers"
    folder.mkdir()
    for split, spread in (("train", 0.1), ("test", 0.0)):
        rows = [{"text": text, "label": 0.1 + spread * (i % 7)} for i, text in enumerate(make_texts(40))]
        write_rows(folder / f"{split}.jsonl", rows)
    shared = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(folder), "results_dir": tmp_path / "results"}
    for split in ("train", "test"):
        cache.main(configure(cache, **shared, split=split))
    arguments = [word for name, value in shared.items() for word in (f"--{name}", value)]
    message = run_in_process(monkeypatch, "K_sweep.py", *arguments, "--split", "test", "--no_picture")
    assert message.startswith("error: The labels of ") and "test.safetensors are all equal. See --split" in message
    assert run_in_process(monkeypatch, "K_sweep.py", *arguments, "--no_picture") == 0
