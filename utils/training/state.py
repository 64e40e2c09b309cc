"""The state of an unfinished training run: weights, optimiser and progress as one safetensors file."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.results import check_identity, open_tensors, save_tensors


def save_state(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
               identity: dict[str, Any], progress: dict[str, Any]) -> None:  # fmt: skip
    """Writes weights, optimiser, identity and progress of a run."""
    tensors: dict[str, Tensor] = {f"weight.{name}": parameter for name, parameter in parameters.items()}
    for index, state in optimizer.state_dict()["state"].items():  # with numbers, such as the count of steps
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    save_tensors(path, tensors, {**identity, **progress})


def load_state(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
               identity: dict[str, Any]) -> dict[str, Any] | None:  # fmt: skip
    """Puts a saved state into parameters and optimiser; its progress, or None without one. Raises UserError."""
    if not path.is_file():
        return None
    states: dict[int, dict[str, Tensor]] = defaultdict(dict)
    with open_tensors(path) as (file, progress), torch.no_grad():
        check_identity(progress, identity, path)
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
        for key in file.keys():  # noqa: SIM118, no dict
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                states[int(index)][name] = file.get_tensor(key)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(states)})
    return progress
