"""Check on a few short texts that a model's states are those of a causal LM, layer by layer.

one width      every state is (b, t, d), d the configured hidden size
a chain        layer k + 1 receives the output of layer k; up to a factor, as RWKV halves its states on the way
causality      other tokens behind a position, padding or not, change no state up to it
independence   a sequence in a right-padded batch has the states it has alone
"""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.models.states import decoder_layers, input_device, visit_hidden_states
from utils.models.tokens import TokenizedTexts, context_length, rope_limit
from utils.script import UserError

LENGTHS = (20, 13, 8, 5)  # tokens of each sequence
# Largest relative difference between states that should be equal: in batches of one shape, and of two shapes. In one
# shape they are equal bit for bit, unless experts get other numbers of tokens (2e-7 in float32, 5e-3 in bfloat16);
# bidirectional models of random weights and width 32 differ by 2e-3 in float32. Another shape adds in another order.
TOLERANCES = {torch.float32: (5e-5, 2e-4), torch.bfloat16: (1e-3, 0.1), torch.float16: (1e-3, 0.02)}
# Half precision rounds single tokens badly (Gemma 3 270M: by 0.17), and sends some to other, nearly tied experts.
OUTLIERS = 0.25  # share of the tokens of a layer


def make_sequences(tokens: TokenizedTexts, longest: int) -> tuple[Tensor, Tensor, list[int]]:
    """Right-padded sequences of the texts' tokens, (b, t); the same with other tokens in the second half; lengths."""
    lengths = np.minimum(LENGTHS, longest)
    positions = np.arange(lengths[0])
    rows = np.resize(tokens.token_ids[:4096], (len(lengths), lengths[0])).astype(np.int64)
    input_ids = np.take_along_axis(rows, np.minimum(positions, lengths[:, None] - 1), axis=1)
    vocabulary = np.unique(input_ids)
    other = vocabulary[(np.searchsorted(vocabulary, input_ids) + 1) % len(vocabulary)]
    changed = np.where(positions < np.maximum(1, lengths[:, None] // 2), input_ids, other)
    return torch.from_numpy(input_ids), torch.from_numpy(changed), lengths.tolist()


def read_layers(model: Any, input_ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The states of `visit_hidden_states`, layer 0 first, and the tensor that each decoder layer received."""
    seen: dict[int, Tensor] = {}
    received: list[Tensor] = []

    def before_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        received.append(args[0] if args else kwargs["hidden_states"])

    with contextlib.ExitStack() as hooks:
        for layer in decoder_layers(model):
            hooks.enter_context(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
        visit_hidden_states(model, input_ids, lambda layer, states: seen.__setitem__(layer, states.clone()))
    return [seen[layer] for layer in sorted(seen)], received


def share_that_differs(found: Tensor, expected: Tensor, tolerance: float) -> float:
    """Share of states (..., d) that differ by more than a relative tolerance; the pass reports non-finite ones."""
    found, expected = found.double(), expected.to(found.device).double()  # layers can be on several devices
    relative = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    is_finite = (found.isfinite() & expected.isfinite()).all(-1)
    return (is_finite & (relative > tolerance)).double().mean().item()


def routes_tokens(model: nn.Module) -> bool:
    """True for a mixture of experts."""
    names = " ".join(type(module).__name__.lower() for module in model.modules())
    return any(word in names for word in ("moe", "expert", "router"))


def find_fault(model: Any, tokens: TokenizedTexts) -> str | None:
    """The first property that the model lacks, as half a sentence; None if it has all."""
    dtype = next(model.parameters()).dtype
    in_one_shape, in_another = TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    outliers = 0.0 if dtype == torch.float32 else OUTLIERS
    flipped = outliers if routes_tokens(model) else 0.0
    in_one_shape = in_another if flipped else in_one_shape
    limits = (max(LENGTHS), context_length(model.config), rope_limit(model.config))
    input_ids, changed, lengths = make_sequences(tokens, min(limit for limit in limits if limit))
    input_ids, changed = input_ids.to(input_device(model)), changed.to(input_device(model))
    states, received = read_layers(model, input_ids)
    shape = (*input_ids.shape, model.config.hidden_size)
    for layer, found in enumerate(states):
        if found.shape != shape:
            return f"layer {layer} gives states of shape {tuple(found.shape)}, not {shape}"
    if len(states) != len(received) + 1:
        return f"its {len(states) - 1} layers run {len(received)} times in one pass"
    for layer in range(1, len(received)):
        found, expected = (tensor.double() / tensor.double().norm() for tensor in (received[layer], states[layer]))
        if found.shape != shape or share_that_differs(found, expected, in_one_shape) > 0:
            return f"layer {layer} is not a decoder layer's output: the next layer receives something else"
    other_states, _ = read_layers(model, changed)
    for row, length in enumerate(lengths):
        half = max(1, length // 2)
        alone, _ = read_layers(model, input_ids[row : row + 1, :length])
        for layer, expected in enumerate(states):
            if share_that_differs(other_states[layer][row, :half], expected[row, :half], in_one_shape) > flipped:
                return f"its states change with the tokens and the padding after them (layer {layer})"
            if share_that_differs(expected[row, :length], alone[layer][0], in_another) > outliers:
                return f"its states change with the padding (layer {layer})"
    return None


@torch.inference_mode()
def self_check(model: Any, tokens: TokenizedTexts, name: str) -> None:
    """Checks a decoder on a few sequences of the texts' tokens. Raises UserError: it is no causal LM, or cannot run."""
    was_training, name = model.training, f"{name} ({model.config.model_type})"
    model.eval()
    try:
        fault = find_fault(model, tokens)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's own code can raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{name} fails on a few of the texts: {reason}. --debug shows the traceback.") from error
    finally:
        model.train(was_training)
    if fault:
        raise UserError(f"{name} cannot be used: {fault}. docs/architectures.md lists models that work.")
