"""What a pass will need, of memory and of disk, from the configuration of the model alone: said and checked before it.

Counted is what is alive at once. The C library gives arrays below 32 MB back to itself and not to the system: of a
small batch on the CPU a process can then hold half as much again.

d hidden size, f feed-forward size; q and k width of all queries and of all keys; sizes in bytes.
"""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedConfig

from utils.algebra.moment_sums import Sizes
from utils.algebra.products import Precision, dtype_of, num_copies
from utils.models.identity import read_config
from utils.models.load import auto_class_of
from utils.parallel import num_started
from utils.script import UserError
from utils.settings import Model, Run

UNSURE = 1.2  # the estimate may be off by so much; what needs more than this times the free memory is refused


def num_parameters(model: Model, run: Run) -> int:
    """Parameters of the causal LM, each once however many modules share it, from the configuration alone.

    Raises:
        UserError: it is of no causal LM.
    """
    config = read_config(model, run)
    with torch.device("meta"):
        made = auto_class_of(model, config).from_config(config, trust_remote_code=run.trust_remote_code)
        made.tie_weights()
    return sum(parameter.numel() for parameter in made.parameters())


def batch_bytes(config: PreTrainedConfig, num_tokens: int, item: int, product_item: int) -> int:
    """Most that is alive beside weights and sums while a batch is run, for a dense decoder as LLaMA's or Qwen2's.

    Embeddings, the input of the layer and the normed input of attention or feed-forward are alive in all of them.

    Args:
        config: of the decoder.
        num_tokens: padded tokens of the batch.
        item: bytes of a number of the model.
        product_item: bytes of a number of the products.
    """
    d = config.hidden_size
    f = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * d
    num_heads = getattr(config, "num_attention_heads", None) or 1
    head = getattr(config, "head_dim", None) or d // num_heads
    q, k = head * num_heads, head * (getattr(config, "num_key_value_heads", None) or num_heads)
    attention = item * (3 * d + 4 * q + 3 * k)  # queries and three arrays of their rotation, keys, values, rotated keys
    feed_forward = item * (4 * d + 3 * f)  # the residual too; gate, up and their product
    adding = item * 3 * d + 8 * d + product_item * 2 * d  # the layer's output; prefix sums; pairs
    return num_tokens * max(attention, feed_forward, adding)


def matrix_bytes(config: PreTrainedConfig, product_item: int) -> int:
    """What is alive for a moment, between batches, while one layer's products become float64: (d, 2d) of them.

    First their triangle is mirrored, by three matrices of their own dtype.
    """
    return max(3 * product_item, 16 if product_item < 8 else 0) * config.hidden_size**2


@dataclass(frozen=True)
class Need:
    """What a pass needs of each kind, in bytes, of one process."""

    weights: int
    sums: int  # float64
    block: int  # products in their own dtype
    batch: int
    matrices: int  # at the end of a block
    pooled: int  # on disk
    num_tokens: int  # of a batch

    @classmethod
    def of(
        cls, config: PreTrainedConfig, sizes: Sizes, precision: Precision, item: int, *, weights: int, num_tokens: int,
        pooled: int = 0,
    ) -> "Need":  # fmt: skip
        """Of a pass with sums of these sizes.

        Args:
            config: of the decoder.
            sizes: of the sums.
            precision: of the products.
            item: bytes of a number of the model.
            weights, num_tokens, pooled: as the fields.
        """
        product_item = dtype_of(precision).itemsize
        return cls(
            weights=weights,
            sums=8 * sizes.num_numbers,
            block=product_item * sizes.num_layers * 2 * sizes.hidden_size**2,
            batch=batch_bytes(config, num_tokens, item, num_copies(precision) * product_item),
            matrices=matrix_bytes(config, product_item),
            pooled=pooled,
            num_tokens=num_tokens,
        )

    @property
    def memory(self) -> int:
        """All that is in one memory if the model runs on the CPU."""
        return self.weights + self.sums + self.block + max(self.batch, self.matrices)

    @property
    def state(self) -> int:
        """What one state of an unfinished pass has on disk."""
        return self.sums + self.block


CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# limit, use, and what of the use are files that the system gives back: in version 2 and in version 1
VERSION_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def own_cgroups() -> Iterator[tuple[Path, tuple[str, str, tuple[str, str]]]]:
    """The folders of the containers and jobs of clusters that this process is in, and the files to read there."""
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else ():
        _, controllers, place = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top, files = (CGROUPS / "memory", VERSION_1) if controllers else (CGROUPS, VERSION_2)
            folder = top / place.strip("/")
            yield from ((within, files) for within in (folder, *folder.parents) if within.is_relative_to(top))


