"""Start and end every script: command line, errors that a user can fix, environment and device."""

import errno
import importlib.metadata
import io
import os
import platform
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import tyro

from utils.parallel import local_rank, num_started, one_voice
from utils.settings import expand

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate", "scikit-learn", "numpy", "scipy", "safetensors")

NO_PLACE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP),
)


class UserError(Exception):
    """A mistake that the user can fix; its message names the expected input, the fault and the remedy."""


def warn(message: str) -> None:
    """Prints a warning to stderr."""
    print(f"warning: {message}", file=sys.stderr)


def parse(config_class: type, arguments: Sequence[str] | None = None, description: str | None = None) -> Any:
    """Parses a command line into a config; flags do not name the group of a setting."""
    config: Any = tyro.cli(config_class, args=arguments, description=description, config=(tyro.conf.OmitArgPrefixes,))
    expand(config)
    return config


def run_script(
    main: Callable[[Any], Any], config_class: type, description: str | None, share_work: bool = False
) -> None:
    """Parses the command line and runs `main`; a user's mistake ends in one line and exit code 1, not a traceback.

    Without `share_work` it refuses to run in several processes, such as those of torchrun.
    """
    debug = False
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # runs `finally` blocks
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may hold characters that the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            with one_voice():
                config: Any = parse(config_class, description=description)
                debug = getattr(getattr(config, "run", None), "debug", False)
                if num_started() > 1 and not share_work:
                    name = Path(sys.argv[0]).name
                    raise UserError(f"{name} runs in one process, not in {num_started()}. Start it with: python {name}")
                main(config)
        finally:  # also after --help: shows a closed pipe or a full disk now; standard output may be closed
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left behind", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it again at exit
        sys.exit(141)  # the code that a shell gives for SIGPIPE
    except Exception as error:
        if not (message := message_of(error)):
            raise
        if debug:
            traceback.print_exc()
        sys.exit(f"error: {message}")


def message_of(error: Exception) -> str:
    """The message of an error that a user can fix; empty for a bug in the program."""
    if isinstance(error, torch.OutOfMemoryError):
        batch = "Lower --tokens_per_batch or --max_length; in training --batch_size, with more --gradient_accumulation"
        return f"{str(error).partition('.')[0]}. {batch}."
    if isinstance(error, OSError) and error.errno in NO_PLACE:
        name = str(error.filename or "the result")[:300]
        return f"cannot write {name}: {error.strerror}. Free space or set --results_dir."
    return str(error) if isinstance(error, UserError) else ""


def git_commit(folder: Path) -> str | None:
    """The commit of the repository in `folder`, with `-dirty` after changes; None without git or a repository."""
    git = ["git", f"--git-dir={folder / '.git'}", f"--work-tree={folder}", "describe", "--always", "--dirty"]
    try:
        described = subprocess.run([*git, "--abbrev=12"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return described.stdout.strip() or None


def environment() -> dict:
    """Versions of Python and the libraries, the platform, and the commit of this repository."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
        "git_commit": git_commit(ROOT),
    }


def pick_device(device: str) -> torch.device:
    """The device of this name; `auto` takes a GPU if one exists; each of several processes takes its own."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type == "cuda" and num_started() > 1:
            chosen = torch.device("cuda", local_rank())
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used here ({reason}). Try --device cpu.") from None
    return chosen


@contextmanager
def termination_noted() -> Iterator[threading.Event]:
    """Yields an event; SIGTERM, which a cluster sends before it ends a job, sets it and does not end the body."""
    noted = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
