"""Whether what is read from a model are the hidden states of a causal LM, layer by layer: tried on a few short texts.

No list of architectures can say so for the next one. Each property that the moments rely on is tested on the model
itself, on sequences of the data set's own tokens, whenever states are about to be read:

    one width      every state is (b, t, d), d the configured hidden size
    a chain        layer k + 1 receives what layer k gave, and what the last layer gave is, after the final norm, what
                   the model returns; up to a factor, as RWKV halves its states on the way
    embeddings     what the first layer receives depends on the token and its place only
    causality      other tokens behind a place, padding or not, change no state up to it
    no company     a sequence in a right-padded batch has the states it has alone

b sequences, t tokens, d hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.models.load import TokenizedTexts, context_length
from utils.models.states import decoder_layers, input_device, visit_hidden_states
from utils.script import UserError

LENGTHS = (20, 13, 8, 5)  # of the sequences
# Largest relative difference between states that should be equal. Batches of one shape give equal states bit for bit,
# unless experts get other numbers of tokens (2e-7 in float32, 5e-3 in bfloat16); bidirectional models of random weights
# and width 32 differ by 2e-3 in float32 and more in half precision.
IN_ONE_SHAPE = {torch.float32: 5e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
# In another shape sums are in another order.
IN_ANOTHER_SHAPE = {torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# In half precision a mixture of experts may send a token elsewhere where two experts are nearly tied
FLIPPED = 0.25  # share of the tokens of a layer


class NotACausalLM(Exception):
    """What of the properties above does not hold, as half a sentence."""


# ------------------------------------------------------------------ sequences
def make_sequences(tokens: TokenizedTexts, longest: int | None) -> tuple[Tensor, Tensor, list[int]]:
    """Sequences of the texts' tokens, right-padded (b, t); the same with other tokens behind the half; their lengths.

    The shortest one ends with the token that the longest has at that place: what precedes it differs, and no more.
    """
    lengths = [min(length, longest or length) for length in LENGTHS]
    drawn = np.resize(tokens.token_ids[:4096], max(min(len(tokens.token_ids), 4096), 2 * sum(LENGTHS))).astype(np.int64)
    starts = np.arange(len(lengths)) * (len(drawn) // (2 * len(lengths)))
    rows = [drawn[start : start + length].copy() for start, length in zip(starts, lengths, strict=True)]
    rows[-1][-1] = rows[0][lengths[-1] - 1]
    input_ids = np.stack([np.pad(row, (0, lengths[0] - len(row)), mode="edge") for row in rows])
    vocabulary = np.unique(input_ids)
    other = vocabulary[(np.searchsorted(vocabulary, input_ids) + 1) % len(vocabulary)]
    half = np.maximum(1, np.array(lengths) // 2)
    changed = np.where(np.arange(lengths[0]) < half[:, None], input_ids, other)
    return torch.from_numpy(input_ids), torch.from_numpy(changed), lengths


# ------------------------------------------------------------------ what is seen
def first_tensor(*places: Any) -> Tensor | None:
    """The first tensor among arguments or outputs, None where there is none."""
    for place in places:
        values = place.values() if isinstance(place, dict) else place if isinstance(place, tuple | list) else (place,)
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
    return None


def states_of(model: Any, input_ids: Tensor) -> list[Tensor]:
    """What `visit_hidden_states` sees, layer 0 first."""
    seen: dict[int, Tensor] = {}
    visit_hidden_states(model, input_ids, lambda layer, states: seen.__setitem__(layer, states.clone()))
    return [seen[layer] for layer in sorted(seen)]


@dataclass
class Trace:
    """What went through a model in one pass, each in the order of the calls."""

    inputs: list[Tensor | None] = field(default_factory=list)  # of the decoder layers
    outputs: list[Tensor | None] = field(default_factory=list)  # of the decoder layers
    after: list[tuple[Tensor | None, Tensor | None]] = field(default_factory=list)  # input and output of other modules


@contextmanager
def recording(model: Any) -> Iterator[Trace]:
    """Fills a `Trace` in the pass that is run inside."""
    layers, trace = decoder_layers(model), Trace()
    inside = {id(module) for layer in layers for module in layer.modules()}

    def received(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        return first_tensor(kwargs.get("hidden_states"), args)

    def before_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        trace.inputs.append(received(args, kwargs))

    def after_layer(module: nn.Module, args: tuple, output: Any) -> None:
        trace.outputs.append(first_tensor(output))

    def after_other(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if trace.outputs:
            trace.after.append((received(args, kwargs), first_tensor(output)))

    handles = [layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after_layer) for layer in layers]
    handles += [
        module.register_forward_hook(after_other, with_kwargs=True)
        for module in model.modules()
        if id(module) not in inside
    ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def difference(found: Tensor, expected: Tensor) -> Tensor:
    """Relative difference of the states of each place, (..., d) -> (...); 0 where the expected state is not finite."""
    found, expected = found.double(), expected.double()
    relative = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    return torch.where(expected.isfinite().all(-1), relative.nan_to_num(torch.inf), 0.0)


def same_up_to_scale(found: Tensor | None, expected: Tensor | None, tolerance: float) -> bool:
    """Whether two tensors are equal but for one positive factor."""
    if found is None or expected is None or found.shape != expected.shape:
        return False
    found, expected = found.double(), expected.to(found.device).double()  # layers can be on several devices
    scale = (found * expected).sum() / expected.square().sum()
    if not scale.isfinite():  # the pass names layer and text of a state that is not finite
        return True
    return bool(scale > 0 and (found - scale * expected).norm() <= tolerance * found.norm())


# ------------------------------------------------------------------ the properties
def check_widths(states: list[Tensor], shape: torch.Size, model: Any) -> None:
    """Raises where a layer's states are not (b, t, d), or where layers are missing."""
    width = model.config.hidden_size
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
    if len(states) != (wanted := len(decoder_layers(model)) + 1):
        raise NotACausalLM(f"only {len(states)} of {wanted} layers run")


