"""What each precision of the products costs in NTPS, measured, and in time on a GPU, counted.

    python -m benchmarks.bench_products
    python -m benchmarks.bench_products --model_name smollm2 --dataset_name rotten_tomatoes --max_samples 200

Error: cache.py and K_sweep.py once for each precision, on the CPU, where products of bfloat16 numbers are exact and
added up in float32, as on tensor cores; the largest difference from float64 products over all layers.

Time: operations and bytes per token of the forward pass in bfloat16 and of cache.py's sums beside it; their ratio if
each ran at the peak of its kind. The peaks are those of an H100 SXM without sparsity, from its data sheet. On a CPU
all operations run at one peak: there the same count says 1.16 for SmolLM2, as measured (docs/speed.md).

Writes results/benchmarks/bench_products.json.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple, get_args

import cache
import K_sweep
from utils.algebra.products import NUM_STRIPES, Precision
from utils.algebra.scores import SCORES
from utils.results import load_json, save_json
from utils.script import environment, run_script
from utils.settings import all_settings, with_values

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
BFLOAT16_PEAK, BANDWIDTH = 989e12, 3.35e12  # of an H100 SXM: FLOP/s, bytes/s
PEAKS = {"float64": 67e12, "float32": 67e12, "bfloat16x2": 989e12}


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    model_name: str = "tiny"  # as given to cache.py
    dataset_name: str = "docstrings/kind"  # likewise
    max_samples: int = 1000  # stratified sample of the training split
    num_tokens: int = 128  # mean tokens of a text, for the attention's share of the forward pass
    results_dir: Path = Path("results")  # where the result goes


class Decoder(NamedTuple):
    """Sizes of a decoder, from its config.json."""

    hidden_size: int
    num_layers: int
    queries: int  # width of all heads
    keys: int
    intermediate_size: int

    def forward_flops(self, num_tokens: int) -> float:
        """Of a token in a text of so many: two for each weight, and attention to half of the text on average."""
        d = self.hidden_size
        weights = d * (2 * self.queries + 2 * self.keys) + 3 * d * self.intermediate_size
        return self.num_layers * (2 * weights + 2 * num_tokens * self.queries)

    def product_flops(self, precision: Precision) -> float:
        """Of a token: C1 whole, C0 in stripes from the diagonal on; with two parts q1'q1, q2'q1, q1'x and q2'x."""
        num_products = (NUM_STRIPES + 1) / (2 * NUM_STRIPES) + (3 if precision == "bfloat16x2" else 1)
        return (self.num_layers + 1) * 2 * num_products * self.hidden_size**2

    def bytes_moved(self, precision: Precision) -> float:
        """Of a token of a bfloat16 model: each pass of `CentredProducts.add` over (T, d) numbers."""
        prefixes = (2 + 8) + (8 + 8) + 8 + 8  # centre, cumulative sum, two thin products
        rounding = (8 + 4) + (4 + 4)  # to float32, mask
        item = 2 if precision == "bfloat16x2" else 4
        parts = (4 + 2) + (4 + 2 + 2) if precision == "bfloat16x2" else 2 + 4
        return (self.num_layers + 1) * self.hidden_size * (prefixes + rounding + parts + item * (NUM_STRIPES + 5))


DECODERS = {
    "SmolLM2-135M": Decoder(576, 30, 576, 192, 1536),
    "Qwen2-0.5B": Decoder(896, 24, 896, 128, 4864),
    "Qwen2-7B": Decoder(3584, 28, 3584, 512, 18944),
    "Llama-3-8B": Decoder(4096, 32, 4096, 1024, 14336),
}


def predict(decoder: Decoder, num_tokens: int) -> dict[str, float]:
    """Operations of a token and, for each precision, bytes and pass / forward with everything at its peak."""
    forward, products = decoder.forward_flops(num_tokens), decoder.product_flops("float32")
    row = {"forward_gflop": forward / 1e9, "product_gflop": products / 1e9, "one_peak": 1 + products / forward}
    for precision in PRECISIONS:
        seconds = decoder.product_flops(precision) / PEAKS[precision] + decoder.bytes_moved(precision) / BANDWIDTH
        row[f"{precision}_megabytes"] = decoder.bytes_moved(precision) / 1e6
        row[precision] = 1 + seconds / (forward / BFLOAT16_PEAK)
    return row


def score_every_layer(config: Config, precision: Precision, results_dir: Path) -> list[dict[str, float]]:
    """The scores of each layer from products of one precision."""
    values = {"model_name": config.model_name, "dataset_name": config.dataset_name, "results_dir": results_dir}
    values |= {"max_samples": config.max_samples, "device": "cpu", "product_dtype": precision}
    with contextlib.redirect_stdout(io.StringIO()):
        cache.main(with_values(cache.Config(), **values))
        del values["product_dtype"]
        K_sweep.main(with_values(K_sweep.Config(), **values, picture=False))
    [path] = results_dir.glob("ntps/*/*.json")
    return [{name: mean(layer[name]) for name in SCORES} for layer in load_json(path)["layers"]]


def main(config: Config) -> None:
    """Measures the errors, counts the operations, and prints both tables."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            found[precision] = score_every_layer(config, precision, Path(folder) / precision)
    errors = {
        precision: {
            name: max(abs(a[name] - b[name]) for a, b in zip(layers, found["float64"], strict=True)) for name in SCORES
        }
        for precision, layers in found.items()
    }
    print(
        "largest difference from float64 products, over all layers\n" + " " * 11 + "".join(f"{n:>15}" for n in SCORES)
    )
    for precision, error in errors.items():
        print(f"{precision:11}" + "".join(f"{error[name]:15.1e}" for name in SCORES))
    predicted = {name: predict(decoder, config.num_tokens) for name, decoder in DECODERS.items()}
    print("\nGFLOP per token: forward, products; pass / forward at one peak, and on an H100 by precision")
    for name, row in predicted.items():
        print(f"{name:13}" + "".join(f"{row[key]:10.3f}" for key in ("forward_gflop", "product_gflop", "one_peak"))
              + "".join(f"{precision:>12}{row[precision]:6.2f}" for precision in PRECISIONS))  # fmt: skip
    path = config.results_dir / "benchmarks" / "bench_products.json"
    result = {"errors": errors, "predicted": predicted}
    save_json(path, {"config": all_settings(config), "environment": environment(), **result})
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
