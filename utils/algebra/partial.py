"""An unfinished pass of cache.py on disk, so that the same command continues it after the process was killed.

Each process writes its own sums now and then, in one piece, and adds the same numbers in the same order when it goes
on: the result is the same, bit for bit. Pooled states are filled in place under a partial name, and renamed at the end.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from utils.algebra.pooled import partial_pooled_path, pooled_path, reserve
from utils.parallel import num_started, object_of_first, on_one_machine, rank, synchronize
from utils.results import (
    check_state,
    open_tensors,
    read_identity,
    remove_abandoned,
    save_tensors,
    state_if_there_is_place,
)
from utils.script import UserError, termination_noted


def remove_partial(moments: Path) -> None:
    """Removes the sums and pooled states of unfinished passes, of any number of processes, whole or half-written."""
    for left in moments.parent.glob(f"{moments.stem}.partial-*-of-*.safetensors*"):
        if left.suffix == ".safetensors":
            left.unlink(missing_ok=True)
        else:  # the temporary file of a process, which may live
            remove_abandoned(left.with_name(left.name.rpartition(".safetensors.")[0] + ".safetensors"))
    partial_pooled_path(moments).unlink(missing_ok=True)


@dataclass
class PartialPass:
    """The sums of one process of a pass on disk."""

    moments: Path  # the file that the pass is to write
    identity: dict[str, Any]  # of the result
    run_settings: dict[str, Any]  # change no result, but the sums of half a pass
    minutes_per_state: float
    saved: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """The file of this process."""
        name = f"{self.moments.stem}.partial-{rank() + 1}-of-{num_started()}.safetensors"
        return self.moments.with_name(name)

    def paths(self) -> list[Path]:
        """The files of all processes, of any number."""
        return sorted(self.moments.parent.glob(f"{self.moments.stem}.partial-*-of-*.safetensors"))

    def discard_unusable(self, has_pooled: bool, overwrite: bool) -> None:
        """Removes the files of passes that cannot be continued, with a sentence; called by the first process.

        Raises:
            UserError: a file is damaged or of another identity; with `overwrite` it is removed.
        """
        for path in self.paths():
            check_state(path, self.identity, overwrite)
        lost = has_pooled and not partial_pooled_path(self.moments).is_file()
        reasons = {"no pooled states": None} if lost else {}
        for path in self.paths():
            stored = read_identity(path)["run_settings"]
            reasons |= {f"another {name}": None for name in stored if stored[name] != self.run_settings[name]}
        if self.paths() and reasons:
            print(f"{self.paths()[0]} has {', '.join(reasons)}: starting anew")
        if not self.paths() or reasons:
            remove_partial(self.moments)

    def load(self, tensors: dict[str, Tensor]) -> int:
        """Fills the sums from the file of this process; returns the number of batches in them, 0 without a file."""
        if not self.path.is_file():
            return 0
        with open_tensors(self.path) as (file, metadata):
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
        print(f"going on from {self.path}: {metadata['num_batches']} batches are done")
        return metadata["num_batches"]

    def save(self, tensors: dict[str, Tensor], num_batches: int) -> None:
        """Writes the sums after so many batches; where they cannot be written the pass goes on without."""
        with state_if_there_is_place():
            metadata = {**self.identity, "run_settings": self.run_settings, "num_batches": num_batches}
            save_tensors(self.path, tensors, metadata)
        self.saved = time.monotonic()


def remaining_batches(partial: PartialPass | None, tensors: dict[str, Tensor], num_tokens: list[int]) -> Iterator[int]:
    """Yields the number of each batch that is still to be added to `tensors`, and shows a bar.

    Writes the sums when it is time, and at SIGTERM, by which clusters announce the end; then the process ends.

    Args:
        partial: the sums of an unfinished pass; None: they are not kept.
        tensors: all sums; filled from the file of an unfinished pass.
        num_tokens: of each batch of this process.
    """
    done = partial.load(tensors) if partial else 0
    progress = tqdm(total=sum(num_tokens), initial=sum(num_tokens[:done]), desc="cache", unit="token", unit_scale=True)
    with progress, termination_noted() as termination:
        for number in range(done, len(num_tokens)):
            yield number
            progress.update(num_tokens[number])
            if partial:
                is_due = time.monotonic() - partial.saved >= 60 * partial.minutes_per_state
                if termination.is_set() or (is_due and number + 1 < len(num_tokens)):
                    partial.save(tensors, number + 1)
            if termination.is_set():
                sys.exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def resumable_pass(partial: PartialPass, pooled_shape: tuple[int, ...] | None, overwrite: bool) -> Iterator[Any]:
    """Encloses a pass: yields its pooled states (layers, n, d) as a memory map, or None; at the end all is in place.

    Raises:
        UserError: the processes of a pass with pooled states are on several machines.
    """
    path = partial_pooled_path(partial.moments)
    if pooled_shape and not on_one_machine():
        raise UserError("--save_pooled needs all processes on one machine. Start them there, or one alone.")
    object_of_first(lambda: partial.discard_unusable(bool(pooled_shape), overwrite))
    try:
        if pooled_shape:
            object_of_first(lambda: reserve(path, pooled_shape))
        yield np.load(path, mmap_mode="r+") if pooled_shape else None
        synchronize()
        if rank() == 0:
            if pooled_shape:  # after the moments: a process that is killed in between continues from its sums
                os.replace(path, pooled_path(partial.moments))
            else:  # those of former moments
                pooled_path(partial.moments).unlink(missing_ok=True)
            remove_partial(partial.moments)
        synchronize()  # the others may read the pooled states next
    except BaseException:
        if not partial.paths():
            path.unlink(missing_ok=True)
        raise
