"""Sums in the host's memory of what devices compute: for models whose sums do not fit beside their weights."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

NUM_UNDER_WAY = 2  # matrices that may be between a device and its sum


class HostSums:
    """Adds matrices of a device to sums on the host, in order, while the device and the caller go on."""

    def __init__(self) -> None:
        self.worker = ThreadPoolExecutor(1)
        self.under_way: deque[Future] = deque()
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def add(self, total: Tensor, value: Tensor) -> None:
        """`total += value`, at the latest when `wait` returns; a copy through pinned memory, on a stream of its own."""
        if value.device.type != "cuda":
            total += value
            return
        while len(self.under_way) >= NUM_UNDER_WAY:
            self.under_way.popleft().result()
        stream = self.streams.setdefault(value.device, torch.cuda.Stream(value.device))
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            copied = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            copied.copy_(value, non_blocking=True)
            value.record_stream(stream)  # its memory is not given to another before
            done = stream.record_event()
        self.under_way.append(self.worker.submit(self.add_copied, total, copied, done))

    @staticmethod
    def add_copied(total: Tensor, copied: Tensor, done: torch.cuda.Event) -> None:
        """Adds what has been copied."""
        done.synchronize()
        total += copied

    def wait(self) -> None:
        """Returns when everything is added."""
        while self.under_way:
            self.under_way.popleft().result()
