"""The processes of one run, as torchrun or accelerate launch starts them; without either there is one.

torch.distributed connects them. A process that fails closes its connections, which ends the others at their next
exchange: a mistake in one process ends all of them, with one sentence.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous


def num_started() -> int:
    """Number of processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Number of this process, 0 for a single one; known before the processes are connected."""
    return int(os.environ.get("RANK", 0)) if num_started() > 1 else 0


def local_rank() -> int:
    """Number of this process on its machine, and of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if num_started() > 1 else 0


@dataclass(frozen=True)
class Processes:
    """All processes of a run; each of them calls every method that exchanges something."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None  # None: there is one process

    @property
    def on_one_machine(self) -> bool:
        """True if all processes share a machine."""
        return self.size == 1 or int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) == self.size

    def synchronize(self) -> None:
        """Barrier across ranks; ends this process, without a word, if another one has ended."""
        try:
            if self.store:
                dist.barrier()
        except RuntimeError:  # the connection is closed; the other process says why
            raise SystemExit(1) from None

    def leave(self) -> None:
        """Disconnects the processes; called last."""
        self.synchronize()
        if self.store:
            dist.destroy_process_group()

    def sum_at_first(self, tensors: list[Tensor]) -> None:
        """Adds up the tensors of all processes, in place, in process 0; those of the others become meaningless."""
        self.synchronize()
        for tensor in tensors if self.store else []:
            dist.reduce(tensor, dst=0)

    def object_of_first(self, make: Callable[[], Any]) -> Any:
        """Calls `make` in process 0 alone and returns its value in every process."""
        content = [make() if self.rank == 0 else None]
        self.synchronize()
        if self.store:
            dist.broadcast_object_list(content, src=0)
        return content[0]

    def is_first_to_fail(self) -> bool:
        """Records that this process has failed; True if no other one has failed before."""
        try:
            return self.store is None or self.store.add("failed", 1) == 1
        except RuntimeError:  # process 0 keeps the store and has ended
            return False


@functools.cache
def processes() -> Processes:
    """The processes of this run; the first call connects them."""
    if num_started() == 1:
        return Processes()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(iter(rendezvous("env://")))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(hours=12))
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]  # a trace by torch follows
        message = f"error: WORLD_SIZE says that there are {num_started()} processes, and they cannot meet ({reason})"
        raise SystemExit(f"{message}. Start them with torchrun.") from None
    connected = Processes(rank, size, dist.PrefixStore("run", store))
    connected.synchronize()  # process 0 may keep the store that the others need to connect: it must not fail before
    return connected


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Runs its body in all processes; the first one alone prints, and one of them reports an error."""
    if num_started() == 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            world = processes()  # before accelerate would connect them
            yield
            world.leave()
        except SystemExit:
            time.sleep(1 if rank() > 0 else 0)  # torchrun ends all processes as soon as one ends: first the message
            raise
        except BaseException:
            if world.is_first_to_fail():
                raise
            time.sleep(1)
            sys.exit(1)
