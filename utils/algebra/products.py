"""C0 and C1 from matrix products in lower precision than float64: the fast form of `prefix_moments` in cache.py.

The products s_t s_t' and s_t x_{t+1}' are most of the work of a pass; float64 takes twice as long for them as float32
on a CPU, and on a GPU far longer than bfloat16. This module adds up prefix sums in float64 and rounds them once, for
the product: in float32 their errors would grow with t, fill all d coordinates and pass for directions of the data. It
also takes them around a centre c near the mean state: with s_t = q_t + t c, the part t c dwarfs q_t, but it is known
and needs no large product. Only q_t is rounded, so that errors are relative to the spread of the states and not to
their mean. A block of batches adds up its products in float32; float64 sums then take the block and the terms of the
centre. The module also measures its rounding: for a few fixed random signs z, the exact C0 z and C1 z are thin float64
products, and it keeps their difference from the rounded C0 and C1 times z. Prefix sums, conversion and measurement take
about a quarter of the time of the large products at d = 576, and less for a larger d.

    float32     q and x in float32
    bfloat16x2  q = q1 + q2 in two bfloat16 numbers, 16 bits: C0 = q1'q1 + q1'q2 + q2'q1, with the diagonal of q2'q2,
                as its other elements average out; C1 = q1'x + q2'x, exact in the states x of a bfloat16 model; other
                states are split, x = x1 + x2, and q1'x2 is added. Tensor cores multiply bfloat16 numbers without
                rounding and add up in float32; on a CPU float32 does the same.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

Precision = Literal["float32", "float64", "bfloat16x2"]
ProductDtype = Literal["auto", Precision]  # a setting of `Config`; auto: by the number of tokens
NUM_SIGNS = 4
NUM_STRIPES = 4  # C0 is symmetric: `add_square` computes each stripe of its rows from the diagonal block on


def choose_precision(product_dtype: ProductDtype, num_tokens: int, hidden_size: int) -> Precision:
    """The precision of the products of a pass: with `auto` float64 for few tokens, else float32.

    Few tokens span few directions, and float32 errors have not averaged out; float64 then costs only seconds. In a long
    pass float64 would add a fifth of the time, and float32 errors are smaller and measured.
    """
    if product_dtype != "auto":
        return product_dtype
    return "float64" if num_tokens <= max(2**14, 32 * hidden_size) else "float32"


def random_signs(size: int) -> Tensor:
    """Fixed random signs Z, (d, p), to measure the error of C Z: measuring that of C would cost another C."""
    return torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (size, NUM_SIGNS)))


def split(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors whose sum is `numbers`, with a relative error of 2^-16."""
    high = numbers.bfloat16()
    return high, (numbers - high).bfloat16()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left' right to the float32 `total`; products of bfloat16 numbers are exact, and their sums are float32."""
    if total.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        total.addmm_(left.to(total.dtype).T, right.to(total.dtype))


