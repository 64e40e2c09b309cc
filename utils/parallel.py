"""Connect the processes of one run, which torchrun or accelerate launch starts; without either the run has one.

Every process must call each function that exchanges data. A process that fails closes its connections, and the others
end at their next exchange: a mistake in one process ends all of them, with one sentence.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous


def num_started() -> int:
    """Number of processes that torchrun or accelerate started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, 0 for a single one; works before `connect`."""
    return int(os.environ.get("RANK", 0)) if num_started() > 1 else 0


def local_rank() -> int:
    """The number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def synchronize() -> None:
    """Barrier across ranks; if another process has ended, ends this one silently."""
    try:
        if num_started() > 1:
            dist.barrier()
    except RuntimeError:  # the connection is closed; the other process says why
        raise SystemExit(1) from None


def sum_at_first(tensors: list[Tensor]) -> None:
    """Adds up the tensors of all processes, in place, in process 0; those of the others become meaningless."""
    synchronize()
    for tensor in tensors if num_started() > 1 else []:
        dist.reduce(tensor, dst=0)


def object_of_first(make: Callable[[], Any]) -> Any:
    """Calls `make` in process 0 alone and returns its value in every process."""
    content = [make() if rank() == 0 else None]
    synchronize()
    if num_started() > 1:
        dist.broadcast_object_list(content, src=0)
    return content[0]


def connect() -> dist.Store:
    """Connects the processes; returns a store that they share."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, number, size = next(iter(rendezvous("env://")))
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=timedelta(hours=12))
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]  # a trace by torch follows
        message = f"error: WORLD_SIZE says that there are {num_started()} processes, and they cannot meet ({reason})"
        raise SystemExit(f"{message}. Start them with torchrun.") from None
    synchronize()  # process 0 may keep the store that the others need to connect: it must not fail before
    return dist.PrefixStore("run", store)


def leave() -> None:
    """Disconnects the processes; called last."""
    synchronize()
    if num_started() > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Runs its body in all processes; only the first one prints, and only one reports an error."""
    if num_started() == 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            store = connect()  # before accelerate would do it
            yield
            leave()
        except SystemExit:
            time.sleep(1 if rank() > 0 else 0)  # torchrun ends all processes once one ends: let the message come first
            raise
        except BaseException:
            try:
                num_failed = store.add("failed", 1)
            except RuntimeError:  # process 0 keeps the store and has ended
                num_failed = 2
            if num_failed == 1:
                raise
            time.sleep(1)
            sys.exit(1)
