"""Finished results: reuse, refuse or make; and the state of an unfinished training run.

A result has an identity: its settings, the fingerprint of its rows and the fingerprint of its model. The same identity
is the same result on any machine; at the same place with another identity it is refused, and what differs is named.
"""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.script import NO_PLACE, UserError, check_writable, load_json
from utils.settings import Data, Model, Run
from utils.tensor_files import FORMAT_VERSION, open_tensors, save_tensors

# what a part of an identity other than its settings says, where it differs
DIFFERENCES = {
    "fingerprint": "from other rows or docstrings",  # the docstrings are those that demo/pretrain.py reads
    "label_names": "from other rows",
    "train_fingerprint": "from other rows",
    "test_fingerprint": "from other rows",
    "fingerprints": "from other rows",
    "model_fingerprint": "with other weights of the model",
    "moments": "from other moments",
    "held_out": "from other moments of the held-out split",
}


def result_path(kind: str, run: Run, model: Model, data: Data, ending: str = "") -> Path:
    """`<results_dir>/<kind>/<model>/<dataset><ending>`: a folder, or a file where `ending` is one of files."""
    return run.results_dir / kind / model.path_name / f"{data.path_name}{ending}"


def read_identity(path: Path) -> dict[str, Any]:
    """The content of a JSON result, or the metadata of a file of tensors."""
    if path.suffix == ".json":
        return load_json(path)
    with open_tensors(path) as (_, metadata):
        return metadata


def check_identity(stored: dict[str, Any], identity: dict[str, Any], path: Path, free: Collection[str] = ()) -> None:
    """Compares what is stored at `path` with what is asked for; settings in `free` may differ.

    Raises:
        UserError: naming each setting that differs, or whether it is the rows, the model or the moments.
    """
    there = stored.get("config", {})
    if not isinstance(there, dict):
        raise UserError(f"{path} is no whole result: its settings are no object. Recompute it with --overwrite.")
    differing = [
        f"{name}: {there.get(name)!r} there, {value!r} now"
        for name, value in identity["config"].items()
        if name not in free and there.get(name) != value
    ]
    if differing:
        raise UserError(
            f"{path} was made with other settings ({'; '.join(differing)}). "
            "Recompute it with --overwrite, or write elsewhere with --results_dir."
        )
    for name, value in identity.items():
        if name != "config" and stored.get(name) != value:
            raise UserError(
                f"{path} was made {DIFFERENCES[name]}. Recompute it with --overwrite, or write elsewhere with "
                "--results_dir."
            )


def find_result(path: Path, identity: dict[str, Any], run: Run, free: Collection[str] = ()) -> dict[str, Any] | None:
    """The finished result at `path`; None where it has to be made: there is none, or --overwrite is given.

    Args:
        path: of a JSON result, or of a file of tensors, whose metadata is then returned.
        identity: `config`, the settings as `result_settings` gives them, and the fingerprints to compare.
        run: `overwrite` is read.
        free: settings that may differ.

    Raises:
        UserError: the result is damaged, or of another identity; or it has to be made and cannot be written.
    """
    if run.overwrite or not path.is_file():
        check_writable(path)
        return None
    stored = read_identity(path)
    check_identity(stored, identity, path, free)
    return stored


# ------------------------------------------------------------------ state of an unfinished run
def check_state(path: Path, identity: dict[str, Any], overwrite: bool) -> None:
    """Looks at the state of an unfinished run before the work; with --overwrite one that cannot be used goes.

    Raises:
        UserError: it is damaged, or of a run of another identity.
    """
    try:
        check_identity(read_identity(path), identity, path)
    except UserError:
        if not overwrite:
            raise
        path.unlink()


@contextlib.contextmanager
def state_if_there_is_place() -> Iterator[None]:
    """Its body writes a state; where it cannot be written that is said, and the run goes on without."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        tqdm.write(f"cannot keep the state of this run: {error.strerror}; it goes on without")


def save_state(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    progress: dict[str, Any],
) -> None:
    """Writes weights, optimiser and progress of a run as one safetensors file."""
    tensors: dict[str, Tensor] = {f"weight.{name}": parameter for name, parameter in parameters.items()}
    numbers: dict[str, dict[str, float]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        numbers[index] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    save_tensors(path, tensors, {"format_version": FORMAT_VERSION, **identity, **progress, "optimizer": numbers})


def load_state(
    path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> dict[str, Any] | None:
    """Puts a saved state into parameters and optimiser and returns its progress; None where there is no state.

    Raises:
        UserError: the state is damaged, or of a run of another identity.
    """
    if not path.is_file():
        return None
    with open_tensors(path) as (file, progress):
        check_identity(progress, identity, path)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
        states: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in progress["optimizer"].items()}
        for key in file.keys():  # noqa: SIM118, not a dict
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                states[int(index)][name] = file.get_tensor(key)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return progress