def add_square(total: Tensor, rows: Tensor) -> None:
    """Adds rows' rows to `total` on and above its diagonal; elements below it become meaningless."""
    size = len(total)
    step = -(-size // NUM_STRIPES)
    for start in range(0, size, step):
        stripe = slice(start, start + step)
        add_product(total[stripe, start:], rows[:, stripe], rows[:, start:])


def position_weights(lengths: Tensor, num_positions: int) -> Tensor:
    """1 and t at positions t = 1..T-1 of each text, 0 at its last token and at padding, (2, b, positions) float64."""
    t = torch.arange(1, num_positions + 1, device=lengths.device)
    has_next = t < lengths[:, None]
    return torch.stack([has_next, t * has_next]).double()


class CentredProducts:
    """The prefix moments of one layer over a block of batches, around a centre (d,) near the mean state."""

    def __init__(self, centre: Tensor, precision: Precision) -> None:
        d, p = len(centre), NUM_SIGNS
        self.centre, self.precision = centre.double(), precision
        self.signs = random_signs(d).T.contiguous().to(centre.device)  # Z', (p, d)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=centre.device)

        self.second = zeros(d, d)  # sum of q q', its upper triangle
        self.mixed = zeros(d if precision == "bfloat16x2" else 0, d)  # sum of q2 q1'
        self.following = zeros(d, d)  # sum of q_t x_{t+1}'
        self.thin = zeros(2 * p + 2, d, dtype=torch.float64)  # sums of q_t' times Z'q_t, Z'q_{t+1}, 1 and t
        self.first_sum = zeros(d, dtype=torch.float64)  # sum of x_1
        self.texts: list[tuple[Tensor, Tensor]] = []  # number of tokens and s_T of each text

    def add(self, x: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
        """Adds the states of a batch.

        Args:
            x: (b, T, d), right-padded, in the dtype of the model.
            lengths: tokens per text, (b,).
            weights: `position_weights` of the batch, which all layers share.

        Returns:
            The sum of all states of each text, s_T, (b, d) float64.
        """
        q = x.to(torch.float64, copy=True).sub_(self.centre).cumsum_(1)  # a subtraction of mixed dtypes is slower
        totals = q[torch.arange(len(x), device=x.device), lengths - 1] + lengths[:, None] * self.centre
        self.texts.append((lengths, totals))
        self.first_sum += x[:, 0].sum(0, dtype=torch.float64)
        rows = q.flatten(0, 1)
        along = (self.signs @ rows.T).unflatten(1, (*lengths.shape, -1))  # Z'q_t, (p, b, T)
        rows *= weights[0].view(-1, 1)  # from here on 0 without a next token, so that no text meets its neighbour
        self.thin += torch.cat([along, pad(along[..., 1:], (0, 1)), weights]).flatten(1) @ rows
        self.multiply(rows[:-1].float(), x.flatten(0, 1)[1:])
        return totals

    def multiply(self, q: Tensor, x: Tensor) -> None:
        """Adds the large products of rows q_t and x_{t+1}, (pairs, d)."""
        if self.precision == "float32":
            add_square(self.second, q)
            add_product(self.following, q, x)
            return
        q_high, q_low = split(q)
        x_high, *x_low = (x,) if x.dtype == torch.bfloat16 else split(x)
        add_square(self.second, q_high)
        add_product(self.mixed, q_low, q_high)
        self.second.diagonal().add_(q_low.float().square().sum(0))  # without it, C0 is too small by 1e-6
        for part in (q_high, q_low):
            add_product(self.following, part, x_high)
        for part in x_low:
            add_product(self.following, q_high, part)

    def sums(self) -> dict[str, Tensor]:
        """The sums of `prefix_moments` over the block, and the errors of C0 Z and C1 Z, (d, p)."""
        upper = self.second.double()
        second = upper.triu() + upper.triu(1).T
        if len(self.mixed):
            second += self.mixed.double() + self.mixed.double().T
        following, z, c = self.following.double(), self.signs.T, self.centre
        exact_second, exact_shifted, (q_sum, position_q) = self.thin.split([NUM_SIGNS, NUM_SIGNS, 2])
        exact_next = exact_shifted - exact_second + torch.outer(self.signs @ c, q_sum)  # x_{t+1} = q_{t+1} - q_t + c
        errors = second @ z - exact_second.T, following @ z - exact_next.T
        lengths, totals = map(torch.cat, zip(*self.texts, strict=True))
        num_before = lengths - 1
        prefix_sum = q_sum + (num_before * lengths).sum() / 2 * c  # 1 + ... + (T-1) = (T-1) T / 2
        position_next = num_before.double() @ totals - prefix_sum  # sum of t x_{t+1}, by parts
        position_square = (num_before * lengths * (2 * lengths - 1)).sum() / 6  # sum of t^2
        second.addr_(position_q, c).addr_(c, position_q + position_square * c)
        following.addr_(c, position_next)
        return {
            "prefix_second_moment": second,
            "prefix_next_cross_moment": following,
            "prefix_mean": prefix_sum,
            "next_mean": totals.sum(0) - self.first_sum,
            "prefix_second_error": errors[0],
            "prefix_next_error": errors[1],
        }
