"""Products X'Y of prefix sums in the precision that is asked for, on tensor cores too.

A tensor core reads 10 bits of the mantissa of each float32 (TF32) and adds up in float32, several times as fast as
float32 itself. Numbers are rounded to these bits here, and not by the core: a product is then the same on a CPU, up to
the order of its sums, and what it costs in NTPS is measured there (benchmarks/bench_products.py).

    tf32    X and Y in 10 bits each
    tf32x3  X = X1 + X2 with 10 bits each, likewise Y; X1'Y1 + X1'Y2 + X2'Y1, that is 21 bits in three products
"""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "float64", "tf32", "tf32x3"]
ProductDtype = Literal["auto", Precision]  # of a `Config`; auto: by the number of tokens
DROPPED_BITS = 23 - 10  # of float32's mantissa


def dtype_of(precision: Precision) -> torch.dtype:
    """What products of a precision are kept in."""
    return torch.float64 if precision == "float64" else torch.float32


def num_copies(precision: Precision) -> int:
    """How often the numbers that are multiplied are in memory."""
    return 2 if precision == "tf32x3" else 1


def round_to_tf32_(numbers: Tensor) -> Tensor:
    """The same float32 tensor with every number rounded to the nearest of 10 bits, in place."""
    bits = numbers.view(torch.int32)
    bits.add_(1 << (DROPPED_BITS - 1)).bitwise_and_(-1 << DROPPED_BITS)
    return numbers


def factors(numbers: Tensor, precision: Precision) -> list[tuple[Tensor, Tensor]]:
    """Pairs (X, Y) whose products X'Y add up to that of `numbers` with itself; `numbers` itself may be overwritten."""
    if precision in ("float32", "float64"):
        return [(numbers, numbers)]
    if precision == "tf32":
        high = round_to_tf32_(numbers)
        return [(high, high)]
    high = round_to_tf32_(numbers.clone())
    low = round_to_tf32_(numbers.sub_(high))
    return [(high, low), (low, high), (high, high)]


@contextlib.contextmanager
def tensor_cores(precision: Precision) -> Iterator[None]:
    """Lets CUDA multiply float32 on tensor cores where the precision is theirs, and nowhere else."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = precision.startswith("tf32")
    try:
        yield
    finally:
        matmul.allow_tf32 = before
