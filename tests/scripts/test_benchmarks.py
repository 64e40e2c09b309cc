"""The benchmarks, as far as their numbers rest on the models and texts that they make."""

import pytest
import torch

from benchmarks import bench_cache, bench_k_sweep, bench_scale, bench_training, harness
from tests.conftest import configure, only_result


def test_ratios_of_a_small_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(harness.DECODERS, "Qwen2-0.5B", ("qwen2", (64, 2, 2, 1, 96), 8192))
    options = {"num_texts": 80, "mean_length": 12, "tokens_per_batch": 128, "num_rounds": 1}
    options |= {"random_models": ("Qwen2-0.5B",), "product_dtypes": ("float32", "bfloat16x2"), "num_dense_rounds": 1}
    bench_cache.main(configure(bench_cache, results_dir=tmp_path, **options))
    path, table = only_result(tmp_path, "benchmarks/bench_cache.json")
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    [row] = table["rows"]
    assert list(row["seconds"]) == ["forward", "float32", "bfloat16x2", "dense"]
    assert row["over_forward"]["forward"] == 1 and 1 <= row["padding"] < 1.5 and 80 * 6 < row["num_tokens"] < 80 * 19


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("Qwen2-0.5B", 494e6), ("Qwen2-7B", 7.07e9), ("Llama-3-8B", 7.50e9), ("SmolLM2-135M", 134.5e6)],
)
def test_models_have_the_sizes_of_the_papers(name, num_parameters):
    """Parameters of the decoders, from their configurations; embeddings once, as a base model has them."""
    model = harness.random_model(name, "bfloat16", torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(num_parameters, rel=0.01)


def test_a_layer_is_compared_with_three_decompositions(tmp_path):
    bench_k_sweep.main(configure(bench_k_sweep, hidden_sizes=(16,), num_rounds=1, results_dir=tmp_path))
    [row] = only_result(tmp_path, "benchmarks/bench_k_sweep.json")[1]["rows"]
    assert row["ratio"] == pytest.approx(row["seconds"]["layer"][0] / row["seconds"]["eigh"][0])


def test_texts_of_the_scale_benchmark_have_as_many_tokens_as_words(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_scale, "in_own_process", harness.measured)
    monkeypatch.setattr(bench_scale, "SIZES", ((4, 16), (8, 16), (2, 2048)))
    bench_scale.main(configure(bench_scale, results_dir=tmp_path))
    rows = only_result(tmp_path, "benchmarks/bench_scale.json")[1]["rows"]
    assert [row["num_tokens"] for row in rows] == [64, 128, 4096] and all(row["peak_mb"] > 100 for row in rows)


def test_training_is_compared_with_a_plain_loop(names, tmp_path):
    options = {"max_length": 64, "num_steps": 1, "num_rounds": 1, "results_dir": tmp_path}
    bench_training.main(configure(bench_training, **names, **options))
    _, table = only_result(tmp_path, "benchmarks/bench_training.*.lora.json")
    ours, plain = table["ours"], table["plain"]
    assert table["ratio"] == {name: pytest.approx(ours[name] / plain[name]) for name in ours}
    assert 0 < ours["peak_bytes"] < plain["peak_bytes"]
