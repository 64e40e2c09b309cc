"""Rows of texts with a label each: classes encoded, samples and splits drawn."""

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from utils.data.labels import class_values, warn
from utils.data.sources import Source
from utils.script import UserError

PAPER_SEED = 42  # of the 70/30 splits of the known datasets; a run's own seed must not move their test rows
TEST_SHARE = 0.3
MAX_MEAN = 1e5  # of targets, in their standard deviations: its square costs 10 of the 16 digits of float64
SPREADS = (1e-15, 1e15)  # of targets: standard deviations whose powers float64 and float32 hold
MAX_CLASSES = 5000  # the label moments of cache.py are c x c in float64, for each fold: 1 GB


@dataclass(frozen=True)
class Rows:
    """Texts with a raw label each; a text without any content is the empty string."""

    texts: list[str]
    labels: list[Any]
    groups: np.ndarray | None = None  # (n,) rows of one group stay on one side of a split

    def take(self, rows: Iterable[int]) -> "Rows":
        rows = list(rows)
        groups = None if self.groups is None else self.groups[rows]
        return Rows([self.texts[row] for row in rows], [self.labels[row] for row in rows], groups)


def cut(values: Iterable[Any], like: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The values in parts as long as those of `like`."""
    rest = iter(values)
    return {part: list(itertools.islice(rest, len(of_part))) for part, of_part in like.items()}


# ------------------------------------------------------------------ labels
def check_targets(name: str, parts: Mapping[str, np.ndarray]) -> None:
    """Refuses regression targets of which no score can be computed; those of a later split may be all equal.

    Args:
        name: of the dataset, for messages.
        parts: finite targets by split, (n,).

    Raises:
        UserError: those of the first split are all equal, or their spread is extreme.
    """
    first = next(iter(parts))
    for part, numbers in parts.items():
        if numbers.min() < numbers.max():
            check_spread(f"The {part} targets of {name}", numbers)
        elif part == first:
            raise UserError(f"The {first} targets of {name} are all equal. See --label_column or --max_samples.")


def check_spread(which: str, numbers: np.ndarray) -> None:
    """Raises UserError where the standard deviation of some targets is extreme, by itself or beside their mean.

    The moments are sums of squares about 0, from which the square of the mean is subtracted.

    Args:
        which: the targets, in words, for the message.
        numbers: finite and not all equal, (n,).
    """
    largest = float(np.abs(numbers).max())
    scaled = numbers / largest  # squares of the numbers themselves may overflow
    mean, std = float(scaled.mean()), float(scaled.std())
    spread = std * largest
    told = f"{which} run from {numbers.min():.9g} to {numbers.max():.9g}, with a standard deviation of {spread:.3g}"
    if abs(mean) > MAX_MEAN * std:
        raise UserError(
            f"{told}, and their mean is more than {MAX_MEAN:,.0f} times as large: subtract a constant from the column "
            f"first, such as {mean * largest:.9g}."
        )
    if not SPREADS[0] <= spread <= SPREADS[1]:
        raise UserError(f"{told}, which must be within {SPREADS[0]:g} and {SPREADS[1]:g}: rescale the column first.")


def encode(source: Source, parts: dict[str, Rows], names: list[str] | None) -> tuple[dict[str, Rows], list[str]]:
    """Rows with labels 0..c-1, and the c class names: the classes of the training rows, sorted.

    Args:
        source: where the rows come from.
        parts: rows by part; the first part (train, where there is one) defines the classes.
        names: class names, where a label is a position among them.

    Raises:
        UserError: a single class, or, in the user's own data, a class that train lacks.
    """
    values = class_values(source.name, [label for rows in parts.values() for label in rows.labels])
    labels = cut(values, {part: rows.labels for part, rows in parts.items()})
    first = next(iter(parts))
    classes = sorted(set(labels[first]))
    index = {value: number for number, value in enumerate(classes)}
    known = dict(enumerate(names or ()))  # a number beyond the names, or a word, is its own name
    spelled = {value: known.get(value, str(value)) for value in set(values)}
    if len(classes) < 2:
        raise UserError(
            f"The {first} labels of {source.name} are all {spelled[classes[0]]!r}; at least two classes are needed. "
            "See --label_column; where -1 is a class, and not a missing label, name it in words."
        )
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{source.name} has {len(classes):,} classes in {len(labels[first]):,} {first} rows; up to {MAX_CLASSES:,} "
            "are possible. Is --label_column the class, and not the number of a row? Numbers: --task regression."
        )
    encoded = {}
    for part, rows in parts.items():
        kept = [row for row, value in enumerate(labels[part]) if value in index]
        if len(kept) < len(rows.texts):
            unseen = sorted(spelled[value] for value in set(labels[part]) - set(classes))
            told = f"{len(rows.texts) - len(kept)} {part} rows of {source.name} have classes that train lacks: "
            told += ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
            if source.own or not kept:
                raise UserError(f"{told}. Correct them, add rows of these classes to train, or take --split all.")
            warn(f"{told}; left out")
        encoded[part] = Rows([rows.texts[row] for row in kept], [index[labels[part][row]] for row in kept])
    return encoded, [spelled[value] for value in classes]


# ------------------------------------------------------------------ samples and splits
def stratified_rows(classes: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Numbers of `num` random rows in random order, each class in proportion and, if `num` allows, none left out.

    Args:
        classes: class of each row, (n,); constant for a plain random sample.
        num: size of the sample, at most n.
        seed: the same seed gives the same rows.
    """
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(classes, return_inverse=True, return_counts=True)[1:]
    quota = num * counts / counts.sum()
    take = np.maximum(np.floor(quota).astype(int), int(num >= len(counts)))
    largest = [(-count, number) for number, count in enumerate(take)] if take.sum() > num else []
    heapq.heapify(largest)
    for _ in range(take.sum() - num):  # of as many as there are classes: a search among all of them takes hours
        count, number = heapq.heappop(largest)
        take[number] -= 1
        heapq.heappush(largest, (count + 1, number))
    take[np.argsort(take - quota, kind="stable")[: num - take.sum()]] += 1
    order = generator.permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]
    starts = np.cumsum(counts) - counts
    return generator.permutation(np.concatenate([order[i : i + k] for i, k in zip(starts, take, strict=True)]))


