"""Write files of results in one piece, check them when read, and reuse or refuse a result by its identity.

A result has an identity: its settings, the fingerprint of its rows and the fingerprint of its model. The same identity
means the same result on any machine; scripts refuse a result of another identity at the path, and name the difference.
"""

import contextlib
import functools
import json
import os
import platform
import re
import shutil
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.parallel import rank
from utils.script import UserError
from utils.settings import AnyConfig, Data, Model, Run, is_same_setting, result_settings, with_values

FORMAT_VERSION = 4
DIFFERENCES = {  # part of an identity -> words for a difference in it; any other part is about rows
    "label_names": "with other classes",
    "model_fingerprint": "with other weights of the model",
    "moments": "from other moments",
}
MACHINE = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:40]  # as part of a file name
REMEDY = "Delete it, or run the script that writes it with --overwrite."


def result_path(kind: str, run: Run, model: Model, data: Data, ending: str = "") -> Path:
    """`<results_dir>/<kind>/<model>/<dataset><ending>`: a folder, or with an ending a file."""
    return run.results_dir / kind / model.path_name / f"{data.path_name}{ending}"


# ------------------------------------------------------------------ atomic writing
def remove_abandoned(folder: Path) -> None:
    """Removes the temporary folders in `folder` that dead processes of this machine left, as after SIGKILL."""
    for left in folder.glob(f"*@{MACHINE}.tmp"):
        process = left.name.removesuffix(f"@{MACHINE}.tmp").rpartition(".")[2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def temporary_folder(path: Path) -> Path:
    """Makes a folder beside `path` with the number of this process in its name."""
    remove_abandoned(path.parent)
    folder = path.with_name(f"{path.name}.{os.getpid()}@{MACHINE}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder; at the end its content replaces `path`.

    The path is in a temporary folder, because libraries such as safetensors first write to a random name beside it.
    """
    folder = temporary_folder(path)
    try:
        yield (temporary := folder / path.name)
        for file in folder.rglob("*.safetensors"):  # safetensors lets only its owner read a file
            file.chmod(path.parent.stat().st_mode & 0o666)
        if temporary.is_dir() and os.path.lexists(path):
            os.replace(path, folder / "before")
        os.replace(temporary, path)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):  # an error of the system, such as a full disk
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raises, before the work, the OSError that writing to `path` would raise."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder. Remove it, or set --results_dir.")
    temporary_folder(path).rmdir()


def check_replaceable(folder: Path, own: str) -> None:
    """Raises UserError if `folder` holds files but not `own`, the file by which a result of ours is known."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / own).is_file():
        raise UserError(f"{folder} holds other files, which would be lost. Name a new folder with --output_dir.")


@contextlib.contextmanager
def one_run_at_a_time(path: Path) -> Iterator[None]:
    """Locks the result at `path`: a second run of the same result waits here, and then finds it.

    Enclose `find_result` and the writing of the result. The first process of a run takes the lock for all of them.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(filelock.FileLock(lock))
            stack.callback(lock.unlink, missing_ok=True)
        yield


# ------------------------------------------------------------------ JSON
class Stored(dict):
    """A dict of a file of results, at any depth; a missing entry raises a UserError that names the file."""

    def __init__(self, content: dict, path: Path) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.path} is incomplete: it has no {key!r}. {REMEDY}")


def parse_stored(path: Path, text: str | bytes) -> Stored:
    """The JSON object that a file of results holds; raises UserError for any other text."""
    try:
        content = json.loads(text, object_hook=functools.partial(Stored, path=path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). {REMEDY}") from None
    if not isinstance(content, Stored):
        raise UserError(f"{path} was not written by this version. {REMEDY}")
    return content


def save_json(path: Path, content: dict) -> None:
    """Writes strict JSON (no NaN) atomically."""
    text = json.dumps(content, indent=1, allow_nan=False)
    with write_atomically(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------ tensors
def checksum(tensor: Tensor) -> int:
    """CRC-32 of dtype, shape and bytes of a tensor on the CPU."""
    kind = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, kind)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict) -> None:
    """Writes tensors, and under the key `json` their metadata with `format_version` and the CRC-32 of each tensor."""
    own = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    checksums = {key: checksum(tensor) for key, tensor in own.items()}
    content = {"format_version": FORMAT_VERSION, **metadata, "crc32": checksums}
    with write_atomically(path) as temporary:
        save_file(own, temporary, {"json": json.dumps(content, allow_nan=False)})


class TensorFile:
    """An open file of tensors that checks each tensor as it reads it."""

    def __init__(self, path: Path, file: Any, checksums: dict[str, int]) -> None:
        self.path, self.file, self.checksums = path, file, checksums
        self.keys = checksums.keys

    def get_tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU; UserError if it is missing or damaged."""
        if key not in self.checksums:
            raise UserError(f"{self.path} has no {key}. {REMEDY}")
        with contextlib.suppress(SafetensorError):
            tensor = self.file.get_tensor(key)
            if checksum(tensor) == self.checksums[key]:
                return tensor.clone()  # the last digit of a product can depend on the address within the file
        raise UserError(f"{self.path} is damaged ({key} has changed). {REMEDY}")


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[tuple[TensorFile, dict]]:
    """Yields the open file and its metadata; UserError if it is damaged, foreign, or of another format version."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file of results. Remove it.")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}). {REMEDY}") from None
        metadata = parse_stored(path, (file.metadata() or {}).get("json", "null"))
        if metadata.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path} was not written by this version. {REMEDY}")
        tensors = TensorFile(path, file, metadata["crc32"])
        del metadata["crc32"]
        yield tensors, metadata


# ------------------------------------------------------------------ reuse, refuse or make
def read_stored(path: Path) -> dict[str, Any]:
    """The content of a JSON result, or the metadata of a file of tensors."""
    if path.suffix == ".json":
        return parse_stored(path, path.read_bytes())
    with open_tensors(path) as (_, metadata):
        return metadata


def differing_settings(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The settings with a different or missing stored value, in words; empty if all agree."""
    names = [name for name in asked if name not in stored or not is_same_setting(name, stored[name], asked[name])]
    return "; ".join(f"{name}: {stored.get(name)!r} there, {asked[name]!r} now" for name in names)


def difference(stored: dict[str, Any], identity: dict[str, Any]) -> str:
    """The difference between a stored result and an identity, in words; empty if both agree.

    An identity is `config`, the settings that `result_settings` returns, and further parts; a part that `stored` lacks
    is a difference.
    """
    if differing := differing_settings(stored["config"], identity["config"]):
        return f"with other settings ({differing})"
    for name, value in identity.items():
        if name != "config" and (name not in stored or stored[name] != value):
            return DIFFERENCES.get(name, "from other rows")
    return ""


def check_identity(stored: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    """Raises UserError if the result stored at `path` has another identity; names the difference."""
    if how := difference(stored, identity):
        raise UserError(f"{path} was made {how}. {REMEDY} Or write elsewhere with --results_dir.")


def find_result(path: Path, identity: dict[str, Any], run: Run) -> dict[str, Any] | None:
    """The result at `path`; None if the caller must make it. Raises UserError: damaged, or of another identity."""
    if run.overwrite or not path.is_file():
        check_writable(path)
        return None
    stored = read_stored(path)
    check_identity(stored, identity, path)
    return stored


def check_state(path: Path, identity: dict[str, Any], overwrite: bool) -> None:
    """Raises UserError if a saved state is damaged or of another identity; with `overwrite` removes it instead."""
    try:
        with open_tensors(path) as (file, metadata):
            check_identity(metadata, identity, path)
            for key in file.keys():  # noqa: SIM118, no dict
                file.get_tensor(key)
    except UserError:
        if not overwrite:
            raise
        path.unlink()


def settings_from_moments(config: AnyConfig, moments: Path, names: Collection[str] | None = None) -> AnyConfig:
    """The config of a script that starts from moments, with settings left at their default read from the file.

    A setting that you give and that differs raises UserError. The config stays unchanged if the file is missing; if
    `names` is given, only these settings come from the file.
    """
    if not moments.is_file():
        return config
    stored = read_stored(moments)["config"]
    asked, default = result_settings(config), result_settings(type(config)())
    given = {word.partition("=")[0].replace("-", "_").replace("__no_", "__") for word in sys.argv}  # flags
    omitted = {name for name in asked if asked[name] == default[name] and f"__{name}" not in given}
    if stored["adapter_dir"] and asked["model_name"].endswith("+lora"):  # short for a model and its adapter
        omitted.add("model_name")
    shared = [name for name in asked if name in stored and (names is None or name in names)]
    if differing := differing_settings(stored, {name: asked[name] for name in shared if name not in omitted}):
        found = f"{moments} was made with other settings ({differing}). Omit these flags to use its settings"
        raise UserError(f"{found}, run cache.py with them and --overwrite, or write elsewhere with --results_dir.")
    values = {name: stored[name] for name in shared if name in omitted}
    if values.get("adapter_dir"):
        values["adapter_dir"] = Path(values["adapter_dir"])
    return with_values(config, **values)
