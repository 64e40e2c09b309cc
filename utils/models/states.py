"""Find the decoder of a causal LM, visit its hidden states one layer at a time, and pool them."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from utils.script import UserError


def decoder_of(causal_lm: Any) -> Any:
    """The decoder of a causal LM, without the head. Raises UserError if no module separates them."""
    from transformers import PreTrainedModel

    base = causal_lm.base_model
    if base is causal_lm:
        parts = [module for module in causal_lm.children() if isinstance(module, PreTrainedModel)]
        if len(parts) != 1:
            raise UserError(f"{type(causal_lm).__name__} has no decoder apart from its head. Change --model_name.")
        base = parts[0]
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    if num_layers := getattr(decoder.config, "decoder_layers", None):  # BART: `num_hidden_layers` is the encoder's
        decoder.config.num_hidden_layers = num_layers
    return decoder


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a base model: the list of `num_hidden_layers` modules that has most weights.

    `self_check` tests that they are the decoder layers. Raises UserError if no such list exists.
    """
    num_layers = model.config.num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of {num_layers} decoder layers. Change --model_name.")
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


@torch.inference_mode()
def visit_hidden_states(model: Any, input_ids: Tensor, visit: Callable[[int, Tensor], None]) -> None:
    """Runs the model on right-padded `input_ids` (b, t) and calls `visit(layer, hidden_states)` as each layer appears.

    Layer 0 is the input of the first decoder layer, layer k the output of the k-th, layer L the model's output after
    the final norm; memory holds only one of them, (b, t, d), at a time. For most models these are the entries of
    `output_hidden_states=True`; that list is shifted by one for Mamba and RWKV. `self_check` tests the model.
    """
    layers = decoder_layers(model)

    def first(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        visit(0, args[0] if args else kwargs["hidden_states"])

    def inner(layer: int) -> Callable:
        return lambda module, args, output: visit(layer, output if isinstance(output, Tensor) else output[0])

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(first, with_kwargs=True))
        for k in range(1, len(layers)):
            hooks.enter_context(layers[k - 1].register_forward_hook(inner(k)))
        visit(len(layers), run_base_model(model, input_ids))


def input_device(model: nn.Module) -> torch.device:
    """The device for input tokens: that of the first weights that are not on disk."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def layer_devices(model: Any) -> list[torch.device]:
    """The device of each layer's states, layer 0 first; runs one token through the model."""
    found: list[torch.device] = []
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    visit_hidden_states(model, token, lambda layer, states: found.append(states.device))
    return found


@torch.inference_mode()
def run_base_model(model: Any, input_ids: Tensor) -> Tensor:
    """The last hidden states, (b, t, d), of right-padded `input_ids`; those of the padding are meaningless."""
    # no mask tensor: the causal mask alone hides the padding, and the fast attention kernels apply
    return model(input_ids=input_ids, use_cache=False).last_hidden_state


def pool(hidden_states: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """The pooled state m of each text (b, d): "mean" over its tokens, or its "last" token.

    `hidden_states` (b, t, d) are right-padded, `lengths` (b,) the tokens of each text.
    """
    if pooling == "last":
        return hidden_states[torch.arange(len(lengths), device=lengths.device), lengths - 1]
    positions = torch.arange(hidden_states.shape[1], device=lengths.device)
    inside = (positions < lengths[:, None]).to(hidden_states.dtype)
    return torch.bmm(inside[:, None], hidden_states)[:, 0] / lengths[:, None].to(hidden_states.dtype)
