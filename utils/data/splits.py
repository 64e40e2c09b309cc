"""Choose the rows of train, of test and of a sample."""

import math

import numpy as np

PAPER_SEED = 42  # for the 70/30 splits of known datasets: a run's own seed must not move their test rows
TEST_SHARE = 0.3


def stratified_rows(classes: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Numbers of `num` random rows in random order: each class in proportion and, if `num` allows, with a row.

    `classes` holds the class of each row, (n,); one class gives a plain random sample.
    """
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(classes, return_inverse=True, return_counts=True)[1:]
    quota = num * counts / counts.sum()
    take = np.maximum(np.floor(quota).astype(int), int(num >= len(counts)))
    while take.sum() > num:
        take[np.argmax(take)] -= 1
    take[np.argsort(take - quota, kind="stable")[: num - take.sum()]] += 1
    order = generator.permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]
    starts = np.cumsum(counts) - counts
    return generator.permutation(np.concatenate([order[i : i + k] for i, k in zip(starts, take, strict=True)]))


def seeded_split(classes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of train and test, 70/30, each class in proportion; `classes` as in `stratified_rows`, n >= 2."""
    num_rows = len(classes)
    train = stratified_rows(classes, num_rows - math.ceil(TEST_SHARE * num_rows), seed)
    test = np.setdiff1d(np.arange(num_rows), train)
    return train, np.random.default_rng(seed).permutation(test)


def paper_split(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of train and test as in the paper: those of `datasets.Dataset.train_test_split`."""
    order = np.random.default_rng(PAPER_SEED).permutation(num_rows)
    num_test = math.ceil(TEST_SHARE * num_rows)
    return order[num_test:], order[:num_test]


def grouped_split(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of train and test in order; divides the groups, (n,), as the paper divides rows."""
    names = np.unique(groups)
    in_train = np.isin(groups, names[paper_split(len(names))[0]])
    return np.flatnonzero(in_train), np.flatnonzero(~in_train)


def linked_groups(columns: list[list[str]]) -> np.ndarray:
    """Group number of each row, (n,): rows that share a text, up to case and spacing, share a group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    texts: dict[str, int] = {}
    num_rows = len(columns[0])
    cells = [texts.setdefault(" ".join(cell.casefold().split()), len(texts)) for column in columns for cell in column]
    edges = (np.ones(len(cells)), (np.tile(np.arange(num_rows), len(columns)), num_rows + np.array(cells)))
    graph = coo_array(edges, shape=(num_rows + len(texts),) * 2)
    return connected_components(graph, directed=False)[1][:num_rows]