def check_chain(states: list[Tensor], trace: Trace, tolerance: float) -> None:
    """Raises where a layer does not receive what the one before gave, or the last state is of another origin."""
    num_layers = len(states) - 1
    if len(trace.inputs) != num_layers:
        raise NotACausalLM(f"its {num_layers} layers run {len(trace.inputs)} times in one pass")
    for layer in range(1, num_layers):
        if not same_up_to_scale(trace.inputs[layer], states[layer], tolerance):
            raise NotACausalLM(
                f"layer {layer} is not a decoder layer's output: what comes after it receives something else"
            )
    reached = [trace.outputs[-1]]
    for received, given in trace.after:  # the final norm, whatever its name, and a projection behind it if there is one
        if given is not None and any(same_up_to_scale(received, state, tolerance) for state in reached):
            reached.append(given)
    if not any(same_up_to_scale(states[-1], state, tolerance) for state in reached):
        raise NotACausalLM(
            f"layer {num_layers} is not the last decoder layer's output after the final norm: the model returns "
            "something else"
        )


def check_places(states: Tensor, lengths: list[int], tolerance: float) -> None:
    """Raises where equal tokens at equal places enter the first layer differently."""
    place = lengths[-1] - 1
    if difference(states[-1, place], states[0, place]) > tolerance:
        raise NotACausalLM("layer 0 is not the embeddings: what enters the first layer depends on preceding tokens")


def check_equal(found: list[Tensor], expected: list[Tensor], tolerance: float, flipped: float, fault: str) -> None:
    """Raises `fault` where states (t, d) differ, at more than the share `flipped` of the places of a layer."""
    for layer, (one, other) in enumerate(zip(found, expected, strict=True)):
        relative = difference(one, other)
        if (relative > tolerance).double().mean() > flipped:
            raise NotACausalLM(f"{fault} (layer {layer}, by {relative.max():.1%}): not a causal LM")


def routes_tokens(model: nn.Module) -> bool:
    """Whether it is a mixture of experts."""
    names = {type(module).__name__.lower() for module in model.modules()}
    return any(word in name for name in names for word in ("moe", "expert", "router"))


def check_model(model: Any, tokens: TokenizedTexts) -> None:
    """Raises `NotACausalLM` naming the first property that does not hold."""
    parameter = next(model.parameters())
    dtype = parameter.dtype if parameter.dtype in IN_ONE_SHAPE else torch.float32
    in_shape, in_another, flipped = IN_ONE_SHAPE[dtype], IN_ANOTHER_SHAPE[dtype], 0.0
    if dtype != torch.float32 and routes_tokens(model):
        in_shape, flipped = in_another, FLIPPED
    input_ids, changed, lengths = make_sequences(tokens, context_length(model.config))
    device = input_device(model)
    input_ids, changed = input_ids.to(device), changed.to(device)
    with recording(model) as trace:
        states = states_of(model, input_ids)
    check_widths(states, input_ids.shape, model)
    check_chain(states, trace, in_shape)
    check_places(states[0], lengths, in_shape)
    other_states = states_of(model, changed)
    for row, length in enumerate(lengths):
        half = max(1, length // 2)
        found, expected = ([layer[row, :half] for layer in both] for both in (other_states, states))
        check_equal(found, expected, in_shape, flipped, "its states change with the tokens and the padding after them")
    for row, length in list(enumerate(lengths))[1:]:
        alone = [layer[0] for layer in states_of(model, input_ids[row : row + 1, :length])]
        padded = [layer[row, :length] for layer in states]
        check_equal(padded, alone, in_another, flipped, "its states change with the padding")


@torch.inference_mode()
def self_check(model: Any, tokens: TokenizedTexts, name: str) -> None:
    """Tries a decoder on a few sequences of the texts' tokens; its mode is as before.

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
