"""Form batches of texts of like length, so that little of them is padding, and share them among processes.

Processes get whole blocks, the units in which products are added up in their own dtype: a sum over a block is then the
same number in every process.
"""

import zlib

import numpy as np

BATCH_COST = 64  # fixed cost of a batch, in tokens
MAX_PADDED = 1.05  # padded tokens over tokens


def token_batches(lengths: np.ndarray, tokens_per_batch: int, rope_limit: int | None = None) -> list[np.ndarray]:
    """Indices of the texts of each batch, sorted by length, longest first: a batch that is too large fails at once.

    Cuts between texts of different lengths so that padded tokens plus `BATCH_COST` for each batch are fewest; if that
    still pads by more than a twentieth, as with few texts, a batch counts as cheaper.

    Args:
        lengths: tokens of each text, (n,).
        tokens_per_batch: most padded tokens of a batch; a longer text is a batch of its own.
        rope_limit: texts longer than this and others never share a batch.

    Returns:
        Arrays of indices; every text is in exactly one.
    """
    if rope_limit is not None:
        sides = (np.flatnonzero(lengths > rope_limit), np.flatnonzero(lengths <= rope_limit))
        return [rows[batch] for rows in sides if len(rows) for batch in token_batches(lengths[rows], tokens_per_batch)]
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(-lengths, return_counts=True)
    values, ends = -values, np.concatenate([[0], np.cumsum(counts)])
    cost = float(BATCH_COST)
    groups = cheapest_groups(values, ends, tokens_per_batch, cost)
    while sum(values[i] * (ends[j] - ends[i]) for i, j in groups) > MAX_PADDED * lengths.sum():
        cost /= 2
        groups = cheapest_groups(values, ends, tokens_per_batch, cost)
    sizes = [max(1, tokens_per_batch // int(values[i])) for i, _ in groups]
    return [
        batch
        for (i, j), size in zip(groups, sizes, strict=True)
        for batch in split_rows(order[ends[i] : ends[j]], size)
    ]


def cheapest_groups(values: np.ndarray, ends: np.ndarray, tokens_per_batch: int, cost: float) -> list[tuple[int, int]]:
    """The cut of the different lengths with the fewest padded tokens plus `cost` a batch, from the shortest on.

    Args:
        values: the m different lengths, descending; every text of a group is padded to its first length.
        ends: texts before each of them, (m + 1,).
        tokens_per_batch: as in `token_batches`.
        cost: fixed cost of a batch, in tokens.

    Returns:
        `(i, j)` for each group, of the lengths `values[i:j]`.
    """
    best, cut = np.zeros(len(values) + 1), np.zeros(len(values), dtype=int)
    for i in range(len(values) - 1, -1, -1):  # the best cut of the lengths behind the first group is known by then
        texts = ends[i + 1 :] - ends[i]
        batches = -(-texts // max(1, tokens_per_batch // int(values[i])))
        total = values[i] * texts + cost * batches + best[i + 1 :]
        cut[i] = i + 1 + int(total.argmin())
        best[i] = total.min()
    groups, i = [], 0
    while i < len(values):
        groups.append((i, int(cut[i])))
        i = int(cut[i])
    return groups


def split_rows(rows: np.ndarray, size: int, sides: np.ndarray | None = None) -> list[np.ndarray]:
    """Cuts the rows, in order, into parts of at most `size`, each with rows of one side (`sides`, (n,) bool) alone."""
    groups = [rows] if sides is None else [rows[sides[rows] == side] for side in (True, False)]
    return [part for group in groups if len(group) for part in np.split(group, range(size, len(group), size))]


def token_blocks(batches: list[np.ndarray], lengths: np.ndarray, tokens_per_block: int) -> list[list[np.ndarray]]:
    """Groups the batches into blocks of at least `tokens_per_block` tokens; the last block can have fewer."""
    blocks: list[list[np.ndarray]] = [[]]
    num_tokens = 0
    for rows in batches:
        if num_tokens >= tokens_per_block:
            blocks.append([])
            num_tokens = 0
        blocks[-1].append(rows)
        num_tokens += int(lengths[rows].sum())
    return blocks


def share_of(
    blocks: list[list[np.ndarray]], lengths: np.ndarray, rank: int, num_processes: int
) -> list[tuple[np.ndarray, bool]]:
    """The batches of process `rank`, each with True if it is the last of its block.

    Each block, longest texts first, goes to the process with the least work so far; process 0 gets the first. Every
    text is in exactly one share; with few blocks a share can be empty.
    """
    load, own = np.zeros(num_processes, dtype=np.int64), []
    for block in blocks:
        least = int(load.argmin())
        load[least] += sum(int(lengths[rows].max()) * len(rows) + BATCH_COST for rows in block)
        own += [(rows, rows is block[-1]) for rows in block if least == rank]
    return own


def assign_folds(texts: list[str], num_folds: int) -> np.ndarray:
    """Number of the fold of each text, (n,) int64, by a hash of the text: equal texts share a fold in any order."""
    return np.fromiter((zlib.crc32(text.encode()) % num_folds for text in texts), np.int64)
