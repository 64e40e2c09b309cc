"""Names on disk, atomic files, provenance, and errors that a user can fix: shared by every script.

Paths hold what a person sweeps (model, dataset, split); the file itself holds everything else. A file is written
under a temporary name and renamed, so that an existing result is a finished one.
"""

import contextlib
import errno
import glob
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.distributed import local_rank, num_started, one_voice, one_voice_in_parsing, rank

ROOT = Path(__file__).resolve().parent.parent
FORMAT_VERSION = 2
PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate", "scikit-learn", "numpy", "scipy", "safetensors")


CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"},
}
ITEM_SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
NO_PLACE = (*CANNOT_WRITE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


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
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, and puts it in its place on success."""
    remove_abandoned(folder)
    temporary = temporary_path(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.is_symlink():  # the link is replaced; what it leads to is somebody else's
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_json(path: Path, content: dict) -> None:
    """Writes strict JSON (no NaN) atomically."""
    text = json.dumps(content, indent=1, allow_nan=False)
    with write_atomically(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


class Stored(dict):
    """What a file of results holds. Whoever reads an entry that is not there meets a `Foreign`."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise ForeignError(f"{self.path} is no whole result: it has no {key!r}. Delete it and run its script again.")


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
        UserError: the file cannot be read or is not a JSON object; or, later, an entry that is read is not there.
    """
    try:
        content = parse_stored(path, path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a JSON result ({error}). Delete it and run its script again.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). See --results_dir.") from None
    if not isinstance(content, dict):
        raise ForeignError(f"{path} is no result: it holds no object. Delete it and run its script again.")
    return content


def tensor_header(entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict) -> bytes:
    """What a safetensors file starts with.

    Args:
        entries: type and shape of each tensor, as the format names them, in the order in which the data follow.
        metadata: kept as one JSON string.
    """
    header: dict[str, Any] = {"__metadata__": {"json": json.dumps(metadata, allow_nan=False)}}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + ITEM_SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded


def reserve(file: Any, num_bytes: int) -> None:
    """Gives an open file its size; a full disk shows here, and not in the middle of the work."""
    try:
        file.truncate(num_bytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor | list[Tensor]], metadata: dict) -> None:
    """Writes tensors and one JSON string of metadata as safetensors, atomically.

    A list of tensors becomes one, stacked along a first axis; they may be on any device, and are never all copied.
    """
    parts = {name: value if isinstance(value, list) else [value] for name, value in tensors.items()}
    parts = dict(sorted(parts.items(), key=lambda item: -item[1][0].element_size()))  # so that each is aligned
    shapes = {name: (*[len(of)] * isinstance(tensors[name], list), *of[0].shape) for name, of in parts.items()}
    header = tensor_header({name: (DTYPES[of[0].dtype], shapes[name]) for name, of in parts.items()}, metadata)
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        reserve(file, len(header) + sum(part.nbytes for of in parts.values() for part in of))
        file.write(header)
        for part in itertools.chain.from_iterable(parts.values()):
            file.write(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[tuple[Any, dict]]:
    """Yields the open safetensors file (`get_tensor`, `get_slice`) and its metadata.

    Raises:
        UserError: the file is damaged, foreign, or of another format version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = parse_stored(path, (file.metadata() or {}).get("json", "null"))
            if not isinstance(metadata, dict) or metadata.get("format_version") != FORMAT_VERSION:
                raise UserError(f"{path} was not written by this version. Delete it, or recompute it with --overwrite.")
            yield file, metadata
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}). Recompute it with --overwrite.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file of results. Remove it.") from None


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


def start_tensors(file: BinaryIO, header: bytes, shapes: dict[str, tuple[int, ...]]) -> None:
    """Makes an open file a safetensors file of float32 zeros; arguments as those of `map_tensors`."""
    file.truncate(0)
    reserve(file, len(header) + 4 * sum(map(math.prod, shapes.values())))
    file.seek(0)
    file.write(header)
    file.flush()


def map_tensors(file: BinaryIO, header: bytes, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.memmap]:
    """The float32 tensors of an open safetensors file, mapped for writing: for what should not sit in memory.

    Args:
        file: open for reading and writing.
        header: of `tensor_header`, with which it starts.
        shapes: of the tensors, in the order of the header.
    """
    tensors, offset = {}, len(header)
    for name, shape in shapes.items():
        tensors[name] = np.memmap(file, np.float32, "r+", offset=offset, shape=shape)
        offset += tensors[name].nbytes
    return tensors
