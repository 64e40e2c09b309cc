"""Prefix moments from products of lower precision: equal to the plain formula within the error that they measure."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import cache
from utils.algebra.products import CentredProducts, Precision, choose_precision, position_weights, random_signs, split
from utils.models.states import pool

NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-30)
RELATIVE = {"float32": 3e-7, "bfloat16x2": 2e-5}  # largest error of an element over the largest element


@given(arrays(np.float32, st.integers(1, 20), elements=NUMBERS))
def test_two_bfloat16_parts_add_up_to_sixteen_bits(numbers):
    high, low = split(torch.tensor(numbers))
    assert high.dtype == low.dtype == torch.bfloat16
    assert (np.abs(high.double().numpy() + low.double().numpy() - numbers) <= 2.0**-16 * np.abs(numbers)).all()


def batches(dtype: torch.dtype, mean: float = 3.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ragged batches of states with a large mean, some texts of one token; the padding is arbitrary."""
    generator = torch.Generator().manual_seed(0)
    centre = mean * torch.randn(30, generator=generator)
    made = []
    for lengths in ([9, 9, 9], [8, 5, 1], [1, 1], [2]):
        x = torch.randn(len(lengths), max(lengths), 30, generator=generator) + centre
        made.append((x.to(dtype), torch.tensor(lengths)))
    return made


def plain(made: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The sums of cache.py's plain formula, in float64."""
    of_batches = [cache.prefix_moments(x.double(), lengths) for x, lengths in made]
    return {name: sum(sums[name] for sums in of_batches) for name in of_batches[0]}


def products_of(made: list[tuple[torch.Tensor, torch.Tensor]], precision: Precision) -> dict[str, torch.Tensor]:
    """The sums of a block; each batch returns the sums of its texts."""
    products = CentredProducts(pool(*made[0], "mean").mean(0), precision)
    for x, lengths in made:
        totals = [text[:length].sum(0) for text, length in zip(x.double(), lengths.tolist(), strict=True)]
        found = products.add(x, lengths, position_weights(lengths, x.shape[1]))
        torch.testing.assert_close(found, torch.stack(totals), rtol=1e-12, atol=1e-12)
    return products.sums()


def assert_close(found: dict, expected: dict, relative: float, names=None) -> None:
    for name in names or expected:
        error = (found[name] - expected[name]).abs().max()
        assert error <= relative * expected[name].abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", RELATIVE)
def test_products_equal_the_plain_formula_and_know_their_error(precision, dtype):
    made, z = batches(dtype), random_signs(30)
    found, expected = products_of(made, precision), plain(made)
    assert_close(found, expected, RELATIVE[precision])
    assert_close(found, expected, 1e-13, ["prefix_mean", "next_mean"])  # no product of lower precision in them
    for moment, error in (("second_moment", "second_error"), ("next_cross_moment", "next_error")):
        missed = (found[f"prefix_{moment}"] - expected[f"prefix_{moment}"]) @ z
        scale = expected[f"prefix_{moment}"].abs().max()
        assert (found[f"prefix_{error}"] - missed).abs().max() <= 1e-12 * scale  # the measured error is the true one
        assert missed.abs().max() > 1e-10 * scale  # and it is not zero


def test_states_of_a_bfloat16_model_need_one_part():
    """Beside a mean of 1,000 the second part of x would be lost; one exact part keeps all of x."""
    made = batches(torch.bfloat16, mean=1000)
    assert_close(products_of(made, "bfloat16x2"), plain(made), 2e-7)


def test_a_centre_makes_errors_relative_to_the_spread():
    """An uncentred float32 product would be off by 1e-7 of 10^6 in each element, with a mean of 1,000."""
    made = batches(torch.float32, mean=1000)
    exact, uncentred = plain(made)["prefix_second_moment"], torch.zeros(30, 30)
    for x, lengths in made:
        s = torch.cat([text[:length].cumsum(0)[:-1] for text, length in zip(x, lengths, strict=True)])
        uncentred += s.T @ s
    error = (products_of(made, "float32")["prefix_second_moment"] - exact).abs().max()
    assert error < 0.05 * (uncentred.double() - exact).abs().max()


def test_few_tokens_are_multiplied_in_float64():
    assert choose_precision("auto", 2**14, 64) == "float64" and choose_precision("auto", 2**14 + 1, 64) == "float32"
    assert choose_precision("auto", 32 * 4096, 4096) == "float64"
    assert choose_precision("bfloat16x2", 1, 64) == "bfloat16x2"
