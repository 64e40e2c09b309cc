"""Names on disk, atomic files, provenance, and errors that a user can fix: shared by every script.

Paths hold what a person sweeps (model, dataset, split); the file itself holds everything else. A file is written
under a temporary name and renamed, so that an existing result is a finished one.
"""

import contextlib
import errno
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors import SafetensorError

from utils.parallel import local_rank, num_started, one_voice, one_voice_in_parsing, rank

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate", "scikit-learn", "numpy", "scipy", "safetensors")


CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
NO_PLACE = (*CANNOT_WRITE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP)


SCRIPTS = {  # a folder of results -> whose they are
    **{"moments": "cache.py", "ntps": "K_sweep.py", "alignment": "alignment_vis.py"},
    **{"linear_sklearn": "linear_sklearn.py", "linear_training": "linear_training.py"},
    **{"lora": "lora_finetuning.py", "from_scratch": "from_scratch.py", "full_finetuning": "from_scratch.py"},
    "prescreen": "prescreen.py",
}


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


def check_writable(path: Path) -> None:
    """Tries to write beside `path` what `write_atomically` would, and leaves nothing; to be called before the work.

    Raises:
        UserError: it cannot be written.
    """
    if rank() > 0:  # the first process tries for all
        return
    temporary = temporary_path(path)
    if path.suffix and path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder. Remove it, or set --results_dir.")
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except FileNotFoundError:  # another run that tries the same has removed the folder again
        return
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        raise UserError(cannot_write(error)) from error
    for folder in made:
        with contextlib.suppress(OSError):  # another run has begun to write there
            folder.rmdir()


# ------------------------------------------------------------------ names and paths
def path_name(name: str) -> str:
    """The folder name of a model or dataset: `Qwen/Qwen2-0.5B` -> `Qwen__Qwen2-0.5B`, a local path -> its stem."""
    path = Path(name)
    if path.is_file() or path.suffix == ".gguf":  # also when the file is gone
        return path.stem
    if path.is_dir():
        return path.resolve().name
    return name.strip("/").replace("/", "__")


# ------------------------------------------------------------------ atomic files
def machine() -> str:
    """The name of this machine or container, as it can stand in the name of a file."""
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:40]


def temporary_path(path: Path) -> Path:
    """Where this process writes what is to be `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}@{machine()}.tmp")


def remove_abandoned(path: Path) -> None:
    """Removes what dead processes of this machine have left of writing `path`, as one killed by SIGKILL does.

    Whether a process of another machine lives cannot be known here: several may share a folder.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        process, _, where = left.name.removeprefix(f"{path.name}.").removesuffix(".tmp").partition("@")
        if process.isdecimal() and where in ("", machine()) and not is_running(int(process)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # there is one, of another user
        return True
    return True


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it on success, deletes it on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def oserror_of_safetensors() -> Iterator[None]:
    """Raises as an OSError what safetensors says of the system, such as a full disk while a model is saved."""
    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        raise


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, and puts it in its place on success."""
    remove_abandoned(folder)
    temporary = temporary_path(folder)
    temporary.mkdir(parents=True)
    try:
        with oserror_of_safetensors():
            yield temporary
        if folder.is_symlink():  # the link is replaced; what it leads to is somebody else's
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remedy(path: Path) -> str:
    """What a person does about a file of results that cannot be used."""
    for kind in reversed(path.parts[:-1]):
        if kind in SCRIPTS:
            split = f" --split {path.name.split('.')[0]}" if kind == "moments" else ""
            return f"Run {SCRIPTS[kind]}{split} with --overwrite, or delete the file."
    return "Run its script with --overwrite, or delete the file."


def json_seal(content: dict) -> str:
    """A digest of what a JSON file holds, which is the same when it is read back."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def save_json(path: Path, content: dict) -> None:
    """Writes strict JSON (no NaN) atomically, with a seal that tells when it is changed afterwards."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    plain.pop("seal", None)  # of a file that was read by other means
    text = json.dumps(plain | {"seal": json_seal(plain)}, indent=1)
    with write_atomically(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


class Stored(dict):
    """What a file of results holds. Whoever reads an entry that is not there meets a `Foreign`."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise ForeignError(f"{self.path} is no whole result: it has no {key!r}. {remedy(self.path)}")


class ForeignError(UserError, KeyError):
    """A file that is not what its name says."""

    __str__ = Exception.__str__  # that of KeyError puts quotation marks around the sentence


def parse_stored(path: Path, text: str) -> Any:
    """JSON whose objects, at any depth, say which file lacks an entry. Raises ValueError where it is no JSON."""

    def stored(content: dict) -> Stored:
        found = Stored(content)
        found.path = path
        return found

    try:
        return json.loads(text, object_hook=stored)
    except RecursionError:
        raise ValueError("thousands of nested brackets") from None


def load_json(path: Path) -> dict:
    """The content of one result file.

    Raises:
        UserError: the file cannot be read, is not a JSON object, or was changed after `save_json` wrote it; or, later,
            an entry that is read is not there.
    """
    try:
        content = parse_stored(path, path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a JSON result ({error}). {remedy(path)}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). See --results_dir.") from None
    if not isinstance(content, dict):
        raise ForeignError(f"{path} is no result: it holds no object. {remedy(path)}")
    if "seal" in content and content.pop("seal") != json_seal(content):
        raise ForeignError(f"{path} is no whole result: it was changed after it was written. {remedy(path)}")
    return content


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
