"""benchmarks/bench_gpu.py on the CPU with a decoder small enough: its models, its table and what it says of memory."""

import json

import torch

from benchmarks import bench_gpu
from benchmarks.bench_products import Decoder
from tests.conftest import configure

TINY = Decoder(hidden_size=64, num_layers=2, queries=64, keys=64, intermediate_size=96)


def test_ratios_and_errors_of_a_tiny_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench_gpu.DECODERS, "Qwen2-0.5B", TINY)
    monkeypatch.setitem(bench_gpu.VOCABULARY, "Qwen2-0.5B", 500)
    options = {"num_texts": 80, "mean_length": 12, "tokens_per_batch": 128, "num_rounds": 1, "dtype": "float32"}
    config = configure(bench_gpu, models=("Qwen2-0.5B",), device="cpu", results_dir=tmp_path, **options)
    bench_gpu.main(config)
    path = tmp_path / "benchmarks" / "bench_gpu.json"
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(path) and "Qwen2-0.5B    tf32x3" in out
    [row] = json.loads(path.read_text())["rows"]
    assert list(row["precisions"]) == ["float32", "float64", "tf32", "tf32x3"] and 80 * 6 < row["num_tokens"] < 80 * 19
    scores = {precision: found["scores"] for precision, found in row["precisions"].items()}
    for name, exact in scores["float64"].items():
        assert 0 < exact < 1 and abs(scores["float32"][name] - exact) < 1e-3
    assert scores["tf32"] != scores["float64"], "each precision is one of its own"


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
