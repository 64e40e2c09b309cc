"""Processes that tests start without a new interpreter: forks, alone or as the ranks of one run."""

import contextlib
import faulthandler
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from accelerate.state import AcceleratorState
from tqdm import tqdm

from utils.parallel import one_voice

FORK = multiprocessing.get_context("fork")


def give_bars_own_lock() -> None:
    """Forks share the lock of progress bars, and it stays locked if its holder is killed."""
    kinds = [tqdm]
    for kind in kinds:
        kind.set_lock(threading.RLock())
        kinds += kind.__subclasses__()


def start(
    run: Callable[[int], object], size: int = 1, output: Path | None = None, whole: bool = False
) -> list[BaseProcess]:
    """Starts `run(rank)` in `size` processes that torchrun could have started; their stderr goes behind `output`.

    `whole`: `run` is a whole script, and not only its `main`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def be(rank: int) -> None:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        if size > 1:
            os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
        faulthandler.dump_traceback_later(45, file=sys.__stderr__)  # of a process that hangs
        give_bars_own_lock()
        AcceleratorState._reset_state(reset_partial_state=True)  # the parent may have trained
        if output is not None:
            sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115, open as long as the process lives
        with contextlib.nullcontext() if whole else one_voice():
            run(rank)

    started = [FORK.Process(target=be, args=(rank,)) for rank in range(size)]
    for process in started:
        process.start()
    return started


def exit_codes(started: list[BaseProcess], seconds: float = 60) -> list[int | None]:
    """Waits for the processes; one that hangs fails the test, after all are killed."""
    for process in started:
        process.join(seconds)
    hanging = [process for process in started if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "a process hangs; its traceback is on stderr"
    return [process.exitcode for process in started]
