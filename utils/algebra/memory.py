"""Check that the sums of a pass fit the free memory, before cache.py allocates them."""

import os
from collections import Counter

import psutil
import torch

from utils.script import UserError


def free_memory(device: torch.device) -> int:
    """Free bytes of a GPU, or the share of free main memory of one process on this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def keep_on_host(num_bytes: list[int], devices: list[torch.device], accumulate_on: str) -> bool:
    """True if main memory keeps the sums of each layer: with "cpu", or with "auto" if they do not fit the GPU.

    Raises UserError if they do not fit the memory that `accumulate_on` allows.
    """
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
