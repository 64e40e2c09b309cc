"""The state of an unfinished training run: weights, optimiser and progress as one safetensors file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.results import check_identity, open_tensors, save_tensors


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
    save_tensors(path, tensors, {**identity, **progress, "optimizer": numbers})


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
        for key in file.keys():  # noqa: SIM118, no dict
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                states[int(index)][name] = file.get_tensor(key)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return progress