def paper_split(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of train and test in the paper's order, which is the same in datasets 3.5 and 5.2."""
    numbered = datasets.Dataset.from_dict({"row": range(num_rows)})
    split = numbered.train_test_split(test_size=TEST_SHARE, shuffle=True, seed=PAPER_SEED)
    return np.array(split["train"]["row"][:]), np.array(split["test"]["row"][:])


def linked_groups(columns: list[list[str]]) -> np.ndarray:
    """Group of each row, (n,): rows that share a text, in whatever case and spacing, are in one group."""
    texts: dict[str, int] = {}
    num_rows = len(columns[0])
    cells = [texts.setdefault(" ".join(cell.casefold().split()), len(texts)) for column in columns for cell in column]
    edges = (np.ones(len(cells)), (np.tile(np.arange(num_rows), len(columns)), num_rows + np.array(cells)))
    graph = coo_array(edges, shape=(num_rows + len(texts),) * 2)
    return connected_components(graph, directed=False)[1][:num_rows]


def known_split(source: Source, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of train and test of a known dataset that has no held-out split.

    Raises:
        UserError: all rows are of one group.
    """
    if rows.groups is None:
        return paper_split(len(rows.texts))
    groups = np.unique(rows.groups)
    if len(groups) < 2:
        raise UserError(f"All rows of {source.name} share a question: take --split all or --ungrouped_split.")
    in_train = np.isin(rows.groups, groups[paper_split(len(groups))[0]])
    return np.flatnonzero(in_train), np.flatnonzero(~in_train)


def leaked_share(train_texts: Iterable[str], test_texts: Sequence[str]) -> float:
    """Share of the test texts that are also in train, letter by letter."""
    known = set(train_texts)
    return sum(text in known for text in test_texts) / max(len(test_texts), 1)
