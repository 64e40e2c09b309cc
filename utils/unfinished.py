"""The pass of cache.py while it is under way: its state on disk, and its pooled states, so that a killed run goes on.

Each process keeps a state of its own, written in one piece: whenever the run is killed, each goes on from its last one,
and adds the same numbers in the same order as if nothing had happened.
"""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not on this system: nobody is told that another run writes the same file
    fcntl = None  # type: ignore[assignment]

from utils.models.batches import Step
from utils.parallel import Processes, processes
from utils.results import (
    check_state,
    open_tensors,
    remove_abandoned,
    save_tensors,
    state_if_there_is_place,
)
from utils.script import UserError

Tensors = dict[str, Tensor | list[Tensor]]  # a list holds one tensor of each layer
SHARE_OF_TIME = 1 / 20  # most that the writing of states may take, where one takes long


def states_beside(path: Path) -> list[Path]:
    """The states of unfinished runs that are to be the file of tensors `path`."""
    return sorted(path.parent.glob(f"{path.stem}.state-*-of-*.safetensors"))


def remove_unfinished(path: Path, pooled: Path) -> None:
    """Removes what unfinished runs have left that were to be `path`, of whatever number of processes.

    Their states, whole or half-written, and their pooled states, unless another run is writing them now.
    """
    for state in states_beside(path):
        state.unlink(missing_ok=True)
    for left in path.parent.glob(f"{path.stem}.state-*-of-*.safetensors.*.tmp"):
        remove_abandoned(left.with_name(left.name.rsplit(".", 2)[0]))
    if unfinished_pooled(pooled).is_file() and (file := open_locked(unfinished_pooled(pooled))):
        unfinished_pooled(pooled).unlink(missing_ok=True)
        file.close()


def check_states(path: Path, identity: dict[str, Any], overwrite: bool) -> None:
    """Looks at the states of unfinished runs before the work; with --overwrite those that cannot be used go.

    Raises:
        UserError: one is damaged, or of a run of another identity.
    """
    for state in states_beside(path):
        check_state(state, identity, overwrite)


@dataclass
class Unfinished:
    """The state of one process of a pass."""

    result: Path  # what the pass is to write
    identity: dict[str, Any]  # of the result
    way: dict[str, Any]  # how it is made: changes no number that counts, but a state is of one way only
    team: Processes
    minutes_per_state: float
    usable: bool = True  # whether what belongs to a state that is there is there too
    saved: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # that writing the last state took

    @property
    def path(self) -> Path:
        """Where the state is."""
        name = f"{self.result.stem}.state-{self.team.rank + 1}-of-{self.team.size}.safetensors"
        return self.result.with_name(name)

    def load(self, tensors: Tensors) -> int:
        """Fills the tensors with those of the state; returns the steps it holds, 0 without one to go on from."""
        remove_abandoned(self.path)
        if not self.path.is_file():
            if self.team.rank == 0 and (others := states_beside(self.result)):
                print(f"{others[0]} is of another number of processes: this run starts from the beginning")
            return 0
        with open_tensors(self.path) as (file, metadata):
            differing = [name for name, value in self.way.items() if metadata["way"].get(name) != value]
            if differing or not self.usable:
                why = f"was made with another {', '.join(differing)}" if differing else "has lost its pooled states"
                print(f"{self.path} {why}: this run starts from the beginning")
                return 0
            for name, tensor in numbered(tensors).items():
                tensor.copy_(file.get_tensor(name))
        print(f"going on from {self.path}: {metadata['num_steps']} of {self.way['num_steps']} batches")
        return metadata["num_steps"]

    def save(self, tensors: Tensors, num_steps: int) -> None:
        """Writes the state after so many steps; where it cannot be written the pass goes on without."""
        start = time.monotonic()
        metadata = {**self.identity, "way": self.way, "num_steps": num_steps}
        with state_if_there_is_place():
            save_tensors(self.path, numbered(tensors), metadata)
        self.saved = time.monotonic()
        self.seconds = self.saved - start

    def is_due(self) -> bool:
        """Whether it is time for the next state."""
        return time.monotonic() - self.saved >= max(60 * self.minutes_per_state, self.seconds / SHARE_OF_TIME)


def numbered(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors by name, those of a list as `<name>.<index>`."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        found |= {name: value} if isinstance(value, Tensor) else {f"{name}.{i}": part for i, part in enumerate(value)}
    return found


@dataclass
class Termination:
    """Whether the system has asked the run to end."""

    asked: bool = False


@contextmanager
def termination_noted() -> Iterator[Termination]:
    """SIGTERM, by which clusters announce the end, is noted for the body to ask for, and does not end it."""
    noted = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGTERM, lambda *_: setattr(noted, "asked", True))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------ the pass