def free_in_cgroups() -> float:
    """What the limits of containers and of jobs still give, in bytes; infinite where there are none."""
    free = math.inf
    for folder, (limit, use, of_files) in own_cgroups():
        if (folder / limit).is_file() and (most := (folder / limit).read_text().strip()).isdecimal():
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            given_back = sum(int(stat.get(name, 0)) for name in of_files)
            free = min(free, int(most) - int((folder / use).read_text()) + given_back)
    return free


def free_host_memory() -> int:
    """What the system, and the container or the job of a cluster, still gives."""
    return int(min(psutil.virtual_memory().available, free_in_cgroups()))


def free_memory(device: torch.device) -> int:
    """Free memory of a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()


def free_disk(path: Path) -> int:
    """Free space where `path` is to be."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    return shutil.disk_usage(folder).free


def gigabytes(num_bytes: float) -> str:
    """A size for people."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def keep_on_host(need: Need, device: torch.device, accumulate_on: str) -> bool:
    """Whether the sums are kept in the host's memory: as asked for, and by `auto` where they do not fit the device."""
    if accumulate_on != "auto" or device.type == "cpu":
        return accumulate_on == "cpu"
    return need.memory * UNSURE > free_memory(device)


def num_sharing() -> int:
    """How many processes of this run share the memory of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if num_started() > 1 else 1


def check_training_fits(weights: int, gradients: int, device: torch.device) -> None:
    """Prints what training needs at least, in each process, before a model is loaded.

    Args:
        weights: bytes of all parameters.
        gradients: bytes of those of the trained ones; Adafactor keeps hardly more.
        device: of the model.

    Raises:
        UserError: not even that fits.
    """
    times = num_sharing() if device.type == "cpu" else 1
    print(
        f"needs about {gigabytes(weights)} for weights and {gigabytes(gradients)} for gradients"
        f"{f', {times} times' if times > 1 else ''}; what a batch keeps for its backward pass comes on top"
    )
    asked, free = times * (weights + gradients), free_memory(device)
    if asked > UNSURE * free:
        raise UserError(
            f"{device} has {gigabytes(free)} free and about {gigabytes(asked)} would be needed. "
            "Try lora_finetuning.py instead of full fine-tuning, --dtype bfloat16 there, or a smaller --model_name."
        )


def check_fits(need: Need, device: torch.device, path: Path, on_host: bool, spread: bool) -> None:
    """Prints what a pass needs and what is free.

    Args:
        need: of one process.
        device: of the model.
        path: of the moments.
        on_host: the sums are in the host's memory.
        spread: the model is put where there is room, on all devices.

    Raises:
        UserError: it cannot fit.
    """
    here = num_sharing()
    on_disk = need.sums + need.pooled
    print(
        f"needs about {gigabytes(need.weights)} for weights, {gigabytes(need.sums + need.block)} for sums and "
        f"{gigabytes(need.batch)} for a batch of {need.num_tokens:,} tokens{f', {here} times' if here > 1 else ''}; "
        f"on disk {gigabytes(on_disk)}, and {gigabytes(2 * here * need.state)} while it runs"
    )
    by_memory = {str(device): need.memory * (here if device.type == "cpu" else 1)}
    if device.type == "cuda" and on_host:  # products of a batch and matrices at once
        by_memory = {str(device): need.weights + need.batch + 2 * need.matrices, "cpu": here * need.sums}
    free = {name: free_memory(torch.device(name)) for name in by_memory}
    elsewhere = ", --accumulate_on cpu" if device.type == "cuda" else ""
    for name, asked in by_memory.items():
        if asked > UNSURE * free[name] and not spread:
            raise UserError(
                f"{name} has {gigabytes(free[name])} free and about {gigabytes(asked)} would be needed. Try --dtype "
                f"bfloat16, fewer --layers, --folds none, a smaller --tokens_per_batch{elsewhere} or "
                "--device_map auto."
            )
        if asked > free[name] and not spread:
            print(f"{name} has {gigabytes(free[name])} free: that may not be enough")
    if on_disk > (there := free_disk(path)):
        raise UserError(
            f"{path.parent} has {gigabytes(there)} free, {gigabytes(on_disk)} would be needed. Free space, set "
            "--results_dir, or keep fewer --layers."
        )
