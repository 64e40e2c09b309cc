"""benchmarks/bench_gpu.py and bench_scale.py, as far as their numbers rest on what they make."""

import json

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from benchmarks import bench_gpu, bench_scale
from benchmarks.bench_products import Decoder
from tests.conftest import configure
from utils.data.load import load_texts
from utils.models.identity import load_config
from utils.models.load import load_tokenizer, tokenize
from utils.settings import Data, Model, Run

TINY = Decoder(hidden_size=64, num_layers=2, queries=64, keys=64, intermediate_size=96)


def test_ratios_and_errors_of_a_tiny_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench_gpu.DECODERS, "Qwen2-0.5B", TINY)
    monkeypatch.setitem(bench_gpu.VOCABULARY, "Qwen2-0.5B", 8192)
    options = {"num_texts": 80, "mean_length": 12, "tokens_per_batch": 128, "num_rounds": 1, "dtype": "float32"}
    config = configure(bench_gpu, models=("Qwen2-0.5B",), device="cpu", results_dir=tmp_path, **options)
    bench_gpu.main(config)
    path = tmp_path / "benchmarks" / "bench_gpu.json"
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(path) and "Qwen2-0.5B    bfloat16x2" in out
    [row] = json.loads(path.read_text())["rows"]
    assert list(row["precisions"]) == ["float32", "float64", "bfloat16x2"] and 80 * 6 < row["num_tokens"] < 80 * 19
    scores = {precision: found["scores"] for precision, found in row["precisions"].items()}
    for name, exact in scores["float64"].items():
        assert 0 < exact < 1 and abs(scores["float32"][name] - exact) < 1e-3
    assert scores["bfloat16x2"] != scores["float64"], "each precision is one of its own"


def test_models_have_the_sizes_of_the_papers(monkeypatch):
    """Parameters of the decoders, from their configurations; embeddings once, as a base model has them."""
    for name, expected in (
        ("Qwen2-0.5B", 494e6),
        ("Qwen2-7B", 7.07e9),
        ("Llama-3-8B", 7.50e9),
        ("SmolLM2-135M", 134.5e6),
    ):
        with torch.device("meta"):
            model = bench_gpu.make_model(name, "bfloat16", torch.device("meta"))
        assert abs(sum(parameter.numel() for parameter in model.parameters()) / expected - 1) < 0.01, name


@pytest.mark.parametrize("length", [16, 2048])
def test_a_text_of_the_scale_benchmark_has_as_many_tokens_as_asked_for(tmp_path, length):
    model, data = bench_scale.make_model(tmp_path, 64), bench_scale.make_rows(tmp_path, 5, length)
    texts = load_texts(Data(data), Run(), "all").texts
    config = load_config(Model(model), Run())
    assert tokenize(texts, load_tokenizer(Model(model), Run(), config), config).lengths.tolist() == [length] * 5


def test_what_the_scale_benchmark_says():
    """Ten times the texts in ten times the time, but for the start; half a kilobyte a text; long texts as fast."""
    rows = [
        {"series": series, "num_samples": n, "length": length, "hidden_size": d, "num_tokens": n * length}
        for series, points in {
            "texts": [(1000, 10, 64), (10_000, 10, 64), (100_000, 10, 64)],
            "length": [(640, 10, 64), (64, 100, 64)],
            "width": [(1000, 10, 64), (1000, 10, 128)],
        }.items()
        for n, length, d in points
    ]
    table = pd.DataFrame(rows)
    table["seconds"], table["peak_mb"] = 5 + table["num_tokens"] / 1e4, 500 + table["num_samples"] / 2048
    said = bench_scale.summarize(table)
    assert said["seconds_per_added_token_last_over_first"] == pytest.approx(1)
    assert said["kilobytes_per_added_text"] == pytest.approx(0.5)
    assert said["seconds_longest_over_shortest_texts"] == pytest.approx(1)
    assert said["peak_memory_most_over_fewest_texts"] == pytest.approx((500 + 100_000 / 2048) / (500 + 1000 / 2048))
    figure = bench_scale.plot(table)
    [line] = figure.axes[0].lines
    assert line.get_ydata().tolist() == pytest.approx([600, 150, 105])  # microseconds for a token
    plt.close(figure)
