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

from utils.algebra.pooled import has_shape, partial_pooled_path, pooled_path, reserve
from utils.parallel import processes
from utils.results import check_state, open_tensors, remove_abandoned, save_tensors, state_if_there_is_place
from utils.script import UserError, termination_noted

MOST_OF_TIME = 1 / 20  # share of the time that writing sums may take


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
    minutes_per_state: float
    run_settings: dict[str, Any]  # change no result, but the sums of half a pass
    saved: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # that the last writing took

    @property
    def path(self) -> Path:
        """The file of this process."""
        world = processes()
        name = f"{self.moments.stem}.partial-{world.rank + 1}-of-{world.size}.safetensors"
        return self.moments.with_name(name)

    def paths(self) -> list[Path]:
        """The files of all processes, of any number."""
        return sorted(self.moments.parent.glob(f"{self.moments.stem}.partial-*-of-*.safetensors"))

    def discard_unusable(self, pooled_shape: tuple[int, ...] | None, overwrite: bool) -> None:
        """Removes the files of passes that cannot be continued, with a sentence; called by the first process.

        Raises:
            UserError: a file is damaged or of another identity; with `overwrite` it is removed.
        """
        for path in self.paths():
            check_state(path, self.identity, overwrite)
        reasons = []
        for path in self.paths():
            with open_tensors(path) as (_, metadata):
                stored = metadata["run_settings"]
            reasons += [name for name, value in self.run_settings.items() if stored.get(name) != value]
        if reasons:
            print(f"{self.paths()[0]} was made with another {', '.join(dict.fromkeys(reasons))}: starting anew")
        elif self.paths() and pooled_shape and not has_shape(partial_pooled_path(self.moments), pooled_shape):
            print(f"{self.paths()[0]} has lost its pooled states: starting anew")
        elif self.paths():
            return
        remove_partial(self.moments)

    def load(self, tensors: dict[str, Tensor]) -> int:
        """Fills the sums from the file of this process; returns the number of batches in them."""
        with open_tensors(self.path) as (file, metadata):
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
        print(f"going on from {self.path}: {metadata['num_batches']} batches are done")
        return metadata["num_batches"]

    def save(self, tensors: dict[str, Tensor], num_batches: int) -> None:
        """Writes the sums after so many batches; where they cannot be written the pass goes on without."""
        start = time.monotonic()
        with state_if_there_is_place():
            metadata = {**self.identity, "run_settings": self.run_settings, "num_batches": num_batches}
            save_tensors(self.path, tensors, metadata)
        self.saved = time.monotonic()
        self.seconds = self.saved - start

    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self.saved >= max(60 * self.minutes_per_state, self.seconds / MOST_OF_TIME)


def remaining_batches(partial: PartialPass | None, tensors: dict[str, Tensor], num_tokens: list[int]) -> Iterator[int]:
    """Yields the number of each batch that is still to be added to `tensors`, and shows a bar.

    Writes the sums when it is time, and at SIGTERM, by which clusters announce the end; then the process ends.

    Args:
        partial: the sums of an unfinished pass; None: they are not kept.
        tensors: all sums; filled from the file of an unfinished pass.
        num_tokens: of each batch of this process.
    """
    done = partial.load(tensors) if partial and partial.path.is_file() else 0
    progress = tqdm(total=sum(num_tokens), initial=sum(num_tokens[:done]), desc="cache", unit="token", unit_scale=True)
    with progress, termination_noted() as termination:
        for number in range(done, len(num_tokens)):
            yield number
            progress.update(num_tokens[number])
            if partial and (termination.asked or (partial.is_due() and number + 1 < len(num_tokens))):
                partial.save(tensors, number + 1)
            if termination.asked:
                sys.exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def resumable_pass(partial: PartialPass, pooled_shape: tuple[int, ...] | None, overwrite: bool) -> Iterator[Any]:
    """Encloses a pass: yields its pooled states (layers, n, d) as a memory map, or None; at the end all is in place.

    Raises:
        UserError: the processes of a pass with pooled states are on several machines.
    """
    path, world = partial_pooled_path(partial.moments), processes()
    if pooled_shape and not world.on_one_machine:
        raise UserError("--save_pooled needs all processes on one machine. Start them there, or one alone.")
    world.object_of_first(lambda: partial.discard_unusable(pooled_shape, overwrite))
    try:
        if pooled_shape:
            world.object_of_first(lambda: reserve(path, pooled_shape))
        yield np.load(path, mmap_mode="r+") if pooled_shape else None
        world.wait()
        if world.rank == 0:
            if pooled_shape:  # after the moments: a process that is killed in between continues from its sums
                os.replace(path, pooled_path(partial.moments))
            else:  # those of former moments
                pooled_path(partial.moments).unlink(missing_ok=True)
            remove_partial(partial.moments)
    except BaseException:
        if not partial.paths():
            path.unlink(missing_ok=True)
        raise
