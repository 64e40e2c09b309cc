"""Sums that do not fit are refused; layers can be left out, and sums or weights put elsewhere."""

from types import SimpleNamespace

import pytest
import torch

import alignment_vis
import cache
import K_sweep
from tests.conftest import configure, load_moments
from utils.algebra.products import position_weights
from utils.script import UserError
from utils.settings import with_values


def settings(model_dirs, rows_path, folder, **more):
    names = {"model_name": str(model_dirs["llama"]), "dataset_name": str(rows_path), "results_dir": folder}
    return configure(cache, **names, **{"tokens_per_batch": 128} | more)


def moments(folder) -> dict[str, torch.Tensor]:
    [path] = [path for path in folder.rglob("train.safetensors") if "moments" in path.parts]
    return load_moments(path)


def test_sums_that_do_not_fit_are_refused_before_they_are_allocated(model_dirs, rows_path, tmp_path, monkeypatch):
    memory = type("Memory", (), {"available": 10_000})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    with pytest.raises(UserError, match=r"sums of the pass need 0.0 GB; cpu has 0.0 GB free. Run cache.py with fewer"):
        cache.main(settings(model_dirs, rows_path, tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))
    d, c, folds = 32, 3, 5
    shared = 2 * d * d + 3 * d + 8 * d  # C0, C1, their means, |s_T|^2, errors
    pooled = d * d + d * c + 2 * d + 1
    expected = 8 * (4 * shared + (3 + folds) * pooled)  # four layers, folds of the last
    memory.available = expected
    cache.main(settings(model_dirs, rows_path, tmp_path, product_dtype="float64"))
    memory.available = expected - 1
    with pytest.raises(UserError, match="sums of the pass need"):
        cache.main(settings(model_dirs, rows_path, tmp_path, product_dtype="float64", overwrite=True))


def on_mps(numbers: torch.Tensor) -> SimpleNamespace:
    """A tensor on a device without float64: it can move to the CPU, and nothing else."""
    return SimpleNamespace(to={torch.device("cpu"): numbers}.__getitem__)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_nothing_in_float64_is_made_on_a_device_without_it(precision):
    x, lengths, y = torch.randn(3, 5, 8), torch.tensor([5, 4, 1]), torch.eye(3, dtype=torch.float64)
    plain, moved = (
        cache.LayerSums((8, 3, 2), torch.device(name), precision, "mean", on_host=False) for name in ("cpu", "mps")
    )
    batch = (x, lengths, position_weights(lengths, 5), y, torch.tensor([0, 1, 1]))
    plain.add(*batch)
    moved.add(*map(on_mps, batch))
    assert moved.device.type == "cpu"
    assert all(torch.equal(plain.sums[name], value) for name, value in moved.sums.items())


def test_some_layers_are_those_of_all(model_dirs, rows_path, tmp_path):
    whole, some = (settings(model_dirs, rows_path, tmp_path / name, folds="all") for name in ("whole", "some"))
    cache.main(whole)
    cache.main(with_values(some, layers=(-1, 1)))
    expected, found = moments(tmp_path / "whole"), moments(tmp_path / "some")
    for name, value in expected.items():
        of_layers = name not in ("labels", "folds", "label_mean", "label_second_moment", "fold_num_samples")
        of_layers &= "fold_label" not in name
        assert torch.equal(found[name], value[[1, 3]] if of_layers else value), name
    scores = [K_sweep.main(K_sweep.Config(model=c.model, data=c.data, run=c.run)) for c in (whole, some)]
    assert scores[0]["layers"][3] == scores[1]["layers"][1] and scores[0]["score"] == scores[1]["score"]
    cache.main(some)  # all layers are asked for: made again
    assert all(torch.equal(moments(tmp_path / "some")[name], value) for name, value in expected.items())


def test_a_layer_that_is_not_kept_is_refused_with_the_flag_that_keeps_it(model_dirs, rows_path, tmp_path):
    config = settings(model_dirs, rows_path, tmp_path, layers=(0, 1))
    cache.main(config)
    groups = {"model": config.model, "data": config.data, "run": config.run}
    with pytest.raises(UserError, match=r"hold layer 0 1, not 3. Run cache.py with --layers 0 1 3"):
        K_sweep.main(K_sweep.Config(**groups))
    with pytest.raises(UserError, match=r"hold layer 0 1, not 2"):
        alignment_vis.main(alignment_vis.Config(**groups, layer=2, words=("a=red,small", "b=green,large")))
    with pytest.raises(UserError, match=r"no layer 4: the model has layers 0 to 3"):
        cache.main(with_values(config, layers=(4,)))
    with pytest.raises(ValueError, match="--save_pooled keeps the last layer, or all of them"):
        with_values(config, layers=(1,), save_pooled="all")


@pytest.mark.parametrize("options", [{"accumulate_on": "cpu"}, {"device_map": "auto"}, {"device_map": "disk"}])
def test_another_place_changes_no_number(model_dirs, rows_path, tmp_path, monkeypatch, options):
    plain, other = (settings(model_dirs, rows_path, tmp_path / n, product_dtype="float64") for n in ("plain", "other"))
    cache.main(plain)
    if options == {"device_map": "disk"}:
        monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda *_, **__: {"cpu": 90_000})
        options = {"device_map": "auto"}
    cache.main(with_values(other, **options))
    expected, found = moments(tmp_path / "plain"), moments(tmp_path / "other")
    for name, value in expected.items():
        scale = expected["prefix_second_moment"].abs().amax() if name.endswith("_error") else value.abs().amax()
        assert ((found[name] - value).abs() <= 1e-12 * scale).all(), name
