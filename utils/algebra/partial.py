"""Guard a pass of cache.py: its sums must fit the memory, and the same command continues it after it was killed.

Each process writes its sums now and then, between blocks, and adds the same numbers in the same order when it
continues: the result is the same, bit for bit. The file of pooled states has a partial name until the pass ends.
"""

import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from utils import results
from utils.algebra.moments import pooled_path
from utils.parallel import num_started, object_of_first, rank, synchronize
from utils.script import UserError, termination_noted


def free_memory(device: torch.device) -> int:
    """Free bytes of a GPU, or the share of free main memory of one process on this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def keep_on_host(num_bytes: list[int], devices: list[torch.device], accumulate_on: str) -> bool:
    """True if main memory keeps the sums: with "cpu", or "auto" and a full GPU. Raises UserError: no room in either."""
    for on_host in {"auto": (False, True), "device": (False,), "cpu": (True,)}[accumulate_on]:
        needed = Counter[torch.device]()
        for device, size in zip(devices, num_bytes, strict=True):
            needed[torch.device("cpu") if on_host or device.type != "cuda" else device] += size
        lacking = [device for device in needed if needed[device] > free_memory(device)]
        if not lacking:
            return on_host
    sizes = f"{needed[lacking[0]] / 1e9:.1f} GB; {lacking[0]} has {free_memory(lacking[0]) / 1e9:.1f} GB free"
    flags = "with fewer --layers, --folds none, --accumulate_on cpu or --device_map auto"
    raise UserError(f"The sums of the pass need {sizes}. Run cache.py {flags}.")


def partial_pooled_path(moments: Path) -> Path:
    """The path of the pooled states until the pass has filled in all of them."""
    return moments.with_suffix(".pooled.partial.npy")


def reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Makes a file of float32 zeros, unless it exists; a full disk fails here, not as a SIGBUS during the pass."""
    if path.is_file():
        return
    np.lib.format.open_memmap(path, "w+", np.float32, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def partial_paths(moments: Path) -> list[Path]:
    """Files of the sums of unfinished passes, made by any number of processes."""
    return sorted(moments.parent.glob(f"{moments.stem}.partial-*-of-*.safetensors"))


def remove_partial(moments: Path) -> None:
    """Removes the sums and pooled states of unfinished passes, and half-written files of dead processes."""
    for path in (partial_pooled_path(moments), *partial_paths(moments)):
        path.unlink(missing_ok=True)
    results.remove_abandoned(moments.parent)


@dataclass
class PartialPass:
    """The saved sums of one process of an unfinished pass."""

    moments: Path  # the file that the pass is to write
    identity: dict[str, Any]  # identity of the result
    run_settings: str  # settings that change the sums of half a pass, but no result
    minutes_per_state: float

    @property
    def path(self) -> Path:
        """The file of this process."""
        return self.moments.with_suffix(f".partial-{rank() + 1}-of-{num_started()}.safetensors")

    def discard_unusable(self, has_pooled: bool, overwrite: bool) -> None:
        """Removes a pass that this run cannot continue, and says why. Raises UserError: damaged, or not its own."""
        for path in partial_paths(self.moments):
            results.check_state(path, self.identity, overwrite)
        paths = partial_paths(self.moments)  # without those that `check_state` removed
        found = {results.read_stored(path)["run_settings"] for path in paths}
        if found == {self.run_settings} and (not has_pooled or partial_pooled_path(self.moments).is_file()):
            return
        if paths:
            needed = "the same --tokens_per_batch, device, processes, environment and pooled states"
            print(f"{paths[0]} needs {needed} to continue: starting anew")
        remove_partial(self.moments)

    def save(self, tensors: dict[str, Tensor], num_batches: int) -> None:
        """Writes the sums over the first `num_batches` batches."""
        own = {"run_settings": self.run_settings, "num_batches": num_batches}
        results.save_tensors(self.path, tensors, self.identity | own)


def remaining_batches(
    partial: PartialPass | None, tensors: dict[str, Tensor], num_tokens: list[int], ends_block: list[bool]
) -> Iterator[int]:
    """Yields the number of each batch that the caller must still add to `tensors`, and shows a progress bar.

    Between blocks, when the sums are complete, it saves them every `minutes_per_state` (or less often, so that writing
    takes at most a twentieth of the time), and on SIGTERM, before it ends the process.
    """
    done, saved, seconds_between = 0, time.monotonic(), 60 * partial.minutes_per_state if partial else 0.0
    if partial and partial.path.is_file():
        with results.open_tensors(partial.path) as (file, metadata):
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
        done = metadata["num_batches"]
        print(f"going on from {partial.path}: {done} batches are done")
    progress = tqdm(total=sum(num_tokens), initial=sum(num_tokens[:done]), desc="cache", unit="token", unit_scale=True)
    with progress, termination_noted() as termination:
        for number in range(done, len(num_tokens)):
            yield number
            progress.update(num_tokens[number])
            if not ends_block[number]:
                continue
            if partial and (termination.is_set() or time.monotonic() - saved >= seconds_between):
                begun = time.monotonic()
                partial.save(tensors, number + 1)
                saved = time.monotonic()
                if seconds_between:  # 0: after each block
                    seconds_between = max(seconds_between, 20 * (saved - begun))
            if termination.is_set():
                sys.exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def resumable_pass(partial: PartialPass, pooled_shape: tuple[int, int, int], overwrite: bool) -> Iterator[Any]:
    """Yields the array for the pooled states of a pass, (layers, n, d), mapped or empty; then renames its file."""
    moments, path, has_pooled = partial.moments, partial_pooled_path(partial.moments), pooled_shape[0] > 0
    if has_pooled and int(os.environ.get("LOCAL_WORLD_SIZE", num_started())) < num_started():
        raise UserError("--save_pooled needs all processes on one machine. Start them on one, or start one process.")
    object_of_first(lambda: partial.discard_unusable(has_pooled, overwrite))
    try:
        if has_pooled:
            object_of_first(lambda: reserve(path, pooled_shape))
        yield np.load(path, mmap_mode="r+") if has_pooled else np.empty(pooled_shape, np.float32)
        synchronize()
        if rank() == 0:
            if has_pooled:  # after the moments: a process that dies in between continues from its sums
                os.replace(path, pooled_path(moments))
            remove_partial(moments)
        synchronize()  # other processes may read the pooled states next
    except BaseException:
        if not partial_paths(moments):
            path.unlink(missing_ok=True)
        raise
