"""Store the pooled states of all texts beside the moments, in `<split>.pooled.npy`: (layers saved, n, d) float32.

All processes fill the file in place, under a partial name; the moments keep the CRC-32 of each layer.
"""

import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.results import REMEDY, read_identity
from utils.script import UserError


def pooled_path(moments: Path) -> Path:
    """The path of the pooled states that belong to a file of moments."""
    return moments.with_suffix(".pooled.npy")


def partial_pooled_path(moments: Path) -> Path:
    """The path of the same file until the pass has filled in all states."""
    return moments.with_suffix(".pooled.partial.npy")


def reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Makes a file of float32 zeros, unless it exists; a full disk fails here, not as a SIGBUS during the pass."""
    if path.is_file():
        return
    np.lib.format.open_memmap(path, "w+", np.float32, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def checksums(pooled: np.ndarray) -> list[int]:
    """CRC-32 of each layer of pooled states (layers, n, d)."""
    return [zlib.crc32(np.ascontiguousarray(layer).data) for layer in pooled]


def open_pooled(moments: Path) -> np.ndarray:
    """The pooled states beside a file of moments as a memory map. Raises UserError if missing or damaged."""
    path = pooled_path(moments)
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or missing ({error}). {REMEDY}") from None


def load_pooled(moments: Path, layer: int) -> Tensor:
    """The pooled states of one layer (-1: the last), (n, d) float32. Raises UserError for states of other moments."""
    pooled, written = open_pooled(moments)[layer].copy(), read_identity(moments)["pooled_crc32"]
    if not written or checksums(pooled[None]) != [written[layer]]:
        raise UserError(f"{pooled_path(moments)} is damaged or belongs to other moments. {REMEDY}")
    return torch.from_numpy(pooled)


def has_pooled(moments: Path, written: list[int], num_layers: int) -> bool:
    """True if the file beside the moments holds the last `num_layers` layers and fits the checksums `written`."""
    if len(written) < num_layers or (num_layers and not pooled_path(moments).is_file()):
        return False
    return not num_layers or checksums(open_pooled(moments)[-1:]) == written[-1:]
