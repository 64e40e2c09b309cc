"""Form batches of texts of like length, so that little of them is padding, and share them among processes.

Each process takes whole blocks, within which products add up in low precision: the sum of a block is the same number
in every process.
"""

import zlib

import numpy as np

MAX_PADDED = 1.05  # padded tokens over tokens


def token_batches(lengths: np.ndarray, tokens_per_batch: int, rope_limit: int | None = None) -> list[np.ndarray]:
    """Indices of the texts of each batch, sorted by length, longest first: a batch that is too large fails at once.

    A new batch begins where one more text would exceed `tokens_per_batch`, or would raise the padding of all batches so
    far above a twentieth of their tokens; a longer text is a batch of its own. `lengths` (n,) are tokens of each text;
    texts longer than `rope_limit` and others never share a batch.
    """
    if rope_limit is not None:
        sides = (np.flatnonzero(lengths > rope_limit), np.flatnonzero(lengths <= rope_limit))
        return [rows[batch] for rows in sides if len(rows) for batch in token_batches(lengths[rows], tokens_per_batch)]
    order = np.argsort(-lengths, kind="stable")
    ordered, starts = lengths[order].tolist(), [0]
    num_tokens = num_padded = 0  # of all texts up to this one; of the batches that have ended
    for position, length in enumerate(ordered):
        num_tokens += length
        longest, num_before = ordered[starts[-1]], position - starts[-1]
        padded = (num_before + 1) * longest
        if num_before and (padded > tokens_per_batch or num_padded + padded > MAX_PADDED * num_tokens):
            num_padded += num_before * longest
            starts.append(position)
    return np.split(order, starts[1:])


def split_rows(rows: np.ndarray, size: int, sides: np.ndarray | None = None) -> list[np.ndarray]:
    """Cuts the rows, in order, into parts of at most `size`, each with rows of one side (`sides`, (n,) bool) alone."""
    groups = [rows] if sides is None else [rows[sides[rows] == side] for side in (True, False)]
    return [part for group in groups if len(group) for part in np.split(group, range(size, len(group), size))]


def share_of(
    batches: list[np.ndarray], lengths: np.ndarray, tokens_per_block: int, rank: int, num_processes: int
) -> list[tuple[np.ndarray, bool]]:
    """The batches of process `rank`, each with True if it is the last of its block.

    A block is successive batches of at least `tokens_per_block` tokens, the last of any number. Each block, longest
    texts first, goes to the process with the least work so far; with few blocks a share can be empty.
    """
    load, own, block = np.zeros(num_processes, dtype=np.int64), [], []
    for number, rows in enumerate(batches, 1):
        block.append(rows)
        if number == len(batches) or sum(int(lengths[rows].sum()) for rows in block) >= tokens_per_block:
            least = int(load.argmin())
            load[least] += sum(int(lengths[rows].max()) * len(rows) for rows in block)
            own += [(rows, rows is block[-1]) for rows in block if least == rank]
            block = []
    return own


def assign_folds(texts: list[str], num_folds: int) -> np.ndarray:
    """Fold number of each text, (n,) int64, from a hash of the text: equal texts share a fold, in any order."""
    return np.fromiter((zlib.crc32(text.encode()) % num_folds for text in texts), np.int64)
