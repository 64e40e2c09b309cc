"""Running sums of a pass over texts, from which the moments of cache.py are made. Symbols are those of cache.py."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.algebra.host_sums import HostSums
from utils.algebra.linalg import NUM_PROBES, noise_probes
from utils.algebra.products import Precision, dtype_of, factors, tensor_cores
from utils.models.batches import Batch
from utils.models.states import pool

LARGE = ("products", "pooled_second_moment", "fold_pooled_second_moment")  # sums that can be in the host's memory
NUM_STRIPES = 3  # of rows of the products; what of C0 lies left of a stripe's diagonal block is not computed


@dataclass(frozen=True)
class Prefixes:
    """The pairs (t, t+1) of a batch around a centre c: with x_t = a_t + c and s_t = q_t + t c, q and a alone.

    Only these are multiplied in the dtype of the products; what the centre adds is exact, and due once at the end.
    float32 then rounds relative to the spread of the states and not to their mean. The prefix sums themselves are
    float64: added up in float32 they cost ten times the precision of the products.
    """

    pairs: Tensor  # (pairs, 2d), [q_t ; a_{t+1}] in the dtype of the products; zeros for padding
    exact: Tensor  # (d, 2p), the two halves of the products times the probes Z, by thin float64 products
    sums: dict[str, Tensor]  # q, tq, a, ta: sums over the pairs of q_t, t q_t, a_{t+1}, t a_{t+1}, (d,) float64
    totals: Tensor  # (b, d), s_T of each text, of one token too


def centred_prefixes(
    hidden_states: Tensor, lengths: Tensor, centre: Tensor, probes: Tensor, dtype: torch.dtype
) -> Prefixes:
    """The prefix sums of a batch. What a product with Z should be is had cheaply: a_{t+1}' Z is the step of q_t' Z.

    Args:
        hidden_states: (b, t, d), right-padded, in the dtype of the model.
        lengths: tokens per text, (b,).
        centre: any vector near the mean state, (d,), float64; the moments do not depend on it.
        probes: Z, (d, p).
        dtype: of the products.
    """
    batch, num_tokens, d = hidden_states.shape
    position = torch.arange(1, num_tokens, device=lengths.device)
    has_next = position < lengths[:, None]
    t = has_next * position  # (b, T - 1), 0 on padding
    prefix = hidden_states - centre  # a_t for now, float64
    first = prefix[:, 0].clone()
    pairs = prefix.new_empty(batch, num_tokens - 1, 2 * d, dtype=dtype)
    pairs[..., d:] = prefix[:, 1:]
    prefix.cumsum_(1)
    pairs[..., :d] = prefix[:, :-1]
    pairs *= has_next[..., None]  # padding off, on both sides
    along = prefix @ probes  # q_t' Z
    weights = torch.cat([along[:, :-1], along.diff(dim=1), torch.ones_like(t)[..., None], t[..., None]], dim=-1)
    weights = torch.nn.functional.pad(weights * has_next[..., None], (0, 0, 0, 1))  # the last position has no next
    thin = prefix.flatten(0, 1).T @ weights.flatten(0, 1)
    totals = prefix[torch.arange(batch, device=lengths.device), lengths - 1]  # q_T
    sums = {"q": thin[:, -2], "tq": thin[:, -1], "a": (lengths > 1).double() @ (totals - first)}
    sums["ta"] = (lengths - 1).double() @ totals - sums["q"]  # summation by parts
    return Prefixes(pairs.flatten(0, 1), thin[:, :-2], sums, totals + lengths[:, None] * centre)


@dataclass(frozen=True)
class Sizes:
    """Of the sums."""

    num_layers: int
    hidden_size: int
    num_labels: int
    num_folds: int
    num_fold_layers: int  # the last layers, which keep their folds

    @property
    def of_layer(self) -> dict[str, tuple[int, ...]]:
        """What each layer has, by the symbols of the module docstring."""
        d, c = self.hidden_size, self.num_labels
        return {
            "pooled_second_moment": (d, d),
            "pooled_label_cross_moment": (d, c),
            "pooled_mean": (d,),
            "pooled_norm_fourth_power": (),  # |m|^4, for Ledoit-Wolf shrinkage
            "pooled_norm_squared_pooled": (d,),  # |m|^2 m, likewise
            "products": (d, 2 * d),  # of [q_t ; a_{t+1}]
            "errors": (d, 2 * NUM_PROBES),
            "exact": (d, 2 * NUM_PROBES),  # of the products of the current block
            **{name: (d,) for name in ("q", "tq", "a", "ta", "total_square")},
        }

    @property
    def of_fold_layer(self) -> dict[str, tuple[int, ...]]:
        """What each of the last layers has besides."""
        d, c, f = self.hidden_size, self.num_labels, self.num_folds
        return {
            "fold_pooled_second_moment": (f, d, d),
            "fold_pooled_label_cross_moment": (f, d, c),
            "fold_pooled_mean": (f, d),
        }

    @property
    def num_numbers(self) -> int:
        """Numbers in all sums."""
        parts = (self.of_layer, self.of_fold_layer, self.of_labels)
        whole, folds, labels = (sum(map(math.prod, of.values())) for of in parts)
        return self.num_layers * whole + self.num_fold_layers * folds + labels

    @property
    def of_labels(self) -> dict[str, tuple[int, ...]]:
        """What all layers share."""
        c, f = self.num_labels, self.num_folds
        return {"fold_label_mean": (f, c), "fold_label_second_moment": (f, c, c), "fold_num_samples": (f,)}


class MomentSums:
    """Running sums over texts, layer by layer; `averages` adds what the centres are due and divides by their number.

    Products of a batch are added up in place, in their own dtype, and in float64 at the end of a block of batches.
    """

    def __init__(
        self,
        sizes: Sizes,
        lengths: np.ndarray,
        devices: list[torch.device],
        precision: Precision,
        on_host: bool = False,
    ):
        """Zeros.

        Args:
            sizes: of the sums.
            lengths: tokens of all texts, (n,), whatever process adds them.
            devices: of the states of each layer.
            precision: of the products.
            on_host: large sums are in the host's memory, and products of a batch are added to them at once.
        """
        d, self.first_fold_layer = sizes.hidden_size, sizes.num_layers - sizes.num_fold_layers
        self.host = HostSums() if on_host else None
        self.sums: dict[str, list[Tensor]] = {}
        for name, shape in (sizes.of_layer | sizes.of_fold_layer).items():
            of = devices[self.first_fold_layer :] if name in sizes.of_fold_layer else devices
            places = ["cpu"] * len(of) if on_host and name in LARGE else of
            self.sums[name] = [torch.zeros(shape, dtype=torch.float64, device=place) for place in places]
        self.labels = {
            name: torch.zeros(shape, dtype=torch.float64, device=devices[0]) for name, shape in sizes.of_labels.items()
        }
        self.precision: Precision = precision
        dtype = dtype_of(precision)
        self.block = [torch.zeros((d, 2 * d), dtype=dtype, device=device) for device in devices if not on_host]
        self.centres = [torch.zeros(d, dtype=torch.float64, device=device) for device in devices]
        step = -(-d // NUM_STRIPES)
        self.stripes = [slice(start, min(start + step, d)) for start in range(0, d, step)]
        self.probes = {device: noise_probes(d).to(device) for device in set(devices)}
        self.is_centred = False  # on the mean states of the first batch
        n = lengths.astype(np.int64) - 1  # pairs of each text; t runs over 1..n
        self.num_pairs, self.t_sum = int(n.sum()), int((n * (n + 1) // 2).sum())
        self.t_squared_sum = int((n * (n + 1) * (2 * n + 1) // 6).sum())

    def tensors(self) -> dict[str, Tensor | list[Tensor]]:
        """Everything that changes during a pass, by name."""
        return {**self.sums, **self.labels, "centres": self.centres, "block": self.block}

    def clear(self) -> None:
        """Back to the start of a pass, but for the centres."""
        for tensor in (*itertools.chain.from_iterable(self.sums.values()), *self.labels.values(), *self.block):
            tensor.zero_()

    def add_labels(self, batch: Batch) -> None:
        """Adds what is the same at every layer: labels and folds of a batch; after its layers."""
        self.labels["fold_label_mean"] += batch.folds.T @ batch.targets
        second_moment = torch.einsum("bf,bc,be->fce", batch.folds, batch.targets, batch.targets)
        self.labels["fold_label_second_moment"] += second_moment
        self.labels["fold_num_samples"] += batch.folds.sum(0)
        self.is_centred = True

    def add_tokens(self, layer: int, hidden_states: Tensor, lengths: Tensor) -> Tensor:
        """Adds one layer's states (b, t, d) of a batch; returns the mean state of each text, (b, d) float64."""
        if not self.is_centred:
            self.centres[layer].copy_(pool(hidden_states.double(), lengths, "mean").mean(0))
        probes, d = self.probes[hidden_states.device], hidden_states.shape[2]
        added = centred_prefixes(hidden_states, lengths, self.centres[layer], probes, dtype_of(self.precision))
        block = self.block[layer] if self.block else added.pairs.new_zeros(d, 2 * d)
        with tensor_cores(self.precision):
            for left, right in factors(added.pairs, self.precision):
                for stripe in self.stripes:  # C0 is symmetric
                    block[stripe, stripe.start :].addmm_(left[:, stripe].T, right[:, stripe.start :])
        self.sums["exact"][layer] += added.exact
        if not self.block:
            self.add_products(layer, block)
        for name, value in added.sums.items():
            self.sums[name][layer] += value
        self.sums["total_square"][layer] += added.totals.square().sum(0)
        return added.totals / lengths[:, None]

    def add_products(self, layer: int, products: Tensor) -> None:
        """Moves products into float64, and what their dtype has cost into the errors."""
        second = products[:, : len(products)]
        second.copy_(second.triu() + second.triu(1).T)
        halves = [half @ self.probes[products.device] for half in products.double().chunk(2, dim=1)]
        self.sums["errors"][layer] += torch.cat(halves, dim=1) - self.sums["exact"][layer]
        self.sums["exact"][layer].zero_()
        if self.host:
            self.host.add(self.sums["products"][layer], products)
        else:
            self.sums["products"][layer] += products

    def add_square(self, name: str, layer: int, rows: Tensor, *fold: int) -> None:
        """Adds X'X of rows X (b, d) to a large sum."""
        if self.host:
            self.host.add(self.sums[name][layer][fold], rows.T @ rows)
        else:
            self.sums[name][layer][fold].addmm_(rows.T, rows)

    def end_block(self) -> None:
        """Adds what has come together in the dtype of the products."""
        for layer, products in enumerate(self.block):
            self.add_products(layer, products)
            products.zero_()

    def settle(self) -> None:
        """Returns when the sums hold all that was added."""
        if self.host:
            self.host.wait()

    def add_pooled(self, layer: int, pooled: Tensor, batch: Batch) -> None:
        """Adds one layer's pooled states of a batch, (b, d) float64."""
        sums, at = self.sums, layer - self.first_fold_layer
        norm_squared = pooled.square().sum(1)
        sums["pooled_norm_fourth_power"][layer] += norm_squared.square().sum()
        sums["pooled_norm_squared_pooled"][layer] += norm_squared @ pooled
        sums["pooled_mean"][layer] += pooled.sum(0)
        if at < 0:
            self.add_square("pooled_second_moment", layer, pooled)
            sums["pooled_label_cross_moment"][layer].addmm_(pooled.T, batch.targets)
            return
        sums["fold_pooled_mean"][at] += batch.folds.T @ pooled
        for fold, rows in enumerate(batch.rows_of_folds):
            self.add_square("fold_pooled_second_moment", at, pooled[rows], fold)
            sums["fold_pooled_label_cross_moment"][at][fold].addmm_(pooled[rows].T, batch.targets[rows])

    def prefix_moments(self, layer: int) -> dict[str, Tensor]:
        """C0, C1, their means and errors, summed over texts, with what the centre adds; once, at the end."""
        q, tq, a, ta = (self.sums[name][layer] for name in ("q", "tq", "a", "ta"))
        mu = self.centres[layer]
        second, following = self.sums["products"][layer].chunk(2, dim=1)
        # in place: nothing else of this size is needed
        second.addr_(tq, mu).addr_(mu, tq + self.t_squared_sum * mu)
        second.copy_((second + second.T) / 2)  # symmetric only up to rounding
        following.addr_(q, mu).addr_(mu, ta + self.t_sum * mu)
        second_error, next_error = self.sums["errors"][layer].chunk(2, dim=1)
        return {
            "prefix_second_moment": second,
            "prefix_next_cross_moment": following,
            "prefix_mean": q + self.t_sum * mu,
            "next_mean": a + self.num_pairs * mu,
            "prefix_second_error": second_error,
            "prefix_next_error": next_error,
            # s_{t+1}^2 - s_t^2 = 2 s_t x_{t+1} + x_{t+1}^2: the squares of the tokens without a pass over them
            "token_square": self.sums["total_square"][layer] - 2 * following.diagonal(),
        }

    def averages(self) -> dict[str, Tensor | list[Tensor]]:
        """Averages over texts, of each fold and, without `fold_`, of all folds together; once, at the end.

        What there is of each layer is a list over layers.
        """
        averages: dict[str, Tensor | list[Tensor]] = {}
        counts = self.labels["fold_num_samples"]
        num_samples = counts.sum().item()
        for name in ("pooled_second_moment", "pooled_label_cross_moment"):
            for at, of_folds in enumerate(self.sums[f"fold_{name}"]):
                self.sums[name][self.first_fold_layer + at] = of_folds.sum(0)
        for name in [name for name in self.sums if name.startswith("pooled_")]:
            averages[name] = [total.div_(num_samples) for total in self.sums[name]]
        of_layers = [self.prefix_moments(layer) for layer in range(len(self.centres))]
        for name in of_layers[0]:
            averages[name] = [moments[name].div_(num_samples) for moments in of_layers]
        for name in ("label_mean", "label_second_moment"):
            averages[name] = self.labels[f"fold_{name}"].sum(0) / num_samples

        def per_fold(total: Tensor) -> Tensor:
            return total.div_(counts.to(total.device).clamp(min=1).view(-1, *[1] * (total.ndim - 1)))

        averages["fold_num_samples"] = counts
        averages |= {name: per_fold(total) for name, total in self.labels.items() if name != "fold_num_samples"}
        for name in ("pooled_second_moment", "pooled_label_cross_moment", "pooled_mean"):
            averages[f"fold_{name}"] = [per_fold(total) for total in self.sums[f"fold_{name}"]]
        return averages