class RunningSums(Protocol):
    """What a pass adds to."""

    centres: list[Tensor]  # of each layer, the same in every process
    is_centred: bool

    def tensors(self) -> Tensors:
        """All that changes."""

    def clear(self) -> None:
        """Back to zero, but for the centres."""

    def end_block(self) -> None:
        """Called after the last batch of a block."""

    def settle(self) -> None:
        """Returns when all that was added is in the tensors."""


def run_steps(
    steps: list[Step],
    lengths: np.ndarray,
    sums: RunningSums,
    add_batch: Callable[[np.ndarray], None],
    unfinished: Callable[[int], Unfinished] | None,
    advance: Callable[[float], object] | None = None,
) -> None:
    """Adds the batches of this process, from where an unfinished pass has come to; keeps a state of it now and then.

    With `advance` there is no bar: it is told the share of the tokens in each batch.
    """
    state, team = unfinished(len(steps)) if unfinished else None, processes()
    done = state.load(sums.tensors()) if state else 0
    gives_centres = team.rank == 0 and not done
    if not gives_centres:
        done = share_centres(sums, done)
    num_tokens = [int(lengths[step.rows].sum()) for step in steps]
    total = sum(num_tokens)
    if advance and done:
        advance(sum(num_tokens[:done]) / total)
    with (
        tqdm(total=total, unit="token", unit_scale=True, desc="cache", initial=sum(num_tokens[:done]),
             **{"disable": True} if advance else {}) as progress,
        termination_noted() as termination,
    ):  # fmt: skip
        for number, step in enumerate(steps[done:], done + 1):
            add_batch(step.rows)
            if step.ends_block:
                sums.end_block()
            if gives_centres and number == 1:
                share_centres(sums, number)
            progress.update(num_tokens[number - 1])
            if advance:
                advance(num_tokens[number - 1] / total)
            if state and (termination.asked or (state.is_due() and number < len(steps))):
                sums.settle()
                state.save(sums.tensors(), number)
            if termination.asked:
                sys.exit(128 + signal.SIGTERM)
    sums.settle()


def share_centres(sums: RunningSums, num_steps: int) -> int:
    """Gives all processes the centres of the first; returns the steps in these sums, 0 where they had other centres."""
    own = [centre.clone() for centre in sums.centres]
    processes().from_first(sums.centres)
    sums.is_centred = True
    if all(map(torch.equal, own, sums.centres)):
        return num_steps
    sums.clear()
    return 0


# ------------------------------------------------------------------ pooled states
def tensor_header(shapes: dict[str, tuple[int, ...]], metadata: dict) -> bytes:
    """The start of a safetensors file of float32 tensors, whose data follow in the order of `shapes`."""
    header: dict[str, Any] = {"__metadata__": {"json": json.dumps(metadata, allow_nan=False)}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
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


class PooledFile:
    """The file of pooled states while it is filled, row by row, by all processes of a machine.

    The first process keeps it locked, which ends with the process, however that ends.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict, team: Processes) -> None:
        """Opens what an unfinished run has left, or makes the file anew; called by all processes.

        Raises:
            UserError: the processes are on several machines, or another run is writing the same file.
        """
        if not team.on_one_machine:
            raise UserError("--save_pooled needs all processes on one machine. Start them there, or one alone.")
        self.path, self.unfinished, self.team = path, unfinished_pooled(path), team
        self.header = tensor_header(shapes, metadata)
        self.file: BinaryIO | None = None
        self.is_old = team.object_of_first(self.open_first)  # whether an unfinished run of this kind has left rows
        if self.file and not self.is_old:
            try:
                start_tensors(self.file, self.header, shapes)
            except OSError:
                self.discard()
                raise
        team.wait()
        self.file = self.file or open(self.unfinished, "r+b")  # noqa: SIM115, as long as the run
        self.tensors = map_tensors(self.file, self.header, shapes)

    def open_first(self) -> bool:
        """Opens and locks the file in the first process; whether it is of this run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open_locked(self.unfinished)
        if self.file is None:
            raise UserError(f"Another run is writing {self.path} too. Let it finish, or set --results_dir.")
        return self.file.read(len(self.header)) == self.header

    def finish(self) -> None:
        """Puts the file in its place; called by all processes when every row is in."""
        for tensor in self.tensors.values():
            tensor.flush()
        self.team.wait()
        if self.team.rank == 0:
            os.replace(self.unfinished, self.path)
        self.close()

    def close(self) -> None:
        """Lets another run have the file."""
        if self.file:
            self.file.close()

    def discard(self) -> None:
        """Removes the unfinished file."""
        self.unfinished.unlink(missing_ok=True)
        self.close()


def unfinished_pooled(path: Path) -> Path:
    """Where pooled states are until all are there."""
    return path.with_name(f"{path.name}.unfinished.tmp")


def open_locked(path: Path) -> BinaryIO | None:
    """The file, made where there is none, open and locked by this process; None where another has locked it."""
    while True:
        file = open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))  # noqa: SIM115
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:  # a file system without locks
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # its owner has put it in its place, or removed it, in between
