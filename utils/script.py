"""The start and end of every script: command line, errors that a user can fix, environment, seed and device."""

import errno
import importlib.metadata
import os
import platform
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from utils.parallel import local_rank, num_started, one_voice, one_voice_in_parsing

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate", "scikit-learn", "numpy", "scipy", "safetensors")


CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
NO_PLACE = (*CANNOT_WRITE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP)


class UserError(Exception):
    """A mistake the user can fix; the message says what was sought, what was found, and what fixes it."""


def parse(config_class: type, arguments: Sequence[str] | None = None, description: str | None = None) -> Any:
    """The config that a command line gives; the groups of settings leave no trace in the names of the flags."""
    return tyro.cli(config_class, args=arguments, description=description, config=(tyro.conf.OmitArgPrefixes,))


def run_script(
    main: Callable[[Any], None], config_class: type, description: str | None, share_work: bool = False
) -> None:
    """Parses the command line and runs `main`; a user's mistake ends in one line and exit code 1, not a traceback.

    Args:
        main: the script.
        config_class: its settings.
        description: of `--help`.
        share_work: whether processes that torchrun has started share its work; several are refused if not.
    """
    with one_voice_in_parsing():
        config = parse(config_class, description=description)
    debug = getattr(getattr(config, "run", None), "debug", False)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` runs
    try:
        with one_voice(share_work, Path(sys.argv[0]).name):
            main(config)
        sys.stdout.flush()  # what is wrong with it shows here
    except UserError as error:
        if debug:
            traceback.print_exc()
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left behind", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # who read what is printed has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python says so once more at its end
        sys.exit(141)  # what a shell says of SIGPIPE
    except OSError as error:
        if error.errno not in NO_PLACE or debug:
            raise
        sys.exit(f"error: {cannot_write(error)}")
    finally:
        signal.signal(signal.SIGTERM, before)


def cannot_write(error: OSError) -> str:
    """The sentence about a file that cannot be written."""
    name = str(error.filename or "the result")
    name = name if len(name) <= 200 else f"{name[:200]}..."
    return f"cannot write {name}: {error.strerror}. Free space or set --results_dir."


# ------------------------------------------------------------------ names and paths
def path_name(name: str) -> str:
    """The folder name of a model or dataset: `Qwen/Qwen2-0.5B` -> `Qwen__Qwen2-0.5B`, a local path -> its stem."""
    path = Path(name)
    if path.is_file() or path.suffix == ".gguf":  # also when the file is gone
        return path.stem
    if path.is_dir():
        return path.resolve().name
    return name.strip("/").replace("/", "__")


# ------------------------------------------------------------------ provenance
def environment() -> dict:
    """Versions of Python and the libraries, the platform, and this repository's git commit (None outside git)."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git_commit": described.stdout.strip() or None,
    }


def set_seed(seed: int) -> None:
    """Seeds Python, numpy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, libraries still draw from the legacy state
    torch.manual_seed(seed)


def pick_device(device: str) -> torch.device:
    """The device named; `auto` takes the GPU if there is one, of many processes each its own.

    Raises:
        UserError: the device does not exist here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type == "cuda" and num_started() > 1:
            chosen = torch.device("cuda", local_rank())
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {device} cannot be used here ({str(error).splitlines()[0]}). Try --device cpu."
        ) from None
    return chosen
