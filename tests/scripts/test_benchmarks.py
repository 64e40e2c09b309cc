"""The benchmarks, as far as their numbers rest on the models and texts that they make."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import bench_cache, bench_k_sweep, bench_scale, harness
from tests.conftest import configure
from utils.data.load import load_texts
from utils.models.load import load_config, load_tokenizer
from utils.models.tokens import tokenize
from utils.settings import Data, Model, Run


def test_ratios_of_a_small_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(harness.DECODERS, "Qwen2-0.5B", ("qwen2", 64, 2, 2, 1, 96, 8192))
    options = {"num_texts": 80, "mean_length": 12, "tokens_per_batch": 128, "num_rounds": 1, "other_batches": (64,)}
    options |= {"random_models": ("Qwen2-0.5B",), "product_dtypes": ("float32", "float64")}
    bench_cache.main(configure(bench_cache, results_dir=tmp_path, **options))
    path = tmp_path / "benchmarks" / "bench_cache.json"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    [row] = json.loads(path.read_text())["rows"]
    assert list(row["seconds"]) == ["forward", "float32", "float64", "batches of 64", "dense"]
    assert row["over_forward"]["forward"] == 1 and 1 <= row["padding"] < 1.5 and 80 * 6 < row["num_tokens"] < 80 * 19


def test_dense_formula_is_the_definition(monkeypatch):
    """One text of three tokens: C0 = s1 s1' + s2 s2', C1 = s1 x2' + s2 x3', M = m m'."""
    monkeypatch.setitem(harness.DECODERS, "small", ("llama", 16, 1, 2, 1, 32, 8192))
    model = harness.random_model("small", "float32", torch.device("cpu"))
    tokens, labels, _ = harness.random_texts(1, 3)
    totals = bench_cache.dense_formula(model, tokens, torch.eye(6)[labels.labels])
    with torch.no_grad():
        states = model(input_ids=tokens.pad(np.array([0]))[0], output_hidden_states=True).hidden_states
    for total, (x,) in zip(totals, states, strict=True):
        s = x.cumsum(0)
        torch.testing.assert_close(total["M"], torch.outer(x.mean(0), x.mean(0)))
        torch.testing.assert_close(total["C0"], s[:-1].T @ s[:-1])
        torch.testing.assert_close(total["C1"], s[:-1].T @ x[1:])


def test_models_have_the_sizes_of_the_papers():
    """Parameters of the decoders, from their configurations; embeddings once, as a base model has them."""
    for name, expected in (
        ("Qwen2-0.5B", 494e6),
        ("Qwen2-7B", 7.07e9),
        ("Llama-3-8B", 7.50e9),
        ("SmolLM2-135M", 134.5e6),
    ):
        model = harness.random_model(name, "bfloat16", torch.device("meta"))
        assert abs(sum(parameter.numel() for parameter in model.parameters()) / expected - 1) < 0.01, name


def test_a_layer_is_compared_with_three_decompositions(tmp_path):
    bench_k_sweep.main(configure(bench_k_sweep, hidden_sizes=(16,), num_rounds=1, results_dir=tmp_path))
    [row] = json.loads((tmp_path / "benchmarks" / "bench_k_sweep.json").read_text())["rows"]
    assert row["ratio"] == pytest.approx(row["seconds"]["layer"][0] / row["seconds"]["eigh"][0])
    assert row["ratio_with_closed_form"] > row["ratio"]


@pytest.mark.parametrize("length", [16, 2048])
def test_a_text_of_the_scale_benchmark_has_as_many_tokens_as_asked_for(tmp_path, length):
    model, data = Model(str(tmp_path / "model")), tmp_path / "rows.jsonl"
    bench_scale.make_rows(data, bench_scale.make_model(tmp_path / "model"), 5, length)
    texts = load_texts(Data(str(data)), Run(), "all").texts
    config = load_config(model, Run())
    assert tokenize(texts, load_tokenizer(model, Run(), config), config).lengths.tolist() == [length] * 5


def test_claims_of_the_scale_benchmark():
    """Ten times the texts in ten times the time, but for the start; half a kilobyte a text; long texts as fast."""
    rows = [
        {"series": series, "num_samples": n, "length": length, "num_tokens": n * length}
        for series, points in {
            "texts": [(1000, 10), (10_000, 10), (100_000, 10)],
            "length": [(640, 10), (64, 100)],
        }.items()
        for n, length in points
    ]
    table = pd.DataFrame(rows)
    table["seconds"], table["peak_mb"] = 5 + table["num_tokens"] / 1e4, 500 + table["num_samples"] / 2048
    said = bench_scale.summarize(table)
    assert said["seconds_per_added_token_last_over_first"] == pytest.approx(1)
    assert said["kilobytes_per_added_text"] == pytest.approx(0.5)
    assert said["seconds_longest_over_shortest_texts"] == pytest.approx(1)
    assert said["peak_memory_most_over_fewest_texts"] == pytest.approx((500 + 100_000 / 2048) / (500 + 1000 / 2048))
