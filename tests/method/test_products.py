"""Products on tensor cores: what they read of a number, and what that costs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import cache
from tests.conftest import configure
from utils.algebra.moments import load_layer
from utils.algebra.products import factors, num_copies, round_to_tf32_, tensor_cores
from utils.results import open_tensors

NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def nearest(numbers: np.ndarray) -> np.ndarray:
    """The nearest numbers with eleven digits, the leading one and ten bits; of two, the one away from zero."""
    mantissa, exponent = np.frexp(numbers.astype(np.float64))
    return np.ldexp(np.sign(mantissa) * np.floor(np.abs(mantissa) * 2**11 + 0.5), exponent - 11)


@given(arrays(np.float32, st.integers(1, 20), elements=NUMBERS))
def test_a_number_becomes_the_nearest_of_ten_bits(numbers):
    np.testing.assert_array_equal(round_to_tf32_(torch.tensor(numbers)).double().numpy(), nearest(numbers))


@given(st.integers(0, 10_000))
def test_three_products_are_a_thousand_times_nearer(seed):
    numbers = torch.randn(200, 12, generator=torch.Generator().manual_seed(seed))
    exact = numbers.double().T @ numbers.double()
    error = {}
    for precision in ("float32", "tf32", "tf32x3"):
        pairs = factors(numbers.clone(), precision)
        assert len({id(tensor) for pair in pairs for tensor in pair}) == num_copies(precision)
        found = torch.stack([left.double().T @ right.double() for left, right in pairs]).sum(0)
        error[precision] = ((found - exact).norm() / exact.norm()).item()
    assert error["float32"] == 0
    assert 1e-5 < error["tf32"] < 1e-3
    assert error["tf32x3"] < 2e-6 and error["tf32x3"] < error["tf32"] / 100


def test_cuda_is_as_it_was_behind_the_products():
    with pytest.raises(RuntimeError, match="stop"), tensor_cores("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32
        raise RuntimeError("stop")
    assert not torch.backends.cuda.matmul.allow_tf32
    with tensor_cores("float32"):
        assert not torch.backends.cuda.matmul.allow_tf32


def test_moments_are_as_near_as_their_products(model_dirs, rows_path, tmp_path):
    """Second moments of a whole pass, against float64 products: the precision reaches the file, and no more is lost."""
    found = {}
    for precision in ("float64", "float32", "tf32", "tf32x3"):
        config = configure(
            cache, model_name=str(model_dirs["qwen2"]), dataset_name=str(rows_path), product_dtype=precision,
            results_dir=tmp_path / precision, split="all",
        )  # fmt: skip
        cache.main(config)
        with open_tensors(cache.config_path(config)) as (file, metadata):
            found[precision] = load_layer(file, metadata, 2, torch.device("cpu"))
    exact = found["float64"]
    for name in ("prefix_second_moment", "prefix_next_cross_moment"):
        error = {
            precision: ((getattr(moments, name) - getattr(exact, name)).norm() / getattr(exact, name).norm()).item()
            for precision, moments in found.items()
        }
        assert error["tf32x3"] < 1e-5 and error["float32"] < 1e-5
        assert 1e-6 < error["tf32"] < 1e-2 and error["tf32"] > 5 * error["tf32x3"]
