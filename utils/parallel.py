"""The processes of one run, as torchrun or accelerate launch starts them; without either there is one.

They meet only a few times in a pass. Before they exchange anything each says that it is there, and looks whether
another has failed: a mistake in one process ends all of them, with one sentence, instead of leaving them to wait.
"""

import contextlib
import functools
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

SECONDS_BETWEEN_LOOKS = 0.02
FAILED = "failed"


def rank() -> int:
    """The number of this process; 0 where it is alone. Known before the processes have met."""
    return int(os.environ.get("RANK", 0)) if num_started() > 1 else 0


def num_started() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """The number of this process on its machine, and of the GPU that is its own."""
    return int(os.environ.get("LOCAL_RANK", 0)) if num_started() > 1 else 0


class Processes:
    """All processes of a run, seen from one of them; every method that exchanges something is called by all."""

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.size, self.store, self.num_meetings = rank, size, store, 0

    @property
    def on_one_machine(self) -> bool:
        """Whether all of them share a machine."""
        return self.size == 1 or int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) == self.size

    def wait(self) -> None:
        """Returns when every process has come here; ends this one, without a word, where another has failed."""
        if self.store is None:
            return
        self.num_meetings += 1
        self.say_and_look(f"meeting {self.num_meetings}, ", look=True)

    def leave(self) -> None:
        """Called last; the first process, which may keep what the others look at, goes when they have gone."""
        if self.store is not None:
            self.wait()
            self.say_and_look("left ", look=self.rank == 0)
            dist.destroy_process_group()

    def say_and_look(self, name: str, look: bool) -> None:
        """Says that this process has come to a point; with `look` returns when all have."""
        assert self.store
        keys = [f"{name}{rank}" for rank in range(self.size)]
        try:
            self.store.set(keys[self.rank], "here")
            while look and not self.store.check(keys):
                if self.store.check([FAILED]):
                    raise SystemExit(1)
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except RuntimeError:  # of torch: the process that keeps the store is no longer there
            raise SystemExit(1) from None

    def sum_at_first(self, tensors: list[Tensor]) -> None:
        """Adds up the tensors of all processes, in place, in process 0; what the others hold then is of no use."""
        self.wait()
        for tensor in tensors if self.store else []:
            dist.reduce(tensor, dst=0)

    def from_first(self, tensors: list[Tensor]) -> None:
        """Fills the tensors with those of process 0."""
        self.wait()
        for tensor in tensors if self.store else []:
            dist.broadcast(tensor, src=0)

    def object_of_first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in process 0, where alone it is called."""
        content = [make() if self.rank == 0 else None]
        self.wait()
        if self.store:
            dist.broadcast_object_list(content, src=0)
        return content[0]

    def is_first_to_fail(self) -> bool:
        """Tells the others that this process has failed; whether it is the one to say why."""
        if self.store is None:
            return True
        with contextlib.suppress(RuntimeError):
            if self.store.add(FAILED, 1) == 1:
                return True
        time.sleep(1)  # torchrun ends the others as soon as one ends: the sentence has to be out by then
        return False


@functools.cache
def processes() -> Processes:
    """The processes of this run; meets the others when it is first called."""
    if num_started() == 1:
        return Processes()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    try:
        store, rank, size = next(iter(rendezvous("env://")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                store=store, rank=rank, world_size=size, timeout=timedelta(hours=12))  # fmt: skip
    except (ValueError, RuntimeError) as error:
        why = str(error).partition("\n")[0]  # torch puts a trace of its own behind it
        told = f"WORLD_SIZE says that there are {num_started()} processes, and they cannot meet ({why})"
        raise SystemExit(f"error: {told}. Start them with torchrun.") from None
    met = Processes(rank, size, dist.PrefixStore("run", store))
    met.wait()  # the first, which may keep what the others still need to join, is not to fail and go before they have
    return met


@contextlib.contextmanager
def one_voice(share_work: bool, name: str) -> Iterator[None]:
    """Runs its body in all processes, of which the first alone prints, and one says what went wrong.

    Args:
        share_work: whether the body is for many processes; if not, several are refused.
        name: of the script, for the sentence.
    """
    if num_started() == 1:
        yield
        return
    if not share_work:
        if rank() == 0:
            sys.exit(f"error: {name} runs in one process, not in {num_started()}. Start it with: python {name}")
        sys.exit(0)
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            stack.enter_context(warnings.catch_warnings(action="ignore"))
        of_run = processes()
        try:
            yield
        except SystemExit:
            raise
        except BaseException:
            if of_run.is_first_to_fail():
                raise
            sys.exit(1)
        of_run.leave()


@contextlib.contextmanager
def one_voice_in_parsing() -> Iterator[None]:
    """Lets the first process alone say what is wrong with the command line, before the processes have met."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) if rank() > 0 else contextlib.nullcontext():
            yield
    except SystemExit:
        time.sleep(1 if rank() > 0 else 0)
        raise
