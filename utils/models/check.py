"""Check on a few short texts that a model's states are those of a causal LM, layer by layer.

No list of architectures can decide that for the next one. Each property that the moments rely on is tested on the model
itself, on sequences of the data set's own tokens, before states are read:

    one width      every state is (b, t, d), d the configured hidden size
    a chain        layer k + 1 receives the output of layer k; up to a factor, as RWKV halves its states on the way
    causality      other tokens behind a position, padding or not, change no state up to it
    no company     a sequence in a right-padded batch has the states it has alone

b sequences, t tokens, d hidden size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.models.load import TokenizedTexts, context_length, rope_limit
from utils.models.states import decoder_layers, input_device, visit_hidden_states
from utils.script import UserError

LENGTHS = (20, 13, 8, 5)  # of the sequences
# Largest relative difference between states that should be equal. Batches of one shape give equal states bit for bit,
# unless experts get other numbers of tokens (2e-7 in float32, 5e-3 in bfloat16); bidirectional models of random weights
# and width 32 differ by 2e-3 in float32 and more in half precision.
IN_ONE_SHAPE = {torch.float32: 5e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
# In another shape sums are in another order.
IN_ANOTHER_SHAPE = {torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# In half precision a mixture of experts may send a token elsewhere if two experts are nearly tied.
FLIPPED = 0.25  # share of the tokens of a layer


class NotACausalLM(Exception):
    """Half a sentence about a property that does not hold."""


def make_sequences(tokens: TokenizedTexts, longest: int) -> tuple[Tensor, Tensor, list[int]]:
    """Right-padded sequences of the texts' tokens (b, t); the same with other tokens behind the half; their lengths."""
    lengths = [min(length, longest) for length in LENGTHS]
    drawn = np.resize(tokens.token_ids[:4096], max(min(len(tokens.token_ids), 4096), 2 * sum(LENGTHS))).astype(np.int64)
    starts = np.arange(len(lengths)) * (len(drawn) // (2 * len(lengths)))
    rows = [drawn[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    input_ids = np.stack([np.pad(row, (0, lengths[0] - len(row)), mode="edge") for row in rows])
    vocabulary = np.unique(input_ids)
    other = vocabulary[(np.searchsorted(vocabulary, input_ids) + 1) % len(vocabulary)]
    half = np.maximum(1, np.array(lengths) // 2)
    changed = np.where(np.arange(lengths[0]) < half[:, None], input_ids, other)
    return torch.from_numpy(input_ids), torch.from_numpy(changed), lengths


def read_layers(model: Any, input_ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The states of `visit_hidden_states`, layer 0 first, and the tensor that each decoder layer received."""
    seen: dict[int, Tensor] = {}
    received: list[Tensor] = []

    def before_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        received.append(args[0] if args else kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in decoder_layers(model)]
    try:
        visit_hidden_states(model, input_ids, lambda layer, states: seen.__setitem__(layer, states.clone()))
    finally:
        for handle in handles:
            handle.remove()
    return [seen[layer] for layer in sorted(seen)], received


def same_up_to_scale(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """True for two tensors that are equal but for one positive factor."""
    if found.shape != expected.shape:
        return False
    found, expected = found.double(), expected.to(found.device).double()  # layers can be on several devices
    scale = (found * expected).sum() / expected.square().sum()
    if not scale.isfinite():  # the pass names layer and text of a state that is not finite
        return True
    return bool(scale > 0 and (found - scale * expected).norm() <= tolerance * found.norm())


def check_layers(states: list[Tensor], received: list[Tensor], shape: torch.Size, model: Any, tolerance: float) -> None:
    """Raises for a layer whose states are not (b, t, d), or that does not receive the output of the layer before."""
    width, num_layers = model.config.hidden_size, len(decoder_layers(model))
    for layer, found in enumerate(states):
        if found.ndim != 3 or found.shape[:2] != shape:
            raise NotACausalLM(
                f"layer {layer} gives states of shape {tuple(found.shape)} for {shape[0]} texts of {shape[1]} tokens, "
                f"not {(*shape, width)}"
            )
        if found.shape[2] != width:
            raise NotACausalLM(
                f"layer {layer} gives states of width {found.shape[2]}, its configuration says {width}: the layers "
                "have no common width"
            )
    if len(states) != num_layers + 1 or len(received) != num_layers:
        raise NotACausalLM(f"its {num_layers} layers run {len(received)} times in one pass")
    for layer in range(1, num_layers):
        if not same_up_to_scale(received[layer], states[layer], tolerance):
            raise NotACausalLM(f"layer {layer} is not a decoder layer's output: the next layer receives something else")


def check_equal(found: list[Tensor], expected: list[Tensor], tolerance: float, flipped: float, fault: str) -> None:
    """Raises `fault` for states (t, d) that differ, at more than the share `flipped` of the positions of a layer."""
    for layer, (one, other) in enumerate(zip(found, expected, strict=True)):
        one, other = one.double(), other.double()
        relative = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-30)
        relative = torch.where(other.isfinite().all(-1), relative.nan_to_num(torch.inf), 0.0)
        if (relative > tolerance).double().mean() > flipped:
            raise NotACausalLM(f"{fault} (layer {layer}, by {relative.max():.1%}): not a causal LM")


def routes_tokens(model: nn.Module) -> bool:
    """True for a mixture of experts."""
    names = {type(module).__name__.lower() for module in model.modules()}
    return any(word in name for name in names for word in ("moe", "expert", "router"))


def check_model(model: Any, tokens: TokenizedTexts) -> None:
    """Raises `NotACausalLM` naming the first property that does not hold."""
    parameter = next(model.parameters())
    dtype = parameter.dtype if parameter.dtype in IN_ONE_SHAPE else torch.float32
    in_shape, in_another, flipped = IN_ONE_SHAPE[dtype], IN_ANOTHER_SHAPE[dtype], 0.0
    if dtype != torch.float32 and routes_tokens(model):
        in_shape, flipped = in_another, FLIPPED
    limits = (max(LENGTHS), context_length(model.config), rope_limit(model.config))
    input_ids, changed, lengths = make_sequences(tokens, min(limit for limit in limits if limit))
    device = input_device(model)
    input_ids, changed = input_ids.to(device), changed.to(device)
    states, received = read_layers(model, input_ids)
    check_layers(states, received, input_ids.shape, model, in_shape)
    other_states, _ = read_layers(model, changed)
    for row, length in enumerate(lengths):
        half = max(1, length // 2)
        found, expected = ([layer[row, :half] for layer in both] for both in (other_states, states))
        check_equal(found, expected, in_shape, flipped, "its states change with the tokens and the padding after them")
        alone = [layer[0] for layer in read_layers(model, input_ids[row : row + 1, :length])[0]]
        padded = [layer[row, :length] for layer in states]
        check_equal(padded, alone, in_another, flipped, "its states change with the padding")


@torch.inference_mode()
def self_check(model: Any, tokens: TokenizedTexts, name: str) -> None:
    """Checks a decoder on a few sequences of the texts' tokens; its mode is as before.

    Raises:
        UserError: it is not a causal LM, its states cannot be read, or it cannot be run at all.
    """
    was_training = model.training
    model.eval()
    try:
        check_model(model, tokens)
    except NotACausalLM as error:
        raise UserError(
            f"{name} ({model.config.model_type}) cannot be used: {error}. docs/architectures.md lists what can."
        ) from error
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's own code can raise anything
        message = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name} ({model.config.model_type}) cannot be run on a few of the texts: {type(error).__name__}: "
            f"{message}. The traceback is shown with --debug."
        ) from error
    finally:
        model.train(was_training)


def check_gradients(model: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
    """Tries one step without taking it; dropout is off, gradients are as before.

    Args:
        model: what is trained, from `inputs` to a tensor.
        inputs: of a text or a few.
        name: of the model, for the sentence.

    Raises:
        UserError: a LoRA weight gets no gradient: the model reads its projection in a way that goes round the adapter.
    """
    if routes_tokens(model):  # an expert that no token goes to has none
        return
    was_training = model.training
    model.eval()
    model(*inputs).sum().backward()
    adapted = [place for place, parameter in model.named_parameters() if "lora_" in place and parameter.requires_grad]
    parameters = dict(model.named_parameters())
    without = [place for place in adapted if parameters[place].grad is None]
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    if without:
        raise UserError(
            f"{len(without)} of {len(adapted)} LoRA weights of {name} get no gradient, the first is {without[0]}: the "
            "model does not run that projection as a module. Choose other --target_modules."
        )
