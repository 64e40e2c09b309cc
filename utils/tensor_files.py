"""Files of tensors: safetensors that are written in one piece, and checked when they are read.

Beside the tensors a file holds its metadata, a check sum of each tensor (of each layer where several are stacked), and
a seal over all that its header says. What is damaged, or was changed after it was written, is refused where it is read.
"""

import contextlib
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.script import UserError, parse_stored, remedy, write_atomically

FORMAT_VERSION = 3
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"},
}
ITEM_SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
Entries = Mapping[str, tuple[str, tuple[int, ...]]]  # type and shape of each tensor, as the format names them
Sums = dict[str, str | list[str]]  # of each tensor, or of each layer of a stack


# ------------------------------------------------------------------ what tells that a file is whole
def check_sum(content: memoryview) -> str:
    """CRC-32 of a tensor's bytes, eight hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as safetensors has them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def header_seal(metadata: str, sums: str, entries: Entries) -> str:
    """A digest of all that the header of a file says."""
    table = json.dumps(sorted((name, dtype, list(shape)) for name, (dtype, shape) in entries.items()))
    return hashlib.blake2b("\n".join((metadata, sums, table)).encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------ writing
def tensor_header(entries: Entries, metadata: dict, sums: Sums | None = None) -> bytes:
    """What a safetensors file starts with.

    Args:
        entries: in the order in which the data follow.
        metadata: kept as one JSON string.
        sums: of the tensors; None: they are not checked.
    """
    kept = {"json": json.dumps(metadata, allow_nan=False), "sums": json.dumps(sums or {})}
    kept["seal"] = header_seal(kept["json"], kept["sums"], entries)
    header: dict[str, Any] = {"__metadata__": kept}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + ITEM_SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded


def reserve(file: Any, num_bytes: int) -> None:
    """Gives an open file its size; a full disk shows here, and not in the middle of the work."""
    try:
        file.truncate(num_bytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor | list[Tensor]], metadata: dict) -> None:
    """Writes tensors and one JSON string of metadata as safetensors, atomically.

    A list of tensors becomes one, stacked along a first axis; they may be on any device, and are never all copied.
    """
    parts = {name: value if isinstance(value, list) else [value] for name, value in tensors.items()}
    parts = dict(sorted(parts.items(), key=lambda item: -item[1][0].element_size()))  # so that each is aligned
    is_stack = {name: isinstance(tensors[name], list) for name in parts}
    entries = {name: (DTYPES[of[0].dtype], (*[len(of)] * is_stack[name], *of[0].shape)) for name, of in parts.items()}
    unknown: Sums = {name: ["0" * 8] * len(of) if is_stack[name] else "0" * 8 for name, of in parts.items()}
    header = tensor_header(entries, metadata, unknown)
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        reserve(file, len(header) + sum(part.nbytes for of in parts.values() for part in of))
        file.seek(len(header))
        found: dict[str, list[str]] = {name: [] for name in parts}
        for name, part in ((name, part) for name, of in parts.items() for part in of):
            content = as_bytes(part)
            found[name].append(check_sum(content))
            file.write(content)
        file.seek(0)  # the sums are known now, and as long as before
        sums: Sums = {name: of if is_stack[name] else of[0] for name, of in found.items()}
        file.write(tensor_header(entries, metadata, sums))


# ------------------------------------------------------------------ reading
class StoredTensor:
    """One tensor of an open file, read as it is indexed; whole, or a layer of a stack, it is checked."""

    def __init__(self, path: Path, name: str, stored: Any, sums: str | list[str] | None) -> None:
        self.path, self.name, self.stored, self.sums = path, name, stored, sums

    def get_shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.stored.get_shape())

    def __getitem__(self, index: Any) -> Tensor:
        """A part of it.

        Raises:
            UserError: it is not what was written.
        """
        return self.checked(self.stored[index], index)

    def checked(self, part: Tensor, index: Any) -> Tensor:
        """The part at an index, if its check sum is that of the file, or if no such part has one."""
        if isinstance(self.sums, list) and isinstance(index, int):
            is_whole = check_sum(as_bytes(part)) == self.sums[index]
        elif self.sums is not None and isinstance(index, slice) and index == slice(None):
            found = [check_sum(as_bytes(each)) for each in (part if isinstance(self.sums, list) else [part])]
            is_whole = found == (self.sums if isinstance(self.sums, list) else [self.sums])
        else:
            is_whole = True
        if not is_whole:
            raise UserError(f"{self.path} is damaged ({self.name} is not what was written). {remedy(self.path)}")
        return part


class TensorFile:
    """An open file of tensors, with the methods of safetensors."""

    def __init__(self, path: Path, file: Any, sums: Sums) -> None:
        self.path, self.file, self.sums = path, file, sums

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self.file.keys())

    def get_slice(self, name: str) -> StoredTensor:
        """A tensor to be read in parts.

        Raises:
            UserError: there is none of this name.
        """
        if name not in self.keys():
            raise UserError(f"{self.path} has no {name}. {remedy(self.path)}")
        return StoredTensor(self.path, name, self.file.get_slice(name), self.sums.get(name))

    def get_tensor(self, name: str) -> Tensor:
        """A whole tensor, checked."""
        return self.get_slice(name).checked(self.file.get_tensor(name), slice(None))


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[tuple[TensorFile, dict]]:
    """Yields the open file and its metadata.

    Raises:
        UserError: the file is damaged, foreign, of another format version, or was changed after it was written.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            kept = file.metadata() or {}
            metadata = parse_stored(path, kept.get("json", "null"))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}). {remedy(path)}") from None
        except IsADirectoryError:
            raise UserError(f"{path} is a folder, not a file of results. Remove it.") from None
        if not isinstance(metadata, dict) or metadata.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path} was not written by this version. {remedy(path)}")
        entries = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        if kept.get("seal") != header_seal(kept["json"], kept.get("sums", ""), entries):
            raise UserError(f"{path} is damaged, or was changed after it was written. {remedy(path)}")
        yield TensorFile(path, file, json.loads(kept["sums"])), metadata


# ------------------------------------------------------------------ filled in place, by several processes
def start_tensors(file: BinaryIO, header: bytes, shapes: dict[str, tuple[int, ...]]) -> None:
    """Makes an open file a safetensors file of float32 zeros; arguments as those of `map_tensors`."""
    file.truncate(0)
    reserve(file, len(header) + 4 * sum(map(math.prod, shapes.values())))
    file.seek(0)
    file.write(header)
    file.flush()


def map_tensors(file: BinaryIO, header: bytes, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.memmap]:
    """The float32 tensors of an open safetensors file, mapped for writing: for what should not sit in memory.

    Args:
        file: open for reading and writing.
        header: of `tensor_header`, with which it starts.
        shapes: of the tensors, in the order of the header.
    """
    tensors, offset = {}, len(header)
    for name, shape in shapes.items():
        tensors[name] = np.memmap(file, np.float32, "r+", offset=offset, shape=shape)
        offset += tensors[name].nbytes
    return tensors
